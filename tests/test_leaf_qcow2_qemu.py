# SPDX-License-Identifier: Apache-2.0
"""qcow2 and QEMU on the same image, taking turns; and what QEMU says about it meanwhile."""

import json
import random
import re
from pathlib import Path

import pytest

from nbdstream.leaf import open_leaf
from nbdstream.leaf.base import CheckResult, State
from testbed.leaves import flush
from testbed.peers import run
from tests.leaf_support import (
    ImageKind,
    by_qemu,
    extents,
    guest_write,
    ours,
    pattern,
    plain,
    qemu_check,
    read,
    write,
    zero,
)
from tests.qcow2_qemu import SIZE, assert_same, backing_file, info, local, qemu_io, read_header_of

backing = pytest.fixture(backing_file)


# -- taking turns ----------------------------------------------------------------------

TURNS = [
    ours("qcow2"),
    ours("qcow2", 2 << 20),
    plain(4096),
    by_qemu("qcow2", "compat=0.10"),
    by_qemu("qcow2", "extended_l2=on,cluster_size=16k"),
    by_qemu("qcow2", "refcount_bits=1,cluster_size=512"),
    by_qemu("qcow2", "refcount_bits=64,cluster_size=4k,lazy_refcounts=on"),
    by_qemu("qcow2", "compression_type=zstd"),
]


