# SPDX-License-Identifier: Apache-2.0
"""QED and QEMU on the same image, taking turns."""

import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import nbd
import pytest

from nbdstream.extents import align_down, align_up
from nbdstream.leaf import open_leaf
from nbdstream.leaf.base import BackingReference, State
from testbed.leaves import drive, flush
from testbed.peers import assert_same, nbdkit, nbdstream_serve, run
from tests.leaf_support import (
    BACKING,
    extents,
    guest_write,
    pattern,
    qemu_check,
    read,
    zero,
)
from tests.qed_image import CLUSTER, SIZE, SMALL, qemu_io, small_image
from tests.serve_support import client

path = pytest.fixture(small_image)


def test_qemu_reads_what_we_wrote(path: Path, tmp_path: Path) -> None:
    leaf = open_leaf(str(path))
    guest_write(leaf, 1_000_001, b"across" * 5000, b"")
    for extent in extents(leaf):
        if extent.state is State.UNALLOCATED:
            zero(leaf, extent.offset, extent.length)
    flush(leaf)
    leaf.drop_backing()
    content = read(leaf, 0, SIZE, b"")
    leaf.close()
    raw = tmp_path / "raw"
    raw.write_bytes(content)
    run(["qemu-img", "compare", "-f", "qed", "-F", "raw", path, raw])
    assert "backing file" not in run(["qemu-img", "info", "-f", "qed", path])
    qemu_check(path, "qed")


def test_we_read_what_qemu_wrote(path: Path, tmp_path: Path) -> None:
    qemu_io(path, "write -P 0x42 3M 70000", "write -z 8M 64k", "write -P 1 0 512")
    leaf = open_leaf(str(path))
    assert read(leaf, 3 << 20, 70000, b"") == b"\x42" * 70000
    assert extents(leaf, 8 << 20, 65536)[-1].state is State.ZERO
    assert read(leaf, 0, 1024, b"") == b"\1" * 512 + pattern(512, 512, 1)
    leaf.close()
    qemu_check(path, "qed")


@pytest.mark.parametrize("seed", range(6))
def test_taking_turns_with_qemu(tmp_path: Path, seed: int) -> None:
    """Over a backing that has data nearly everywhere. What we zero or fetch as zeroes reads as
    zeroes also after QEMU has written a part of the cluster."""
    path, rng = tmp_path / "disk.qed", random.Random(seed)
    model = bytearray(rng.randbytes(SIZE))
    model[4 << 20 : 5 << 20] = bytes(1 << 20)
    backing = bytes(model)
    (tmp_path / "base.raw").write_bytes(backing)
    SMALL.make(path, SIZE, replace(BACKING, uri=str(tmp_path / "base.raw")))
    for turn in range(12):
        commands = []
        leaf = open_leaf(str(path)) if turn % 2 else None
        for _ in range(10):
            offset = rng.randrange(SIZE // 512 - 300) * 512
            length = rng.randrange(1, 300) * 512
            byte = rng.choice((0, rng.randrange(256)))
            if leaf is not None and byte == 0:
                offset, length = align_down(offset, CLUSTER), align_up(length, CLUSTER)
                fetched = not any(backing[offset : offset + length])
                unmap = rng.random() < 0.7
                drive(leaf, partial(leaf.zero, offset, length, unmap=unmap, as_backing=fetched))
            elif leaf is not None:
                guest_write(leaf, offset, bytes([byte]) * length, backing)
            else:
                commands.append(f"write -P {byte} {offset} {length}")
            model[offset : offset + length] = bytes([byte]) * length
        if leaf is None:
            run(["qemu-io", *(word for line in commands for word in ("-c", line)), path])
        else:
            leaf.close()
        qemu_check(path, "qed")
        reader = open_leaf(str(path), read_only=True)
        assert read(reader, 0, SIZE, backing) == model
        reader.close()


def test_a_guests_zeroes_stay_zeroes_in_qemu(tmp_path: Path) -> None:
    """A server's client zeroes; then QEMU goes on with the leaf over its backing."""
    path, rng, cluster = tmp_path / "disk.qed", random.Random(1), 65536
    model = bytearray(rng.randbytes(SIZE))
    (tmp_path / "base.raw").write_bytes(model)
    with nbdkit("file", tmp_path / "base.raw", readonly=True) as backing:
        with (
            nbdstream_serve(path, backing.uri, "--stream", "off") as server,
            client(server.uri) as guest,
        ):
            for _ in range(20):
                guest.pread(cluster, rng.randrange(SIZE - cluster))  # some are local before
                offset = rng.randrange(SIZE - 8 * cluster)
                length = rng.randrange(1, 8 * cluster)
                flags = rng.choice((0, nbd.CMD_FLAG_NO_HOLE))
                guest.zero(length, offset, flags)
                model[offset : offset + length] = bytes(length)
        writes = []
        for offset in range(512, SIZE - cluster, cluster):
            writes += ["-c", f"write -P 7 {offset} 512"]
            model[offset : offset + 512] = b"\7" * 512
        run(["qemu-io", *writes, path])
        (tmp_path / "model.raw").write_bytes(model)
        assert_same(path, tmp_path / "model.raw", "qed")


def test_the_identity_survives_what_qemu_does(path: Path) -> None:
    known = BackingReference("nbd://localhost:10809/disk", "raw", SIZE, "sha256:known")
    leaf = open_leaf(str(path))
    leaf.record_backing(known)
    leaf.close()
    qemu_io(path, "write -P 5 1M 1M")
    qemu_check(path, "qed")
    leaf = open_leaf(str(path), read_only=True)
    assert leaf.backing == known
    leaf.close()


def test_another_backing_set_by_qemu_has_no_identity_yet(path: Path) -> None:
    leaf = open_leaf(str(path))
    leaf.record_backing(BackingReference(BACKING.uri, "raw", SIZE, "sha256:known"))
    leaf.close()
    run(["qemu-img", "rebase", "-u", "-f", "qed", "-F", "raw", "-b", "nbd://elsewhere/x", path])
    qemu_check(path, "qed")
    leaf = open_leaf(str(path))
    assert leaf.backing == BackingReference("nbd://elsewhere/x", "raw", 0, "")
    again = BackingReference("nbd://elsewhere/x", "raw", SIZE, "sha256:other")
    leaf.record_backing(again)
    leaf.close()
    leaf = open_leaf(str(path), read_only=True)
    assert leaf.backing == again
    assert read(leaf, 0, CLUSTER, b"") == pattern(0, CLUSTER, 1)
    leaf.close()
    shown = run(["qemu-img", "info", "-f", "qed", path])
    assert "backing file: nbd://elsewhere/x" in shown
