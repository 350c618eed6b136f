# SPDX-License-Identifier: Apache-2.0
"""QED leaves: the common suite, and what is their own."""

import logging
import os
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdstream.errors import LeafError, LeafFormatError, LeafUnsupportedError, UsageError
from nbdstream.leaf import create_leaf, open_leaf
from nbdstream.leaf.base import BackingReference, FlushNeeded, Leaf, State
from nbdstream.leaf.durability import Syncs
from nbdstream.leaf.qed.check import check_image
from nbdstream.leaf.qed.header import NEED_CHECK, Header, read_header
from testbed.leaves import flush
from testbed.peers import run
from tests.journal import recording
from tests.leaf_conformance import LeafConformance
from tests.leaf_model import model_test
from tests.leaf_support import (
    BACKING,
    ImageKind,
    by_qemu,
    extents,
    guest_write,
    ours,
    pattern,
    qemu_check,
    qemu_check_report,
    read,
    write,
    zero,
)
from tests.powercut import Disk

KINDS = [
    ours("qed"),
    ours("qed", 4096, size_most=256 << 30),
    # QEMU creates images with a table size of 1, but does not open them.
    by_qemu("qed", "cluster_size=4096,table_size=2", size_most=4 << 30),
    by_qemu("qed", "cluster_size=64k,table_size=16"),
    by_qemu("qed", "cluster_size=1M,table_size=2"),
]
SMALL = by_qemu("qed", "cluster_size=4096,table_size=2")  # a table stands for 4 MiB
CLUSTER = 4096
SIZE = 12 << 20


class TestQed(LeafConformance):
    @pytest.fixture(params=KINDS, ids=str)
    def kind(self, request: Any) -> ImageKind:
        assert isinstance(request.param, ImageKind)
        return request.param