@pytest.mark.parametrize("kind", TURNS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_taking_turns(kind: ImageKind, seed: int, tmp_path: Path, backing: bytes) -> None:
    """At any moment the server can be stopped and QEMU goes on, and the other way round."""
    rng = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    kind.make(path, SIZE, local(tmp_path))
    visible = bytearray(backing)
    for turn in range(6):
        (our_turn if turn % 2 == 0 else qemus_turn)(path, visible, rng)
        qemu_check(path, "qcow2")
        assert_same(path, visible)
    # Chain, size and content as a whole, seen by both.
    chain = json.loads(run(["qemu-img", "info", "--backing-chain", "--output=json", path]))
    assert [image["format"] for image in chain] == ["qcow2", "raw"]
    leaf = open_leaf(str(path), read_only=True)
    assert read(leaf, 0, SIZE, backing) == visible
    leaf.close()


def our_turn(path: Path, visible: bytearray, rng: random.Random) -> None:
    backing = (path.parent / "base.raw").read_bytes()
    leaf = open_leaf(str(path))
    for _ in range(12):
        action = rng.randrange(4)
        offset, length = some_range(rng)
        if action == 0:
            unit = leaf.cluster_size  # as a part of a compressed one cannot be zeroed
            offset = offset // unit * unit
            length = min(-(-length // unit) * unit, SIZE - offset)
            zero(leaf, offset, length, unmap=rng.random() < 0.5)
            visible[offset : offset + length] = bytes(length)
        elif action == 1:
            flush(leaf)
        else:
            data = rng.randbytes(length)
            guest_write(leaf, offset, data, backing)
            visible[offset : offset + length] = data
    leaf.close()


def qemus_turn(path: Path, visible: bytearray, rng: random.Random) -> None:
    facts = info(path)
    cluster = facts["cluster-size"]
    # Where compressed clusters share a host cluster, its refcount is more than one.
    compress = cluster > 512 and facts["format-specific"]["data"]["refcount-bits"] > 1
    commands = []
    for _ in range(10):
        offset, length = some_range(rng)
        byte = rng.randrange(1, 256)
        command = f"write -P {byte}"
        if compress and rng.random() < 0.3:
            offset = offset // cluster * cluster
            length = min(cluster, SIZE - offset)
            command += " -c"
        elif rng.random() < 0.4:
            byte = 0
            command = "write -z" + (" -u" if rng.random() < 0.5 else "")
        commands.append((f"{command} {offset} {length}", offset, length, byte))
    arguments: list[str | Path] = ["qemu-io", "-f", "qcow2"]
    for command, *_ in commands:
        arguments += ["-c", command]
    output = run([*arguments, path], check=False)
    results = re.findall("^(wrote|write failed)", output, re.MULTILINE)
    for result, (command, offset, length, byte) in zip(results, commands, strict=True):
        if result == "wrote":
            visible[offset : offset + length] = bytes([byte]) * length
        else:  # QEMU writes compressed data only where nothing is allocated
            assert " -c" in command, output


def some_range(rng: random.Random) -> tuple[int, int]:
    """Offset and length, of whole sectors."""
    length = rng.choice((1, 3, 8, 50, 300)) * 512
    return rng.randrange(0, SIZE - length, 512), length


# -- compressed clusters ---------------------------------------------------------------


@pytest.mark.parametrize(
    "options", ["", "compression_type=zstd", "extended_l2=on,cluster_size=64k"]
)
def test_compressed_clusters(options: str, tmp_path: Path) -> None:
    rng = random.Random(7)
    # Compressible, a little different everywhere; the last cluster is short.
    content = b"".join(rng.randbytes(40) * 100 for _ in range(700))[:2_600_448]
    (tmp_path / "plain.raw").write_bytes(content)
    path = tmp_path / "disk.qcow2"
    command: list[str | Path] = ["qemu-img", "convert", "-c", "-O", "qcow2"]
    if options:
        command += ["-o", options]
    run([*command, tmp_path / "plain.raw", path])
    leaf = open_leaf(str(path))
    assert {extent.state for extent in extents(leaf)} == {State.COMPRESSED}
    assert read(leaf, 0, leaf.size, b"") == content
    assert read(leaf, 70_000, 1000, b"") == content[70_000:71_000]
    # Overwritten, each in its way: whole clusters, parts of one, zeroes, the last one.
    visible = bytearray(content)
    cluster = leaf.cluster_size
    for offset, data in ((cluster, pattern(0, 2 * cluster)), (cluster * 7 + 100, b"x" * 600)):
        guest_write(leaf, offset, data, b"")
        visible[offset : offset + len(data)] = data
    zero(leaf, 10 * cluster, cluster)
    visible[10 * cluster : 11 * cluster] = bytes(cluster)
    guest_write(leaf, leaf.size - 512, b"y" * 512, b"")
    visible[-512:] = b"y" * 512
    assert read(leaf, 0, leaf.size, b"") == visible
    with pytest.raises(ValueError, match="cuts"):
        leaf.zero(12 * cluster, cluster // 2, unmap=True)
    with pytest.raises(ValueError, match="part of a block"):
        leaf.write(12 * cluster, memoryview(bytes(cluster // 2)))
    leaf.close()
    qemu_check(path, "qcow2")
    assert_same(path, visible)


def test_damaged_compressed_data_is_an_error_not_data(tmp_path: Path) -> None:
    (tmp_path / "plain.raw").write_bytes(b"some text, again and again" * 50_000)
    path = tmp_path / "disk.qcow2"
    run(["qemu-img", "convert", "-c", "-O", "qcow2", tmp_path / "plain.raw", path])
    leaf = open_leaf(str(path), read_only=True)
    first = extents(leaf)[0]
    for damage in (b"\xff" * 64, bytes(512)):
        with path.open("r+b") as file:
            file.seek(first.host & ((1 << 54) - 1))
            file.write(damage)
        with pytest.raises(OSError, match="compressed cluster at"):
            leaf.read(first, memoryview(bytearray(first.length)))
    leaf.close()


# -- crashes, told to each other -------------------------------------------------------


@pytest.mark.parametrize("kind", TURNS, ids=str)
def test_qemu_repairs_what_we_left(kind: ImageKind, tmp_path: Path, backing: bytes) -> None:
    path, left = tmp_path / "disk.qcow2", tmp_path / "left.qcow2"
    kind.make(path, SIZE, local(tmp_path))
    leaf = open_leaf(str(path))
    data = pattern(0, 1 << 20, 3)
    write(leaf, 1 << 20, data)
    flush(leaf)
    zero(leaf, 1 << 20, 512 << 10)
    left.write_bytes(path.read_bytes())  # as if we had died here
    leaf.close()
    qemu_io(left, "write -P 9 0 64k", options="driver=qcow2,lazy-refcounts=off")
    qemu_check(left, "qcow2")
    assert_same(left, b"\x09" * 65536 + backing[65536 : 1 << 20] + data + backing[2 << 20 :])


@pytest.mark.parametrize("kind", TURNS, ids=str)
def test_we_repair_what_qemu_left(kind: ImageKind, tmp_path: Path, backing: bytes) -> None:
    path = tmp_path / "disk.qcow2"
    kind.make(path, SIZE, local(tmp_path))
    commands = ["write -P 5 64k 300k", "flush", "write -P 6 1M 200k", "flush", "sigraise 9"]
    arguments: list[str | Path] = ["qemu-io", "--image-opts"]
    for command in commands:
        arguments += ["-c", command]
    if kind.name != "qemu-qcow2-compat=0.10":
        run([*arguments, f"driver=qcow2,lazy-refcounts=on,file.filename={path}"], check=False)
        assert read_header_of(path).dirty
    visible = bytearray(backing)
    if read_header_of(path).dirty:
        visible[64 << 10 : 364 << 10] = b"\5" * (300 << 10)
        visible[1 << 20 : (1 << 20) + (200 << 10)] = b"\6" * (200 << 10)
    leaf = open_leaf(str(path))
    assert leaf.check(repair=False) == CheckResult()
    assert read(leaf, 0, SIZE, backing) == visible
    write(leaf, 0, b"\7" * leaf.cluster_size)
    visible[: leaf.cluster_size] = b"\7" * leaf.cluster_size
    leaf.close()
    qemu_check(path, "qcow2")
    assert_same(path, visible)


# -- refcounts ------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_every_refcount_width(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    by_qemu("qcow2", f"refcount_bits={bits},cluster_size=1k").make(path, SIZE, None)
    visible = bytearray(SIZE)
    rng = random.Random(bits)
    for _ in range(3):
        leaf = open_leaf(str(path))
        for _ in range(20):
            offset, count = rng.randrange(2900) * 1024, rng.randrange(1, 100)
            data = pattern(offset, count * 1024, rng.randrange(100))
            if rng.random() < 0.4:
                data = bytes(len(data))
                zero(leaf, offset, len(data))
            else:
                write(leaf, offset, data)
            visible[offset : offset + len(data)] = data
        assert leaf.describe()["refcount-bits"] == bits
        leaf.close()
        qemu_check(path, "qcow2")
    assert_same(path, visible)


def test_the_refcount_table_moves_when_it_has_to_grow(tmp_path: Path) -> None:
    """64-bit refcounts and clusters of 512 bytes: 32 KiB for each of the table's entries."""
    path = tmp_path / "disk.qcow2"
    by_qemu("qcow2", "refcount_bits=64,cluster_size=512").make(path, 16 << 20, None)
    before = read_header_of(path)
    leaf = open_leaf(str(path))
    visible = bytearray(16 << 20)
    for number in range(10):
        data = pattern(0, 1 << 20, number + 1)
        write(leaf, number << 20, data)
        visible[number << 20 : (number + 1) << 20] = data
        if number % 3 == 0:
            flush(leaf)
    zero(leaf, 0, 1 << 20)
    visible[: 1 << 20] = bytes(1 << 20)
    leaf.close()
    after = read_header_of(path)
    assert after.refcount_table_offset != before.refcount_table_offset
    assert after.refcount_table_clusters > before.refcount_table_clusters
    qemu_check(path, "qcow2")
    assert_same(path, visible)
    # What was given back is used again: the file does not grow for what fits there.
    size = path.stat().st_size
    leaf = open_leaf(str(path))
    for at in range(0, 512 << 10, 512):
        write(leaf, at, pattern(at, 512, 9))
    leaf.close()
    assert path.stat().st_size == size
    qemu_check(path, "qcow2")
