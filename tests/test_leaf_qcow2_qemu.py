# SPDX-License-Identifier: Apache-2.0
"""qcow2 and QEMU on the same image, taking turns; and what QEMU says about it meanwhile."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdstream.errors import LeafFormatError, LeafUnsupportedError
from nbdstream.leaf import open_leaf
from nbdstream.leaf.base import BackingReference, CheckResult, State
from nbdstream.leaf.qcow2.header import Header
from nbdstream.leaf.qcow2.header_file import read_header
from nbdstream.leaf.qcow2.leaf import Qcow2Leaf
from testbed.leaves import flush
from testbed.peers import run
from tests.leaf_support import (
    BACKING,
    ImageKind,
    by_qemu,
    extents,
    guest_write,
    ours,
    pattern,
    qemu_check,
    read,
    write,
    zero,
)
from tests.test_leaf_qcow2 import plain

SIZE = 3 << 20


def qemu_io(path: Path, *commands: str, options: str = "driver=qcow2") -> None:
    """Run qemu-io commands on an image without its backing."""
    arguments: list[str | Path] = ["qemu-io", "--image-opts"]
    for command in commands:
        arguments += ["-c", command]
    output = run([*arguments, f"{options},backing=,file.filename={path}"])
    assert "failed" not in output, output


def info(path: Path) -> dict[str, Any]:
    found = json.loads(run(["qemu-img", "info", "--output=json", path]))
    assert isinstance(found, dict)
    return found


@pytest.fixture
def backing(tmp_path: Path) -> bytes:
    """A backing's content, also as the raw image base.raw."""
    content = random.Random(5).randbytes(SIZE)
    (tmp_path / "base.raw").write_bytes(content)
    return content


def local(tmp_path: Path) -> BackingReference:
    return BackingReference(str(tmp_path / "base.raw"), "raw", SIZE, "sha256:00")


def assert_same(path: Path, expected: bytes | bytearray) -> None:
    """``qemu-img compare``: the image, over its backing, against plain bytes."""
    (path.parent / "expected.raw").write_bytes(expected)
    command = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw"]
    run([*command, path, path.parent / "expected.raw"])


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


# -- the header ------------------------------------------------------------------------


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


def read_header_of(path: Path) -> Header:
    with path.open("rb") as file:
        return read_header(file.fileno(), str(path))


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


# -- what is refused -------------------------------------------------------------------


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