TestQedModel = model_test(ours("qed", 4096))
TestQedLargeClusterModel = model_test(by_qemu("qed", "cluster_size=64k,table_size=2"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An image of three tables, with some data under each, closed clean."""
    path = tmp_path / "disk.qed"
    leaf = SMALL.new(path, SIZE)
    for table in range(3):
        for cluster in (0, 1, 5, 600):
            offset = (table << 22) + cluster * CLUSTER
            write(leaf, offset, pattern(offset, CLUSTER, 1))
    zero(leaf, 2 * CLUSTER, CLUSTER)
    leaf.close()
    return path


def header_of(path: Path) -> Header:
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(fd)
    finally:
        os.close(fd)


def set_field(path: Path, offset: int, format_code: str, *values: int) -> None:
    with path.open("r+b") as image:
        image.seek(offset)
        image.write(struct.pack("<" + format_code, *values))


def l1_entry(path: Path, index: int) -> int:
    """The offset in the file of an L1 entry."""
    return header_of(path).l1_table_offset + 8 * index


def l2_entry(path: Path, index: int) -> int:
    """The offset in the file of an entry of the first L2 table."""
    data = path.read_bytes()
    (table,) = struct.unpack_from("<Q", data, l1_entry(path, 0))
    return int(table) + 8 * index


def need_check(path: Path) -> bool:
    return bool(header_of(path).features & NEED_CHECK)


def qemu_io(path: Path, *commands: str) -> str:
    arguments = [argument for command in commands for argument in ("-c", command)]
    image = f"driver=qed,backing=,file.driver=file,file.filename={path}"
    return run(["qemu-io", *arguments, "--image-opts", image])


# -- NEED_CHECK ---------------------------------------------------------------------------------


def test_need_check_is_set_while_there_is_a_need(path: Path) -> None:
    leaf = open_leaf(str(path))
    assert read(leaf, 0, CLUSTER, b"") == pattern(0, CLUSTER, 1)
    write(leaf, 0, pattern(0, CLUSTER, 2))
    assert not need_check(path), "nothing was allocated"
    write(leaf, 7 * CLUSTER, pattern(0, CLUSTER, 2))
    assert need_check(path)
    flush(leaf)
    assert need_check(path)
    leaf.close()
    assert not need_check(path)


def test_need_check_asked_for_during_a_flush_takes_another_one(path: Path) -> None:
    leaf = open_leaf(str(path))
    rest = leaf.begin_flush()
    with pytest.raises(FlushNeeded):
        leaf.write(7 * CLUSTER, memoryview(bytes(CLUSTER)))
    rest()
    leaf.end_flush(ok=True)
    assert leaf.dirty and not need_check(path)
    write(leaf, 7 * CLUSTER, pattern(0, CLUSTER, 2))
    assert need_check(path)
    leaf.close()


def crashed_copy(path: Path, leaf: Leaf) -> Path:
    """The image as it is now, in another place: its process crashed, the system did not."""
    copy = path.with_name("crashed.qed")
    shutil.copyfile(path, copy)
    leaf.close()
    return copy


def test_a_crashed_image_is_repaired_when_opened(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leaf = open_leaf(str(path))
    write(leaf, 8 * CLUSTER, pattern(0, CLUSTER, 3))
    flush(leaf)
    write(leaf, 9 * CLUSTER, pattern(0, CLUSTER, 3))  # never flushed: a leak
    copy = crashed_copy(path, leaf)
    before = copy.read_bytes()
    reader = open_leaf(str(copy), read_only=True)
    assert reader.check(repair=False).leaks == 1
    reader.close()
    assert copy.read_bytes() == before
    with caplog.at_level(logging.WARNING):
        leaf = open_leaf(str(copy))
    assert "was not closed clean: checked it, leaked clusters: 1" in caplog.text
    assert leaf.check(repair=False) == leaf.check(repair=True)
    assert read(leaf, 8 * CLUSTER, CLUSTER, b"") == pattern(0, CLUSTER, 3)
    assert extents(leaf, 9 * CLUSTER, CLUSTER)[0].state is State.UNALLOCATED
    leaf.close()
    qemu_check(copy, "qed")


# -- check and repair ---------------------------------------------------------------------------


def leaky(path: Path) -> list[int]:
    """Make leaks of three data clusters that lie in the middle; returns their guest offsets."""
    lost = [5 * CLUSTER, 1 * CLUSTER, 600 * CLUSTER]
    for offset in lost:
        set_field(path, l2_entry(path, offset // CLUSTER), "Q", 0)
    return lost


def test_a_repair_gives_leaks_in_the_middle_back(path: Path) -> None:
    leaf = open_leaf(str(path), read_only=True)
    visible = bytearray(read(leaf, 0, SIZE, b""))
    leaf.close()
    for offset in leaky(path):
        visible[offset : offset + CLUSTER] = bytes(CLUSTER)
    size = path.stat().st_size
    leaf = open_leaf(str(path))
    assert leaf.check(repair=False).leaks == 3
    result = leaf.check(repair=True)
    assert (result.errors, result.leaks, result.repaired) == (0, 3, 3)
    assert leaf.check(repair=False).leaks == 0
    assert read(leaf, 0, SIZE, b"") == visible
    leaf.close()
    assert path.stat().st_size == size - 3 * CLUSTER
    qemu_check(path, "qed")


def test_a_power_cut_during_a_repair_loses_nothing(path: Path, tmp_path: Path) -> None:
    leaky(path)
    set_field(path, 16, "Q", header_of(path).features | NEED_CHECK)
    home = tmp_path / "home"
    home.mkdir()
    image = Path(shutil.copy(path, home))
    with recording(home) as journal:
        leaf = open_leaf(str(image))
        visible = read(leaf, 0, SIZE, b"")
        leaf.close()
    assert len(journal.operations) > 8
    rng = random.Random(3)
    disk = Disk(journal)
    for operation in journal.operations:
        disk.advance(operation)
        for _ in range(25):
            image.write_bytes(disk.survivors(rng)["disk.qed"])
            leaf = open_leaf(str(image))
            assert read(leaf, 0, SIZE, b"") == visible
            assert leaf.check(repair=False) == leaf.check(repair=True)
            leaf.close()


def test_a_new_table_is_empty_whatever_was_there(tmp_path: Path) -> None:
    """A failed write leaves its bytes behind the last cluster, where the next table goes."""
    path = tmp_path / "disk.qed"
    leaf = SMALL.new(path, SIZE)
    write(leaf, 0, pattern(0, CLUSTER, 1))
    with recording(tmp_path) as journal:
        journal.room = 3 * CLUSTER + 100
        with pytest.raises(OSError, match="full"):
            write(leaf, CLUSTER, b"\x01" * (5 * CLUSTER))
    write(leaf, 4 << 20, pattern(0, CLUSTER, 2))
    flush(leaf)
    for now in (leaf, None):
        if now is None:
            leaf.close()
            now = open_leaf(str(path), read_only=True)
        states = [(e.offset, e.length) for e in extents(now) if e.state is not State.UNALLOCATED]
        assert states == [(0, CLUSTER), (4 << 20, CLUSTER)]
        now.close()
    qemu_check(path, "qed")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a data cluster beyond the file": lambda p: set_field(p, l2_entry(p, 1), "Q", 1 << 40),
    "an unaligned data cluster": lambda p: set_field(p, l2_entry(p, 1), "Q", 5 * CLUSTER + 512),
    "a data cluster in the header": lambda p: set_field(p, l2_entry(p, 1), "Q", 2),
    "a data cluster used twice": lambda p: set_field(
        p, l2_entry(p, 1), "Q", struct.unpack_from("<Q", p.read_bytes(), l2_entry(p, 0))[0]
    ),
    "a data cluster in the L1 table": lambda p: set_field(
        p, l2_entry(p, 1), "Q", header_of(p).l1_table_offset
    ),
    "a table beyond the file": lambda p: set_field(p, l1_entry(p, 2), "Q", 1 << 40),
    "an unaligned table": lambda p: set_field(p, l1_entry(p, 1), "Q", 5 * CLUSTER + 8),
    "a table used twice": lambda p: set_field(
        p, l1_entry(p, 1), "Q", struct.unpack_from("<Q", p.read_bytes(), l1_entry(p, 0))[0]
    ),
    "a table that is the L1 table": lambda p: set_field(
        p, l1_entry(p, 1), "Q", header_of(p).l1_table_offset
    ),
    "an L1 entry behind the disk's end": lambda p: set_field(p, l1_entry(p, 9), "Q", 1 << 40),
    "leaks": lambda p: (leaky(p), None)[1],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_check_counts_as_qemu_does(path: Path, damage: Callable[[Path], None]) -> None:
    damage(path)
    before = path.read_bytes()
    _, report = qemu_check_report(path, "qed")
    fd = os.open(path, os.O_RDONLY)
    result = check_image(fd, read_header(fd), Syncs("it"), repair=False)
    os.close(fd)
    assert result.errors == report.get("corruptions", 0)
    # With errors about, what is a leak and what is only called so depends on the order.
    if not result.errors:
        assert result.leaks == report.get("leaks", 0)
    assert result.errors or result.leaks
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_noticed_and_left_alone(path: Path, damage: Callable[[Path], None]) -> None:
    """Reading or writing through a damaged entry is refused; the image stays as it is."""
    damage(path)
    before = path.read_bytes()
    try:
        leaf = open_leaf(str(path))
    except LeafFormatError as error:
        assert str(path) in str(error)
    else:
        try:
            extents(leaf)
        except LeafFormatError as error:
            named = re.search(r"guest offsets? (?:from )?(0x[0-9a-f]+)", str(error))
            assert named is not None
            with pytest.raises(LeafFormatError):
                write(leaf, int(named[1], 16), pattern(0, CLUSTER, 1))
        leaf.close()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "name", ["a data cluster beyond the file", "a table beyond the file", "leaks"]
)
def test_a_crashed_image_with_invalid_offsets_is_repaired(path: Path, name: str) -> None:
    """What QEMU may leave behind: entries whose clusters never made it to the file."""
    DAMAGE[name](path)
    set_field(path, 16, "Q", header_of(path).features | NEED_CHECK)
    leaf = open_leaf(str(path))
    assert leaf.check(repair=False).errors == 0
    assert read(leaf, 0, CLUSTER, b"") == pattern(0, CLUSTER, 1)
    leaf.close()
    qemu_check(path, "qed")


@pytest.mark.parametrize(
    "name", ["an unaligned data cluster", "a data cluster in the header", "an unaligned table"]
)
def test_damage_that_no_crash_leaves_is_not_repaired_unasked(path: Path, name: str) -> None:
    DAMAGE[name](path)
    set_field(path, 16, "Q", header_of(path).features | NEED_CHECK)
    before = path.read_bytes()
    with pytest.raises(LeafFormatError, match=r"not by a crash: the entry at .*check --repair"):
        open_leaf(str(path))
    assert path.read_bytes() == before
    leaf = open_leaf(str(path), read_only=True)
    assert read(leaf, 0, CLUSTER, b"") == pattern(0, CLUSTER, 1)
    leaf.close()
    leaf = open_leaf(str(path), repair=True)
    result = leaf.check(repair=True)
    assert result.errors == 1 and result.repaired >= 1
    assert sum("leaked" in message for message in result.messages) <= 1
    assert leaf.check(repair=False).errors == 0
    assert leaf.check(repair=True).repaired == 0
    leaf.close()
    status, report = qemu_check_report(path, "qed")
    assert status in (0, 3), report  # a table at the end cannot move: leaks may be left


@pytest.mark.parametrize("name", ["a data cluster used twice", "a table used twice"])
def test_a_crashed_image_beyond_repair_is_refused(path: Path, name: str) -> None:
    DAMAGE[name](path)
    set_field(path, 16, "Q", header_of(path).features | NEED_CHECK)
    before = path.read_bytes()
    with pytest.raises(LeafFormatError, match="beyond repair"):
        open_leaf(str(path))
    assert path.read_bytes() == before


# -- headers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "code", "value", "message"),
    [
        (4, "I", 0, "cluster size 0"),
        (4, "I", 2048, "cluster size 2048"),
        (4, "I", 4097, "cluster size 4097"),
        (4, "I", 1 << 31, "cluster size"),
        (8, "I", 0, "table size 0"),
        (8, "I", 3, "table size 3"),
        (8, "I", 32, "table size 32"),
        (12, "I", 0, "header size 0"),
        (12, "I", 1 << 31, "L1 table"),
        (40, "Q", 0, "L1 table"),
        (40, "Q", 4097, "L1 offset 4097"),
        (40, "Q", 1 << 63, "L1 table"),
        (48, "Q", 0, "image size 0"),
        (48, "Q", 513, "image size 513"),
        (48, "Q", (1 << 64) - 512, "image size"),
        (56, "I", (1 << 32) - 1, "backing name"),
        (60, "I", (1 << 32) - 1, "backing name"),
        (60, "I", 1024, "backing name"),
    ],
)
def test_bad_header_fields(path: Path, offset: int, code: str, value: int, message: str) -> None:
    set_field(path, offset, code, value)
    before = path.read_bytes()
    for read_only in (True, False):
        with pytest.raises(LeafFormatError, match=message):
            open_leaf(str(path), read_only=read_only)
    assert path.read_bytes() == before


def test_feature_bits(path: Path) -> None:
    set_field(path, 24, "QQ", 1 << 7, 1 << 9)  # compatible: kept; self-clearing: cleared
    open_leaf(str(path)).close()
    assert (header_of(path).compat_features, header_of(path).autoclear_features) == (1 << 7, 0)
    set_field(path, 16, "Q", header_of(path).features | 0x30)
    with pytest.raises(LeafUnsupportedError, match="feature bits 0x30"):
        open_leaf(str(path))


def test_truncated_images(path: Path) -> None:
    content = path.read_bytes()
    for length in [*range(64), *range(64, len(content), 509)]:
        path.write_bytes(content[:length])
        try:
            leaf = open_leaf(str(path), format="qed")
        except LeafError:
            pass
        else:
            try:
                read(leaf, 0, SIZE, b"")
            except LeafFormatError:
                pass
            leaf.close()
        assert path.read_bytes() == content[:length]


def test_noise_in_header_and_tables(path: Path) -> None:
    """Whatever is in the image: an error that says so, or some content; never a change."""
    content = path.read_bytes()
    rng = random.Random(4)
    for _ in range(600):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 5)):
            where = rng.choice((rng.randrange(4, 64), rng.randrange(CLUSTER, 6 * CLUSTER)))
            damaged[where] = rng.choice((0, 1, 255, rng.randrange(256)))
        struct.pack_into("<Q", damaged, 16, damaged[16] & 5)  # without NEED_CHECK
        struct.pack_into("<Q", damaged, 32, 0)
        path.write_bytes(damaged)
        try:
            leaf = open_leaf(str(path), format="qed")
        except LeafError:
            pass
        else:
            try:
                for extent in list(leaf.extents(0, min(leaf.size, 1 << 30))):
                    if extent.state is State.DATA:
                        leaf.read(extent, memoryview(bytearray(min(extent.length, 4096))))
            except LeafFormatError:
                pass
            leaf.check(repair=False)
            leaf.close()
        assert path.read_bytes() == damaged


def test_a_hostile_image_is_not_taken_at_its_word(tmp_path: Path) -> None:
    """A sparse file of an absurd size, with tables spread all over it."""
    path = tmp_path / "hostile.qed"
    header = Header(4096, 16, 1, 0, 0, 0, 4096, 1 << 38)
    with path.open("wb") as image:
        image.write(header.pack())
        image.truncate(1 << 43)
        image.seek(4096)
        image.write(b"".join(struct.pack("<Q", (i + 1) << 25) for i in range(8192)))
    leaf = open_leaf(str(path))
    assert len(extents(leaf)) <= 8192
    assert leaf.check(repair=False).leaks > 1 << 30
    leaf.close()


def test_a_size_is_rounded_up_to_whole_sectors(tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    create_leaf(path, format="qed", size=1000, cluster_size=None, backing=None)
    leaf = open_leaf(path)
    assert leaf.size == 1024
    leaf.close()


def test_sizes_that_qed_cannot_have(tmp_path: Path) -> None:
    def create(size: int, cluster_size: int | None) -> None:
        create_leaf(
            str(tmp_path / "x"),
            format="qed",
            size=size,
            cluster_size=cluster_size,
            backing=BACKING,
        )

    for size, cluster_size in ((1 << 62, 4096), (1 << 20, 5000), (1 << 20, 2048)):
        with pytest.raises(UsageError):
            create(size, cluster_size)
    with pytest.raises(LeafError, match="1023 bytes"):
        create_leaf(
            str(tmp_path / "x"),
            format="qed",
            size=1 << 20,
            cluster_size=None,
            backing=BackingReference("nbd://" + "x" * 1024),
        )
    assert list(tmp_path.iterdir()) == []
    create(256 << 30, 4096)  # needs the largest tables there are
    assert header_of(tmp_path / "x").table_size == 16


# -- QEMU and the image -------------------------------------------------------------------------


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


def test_taking_turns_with_qemu(tmp_path: Path) -> None:
    path = tmp_path / "disk.qed"
    SMALL.make(path, SIZE, BACKING)
    model = bytearray(SIZE)
    rng = random.Random(5)
    for turn in range(12):
        commands = []
        leaf = open_leaf(str(path)) if turn % 2 else None
        for _ in range(10):
            offset = rng.randrange(SIZE // 512 - 300) * 512
            length = rng.randrange(1, 300) * 512
            byte = rng.randrange(256)
            if leaf is None:
                commands.append(f"write -P {byte} {offset} {length}")
            else:
                guest_write(leaf, offset, bytes([byte]) * length, b"")
            model[offset : offset + length] = bytes([byte]) * length
        if leaf is None:
            qemu_io(path, *commands)
        else:
            leaf.close()
        qemu_check(path, "qed")
        reader = open_leaf(str(path), read_only=True)
        assert read(reader, 0, SIZE, b"") == model
        reader.close()


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


def test_no_backing_is_dropped_while_it_is_needed(path: Path) -> None:
    leaf = open_leaf(str(path))
    with pytest.raises(LeafError, match=f"nothing at {3 * CLUSTER} yet"):
        leaf.drop_backing()
    assert leaf.backing is not None
    leaf.close()


def test_a_backing_of_unknown_format(tmp_path: Path) -> None:
    path = tmp_path / "disk.qed"
    run(["qemu-img", "create", "-q", "-f", "qed", "-u", "-b", "base.qcow2", "-F", "qcow2", path,
         "1M"])  # fmt: skip
    leaf = open_leaf(str(path))
    assert leaf.backing == BackingReference("base.qcow2", "")
    leaf.close()
