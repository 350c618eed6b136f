# SPDX-License-Identifier: Apache-2.0
"""What a qcow2 header says (features, extensions, names): kept, or refused by name."""

from dataclasses import replace
from pathlib import Path

import pytest

from nbdstream.errors import LeafFormatError, LeafUnsupportedError
from nbdstream.leaf import open_leaf
from nbdstream.leaf.base import BackingReference, CheckResult
from nbdstream.leaf.qcow2.leaf import Qcow2Leaf
from testbed.leaves import flush
from testbed.peers import run
from tests.leaf_support import (
    BACKING,
    by_qemu,
    ours,
    qemu_check,
    read,
    write,
    zero,
)
from tests.qcow2_qemu import SIZE, backing_file, info, local, qemu_io, read_header_of

backing = pytest.fixture(backing_file)


def test_the_record_of_the_backing_survives_others_but_not_another_name(
    tmp_path: Path, backing: bytes
) -> None:
    path = tmp_path / "disk.qcow2"
    mine = local(tmp_path)
    ours("qcow2").make(path, SIZE, mine)
    run(["qemu-img", "amend", "-f", "qcow2", "-o", "lazy_refcounts=off", path])
    leaf = open_leaf(str(path))
    assert leaf.backing == mine
    assert leaf.describe()["lazy-refcounts"] is False
    leaf.close()
    run(["qemu-img", "rebase", "-u", "-b", "nbd://elsewhere/disk", "-F", "raw", path])
    leaf = open_leaf(str(path))
    assert leaf.backing == BackingReference("nbd://elsewhere/disk", "raw", 0, "")
    leaf.close()
    run(["qemu-img", "rebase", "-u", "-b", mine.uri, "-F", "raw", path])
    leaf = open_leaf(str(path))
    assert leaf.backing == mine
    zero(leaf, 0, SIZE)
    flush(leaf)
    leaf.drop_backing()
    leaf.close()
    assert "backing-filename" not in info(path)


@pytest.mark.parametrize("cluster", [512, 1024, 4096, 65536])
def test_names_of_all_lengths(cluster: int, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    ours("qcow2", cluster).make(path, 1 << 20, BACKING)
    leaf = open_leaf(str(path))
    last = BACKING
    for length in (1, 20, 300, 700, 1023, 5):
        reference = replace(BACKING, uri="ä" * (length // 2) + "x" * (length % 2))
        try:
            leaf.record_backing(reference)
        except LeafUnsupportedError:
            assert cluster < 4096
        else:
            last = reference
        assert leaf.backing == last
    with pytest.raises(LeafUnsupportedError, match="1023"):
        leaf.record_backing(BackingReference("x" * 1024))
    leaf.close()
    leaf = open_leaf(str(path), read_only=True)
    assert leaf.backing == last
    leaf.close()
    assert info(path)["backing-filename"] == last.uri


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_unknown_extensions_and_features_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    ours("qcow2").make(path, SIZE, None)
    header = read_header_of(path)
    end = header.used - 8  # the end mark
    unknown = bytes.fromhex("12345678 00000005") + b"hello\0\0\0" + bytes(8)
    patch(path, end, unknown)
    patch(path, 80, (0x8001).to_bytes(8, "big"))  # compatible: lazy refcounts, and one unknown
    patch(path, 88, (0x80).to_bytes(8, "big"))  # autoclear
    leaf = open_leaf(str(path), read_only=True)
    leaf.close()
    header = read_header_of(path)
    assert header.autoclear_features == 0x80
    header = replace(header, autoclear_features=0)
    leaf = open_leaf(str(path))
    assert isinstance(leaf, Qcow2Leaf)
    leaf.replace_header(header.with_backing(BACKING))
    leaf.close()
    header = read_header_of(path)
    assert header.extension(0x12345678) == b"hello"
    assert header.compatible_features == 0x8001
    assert header.autoclear_features == 0
    qemu_check(path, "qcow2")


def test_version_2_is_read_as_it_is_and_written_as_version_3(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    by_qemu("qcow2", "compat=0.10").make(path, SIZE, BACKING)
    before = path.read_bytes()
    leaf = open_leaf(str(path), read_only=True)
    assert leaf.describe()["compat"] == "0.10"
    leaf.close()
    assert path.read_bytes() == before
    leaf = open_leaf(str(path))
    assert leaf.describe()["compat"] == "1.1"
    assert leaf.backing is not None and leaf.backing.uri == BACKING.uri
    leaf.close()
    assert info(path)["format-specific"]["data"]["compat"] == "1.1"


def refused(path: Path, match: str, *, read_only: bool) -> None:
    before = path.read_bytes()
    with pytest.raises((LeafUnsupportedError, LeafFormatError), match=match) as caught:
        open_leaf(str(path), read_only=read_only, format="qcow2")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_features_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    secret = ["--object", "secret,id=s,data=abc"]
    aes = "encrypt.format=aes,encrypt.key-secret=s"
    for options, match in (
        ([*secret, "-o", aes], "encryption"),
        (["-o", f"data_file={tmp_path / 'data'}"], "external data file"),
    ):
        run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, "1M"])
        for read_only in (False, True):
            refused(path, match, read_only=read_only)
    ours("qcow2").make(tmp_path / "new", SIZE, BACKING)
    table = (tmp_path / "new").read_bytes().index(b"dirty bit")
    patch(tmp_path / "new", table - 1, b"\x11quantum clusters\0")
    patch(tmp_path / "new", 72, (1 << 17 | 1 << 40 | 16).to_bytes(8, "big"))
    for read_only in (False, True):
        refused(tmp_path / "new", "quantum clusters, bit 40", read_only=read_only)


def test_snapshots_and_corruption_are_refused_on_write_only(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    by_qemu("qcow2", "cluster_size=4k").make(path, SIZE, None)
    qemu_io(path, "write -P 1 0 100k")
    run(["qemu-img", "snapshot", "-c", "before", path])
    qemu_io(path, "write -P 2 50k 100k")
    refused(path, "1 internal snapshots", read_only=False)
    leaf = open_leaf(str(path), read_only=True)
    assert read(leaf, 0, 160 << 10, b"") == b"\1" * 51200 + b"\2" * 102400 + bytes(10240)
    assert leaf.check(repair=False).errors == 0
    leaf.close()
    run(["qemu-img", "snapshot", "-d", "before", path])
    leaf = open_leaf(str(path))
    write(leaf, 0, b"\3" * 4096)
    leaf.close()
    qemu_check(path, "qcow2")
    patch(path, 72, (2).to_bytes(8, "big"))
    refused(path, "marked corrupt", read_only=False)
    open_leaf(str(path), read_only=True).close()


def test_persistent_bitmaps_are_dropped_by_a_write(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    by_qemu("qcow2", "cluster_size=64k").make(path, SIZE, None)
    for name in ("one", "two"):
        run(["qemu-img", "bitmap", "--add", path, name])
    qemu_io(path, "write -P 1 0 1M")
    leaf = open_leaf(str(path), read_only=True)
    assert leaf.check(repair=False) == CheckResult()
    leaf.close()
    assert len(info(path)["format-specific"]["data"]["bitmaps"]) == 2
    leaf = open_leaf(str(path))
    write(leaf, 0, b"\3" * 65536)
    leaf.close()
    qemu_check(path, "qcow2")
    assert "bitmaps" not in info(path)["format-specific"]["data"]
