# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile qcow2 images: judged as qemu-img judges them, and never trusted."""

import contextlib
import errno
import itertools
import json
import os
import random
import resource
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner

from nbdstream.cli import cli
from nbdstream.errors import LeafError, LeafFormatError, LeafUnsupportedError
from nbdstream.leaf import open_leaf
from nbdstream.leaf.base import FlushNeeded, State, SyncError
from nbdstream.leaf.qcow2.header import Header
from nbdstream.leaf.qcow2.header_file import read_header
from testbed.leaves import drive, flush
from testbed.peers import run
from tests.leaf_support import ImageKind, by_qemu, extents, ours, pattern, qemu_check, read, write
from tests.test_leaf_qcow2 import plain

SIZE = 2 << 20
U64 = struct.Struct(">Q")


@dataclass
class Image:
    """An image with its places, to damage it."""

    path: Path
    header: Header

    @classmethod
    def make(cls, path: Path, kind: ImageKind) -> "Image":
        kind.make(path, SIZE, None)
        leaf = kind.open(path)
        for number in range(3):
            write(leaf, number * 512 * 1024, pattern(0, 256 * 1024, number))
        leaf.close()
        with path.open("rb") as file:
            return cls(path, read_header(file.fileno(), str(path)))

    def get(self, offset: int) -> int:
        with self.path.open("rb") as file:
            return int(U64.unpack(os.pread(file.fileno(), 8, offset))[0])

    def put(self, offset: int, value: int) -> None:
        with self.path.open("r+b") as file:
            os.pwrite(file.fileno(), U64.pack(value), offset)

    @property
    def l2(self) -> int:
        """The offset of the first L2 table."""
        return self.get(self.header.l1_table_offset) & 0x00FFFFFFFFFFFE00

    @property
    def block(self) -> int:
        """The offset of the first refcount block."""
        return self.get(self.header.refcount_table_offset)

    @property
    def step(self) -> int:
        return 16 if self.header.extended else 8


def l2_entry(value: int, bitmap: int = 0) -> Callable[[Image], None]:
    def damage(image: Image) -> None:
        image.put(image.l2, value)
        if image.header.extended:
            image.put(image.l2 + 8, bitmap)

    return damage


def flip(where: Callable[[Image], int], bits: int) -> Callable[[Image], None]:
    return lambda image: image.put(where(image), image.get(where(image)) ^ bits)


def duplicate_data(image: Image) -> None:
    image.put(image.l2, image.get(image.l2 + image.step))


def to_metadata(image: Image) -> None:
    image.put(image.l2, image.header.l1_table_offset | 1 << 63)


def l1_to_itself(image: Image) -> None:
    image.put(image.header.l1_table_offset, image.header.l1_table_offset | 1 << 63)


def l1_shared(image: Image) -> None:
    entry = image.get(image.header.l1_table_offset)
    image.put(image.header.l1_table_offset + 8, entry)


DAMAGE: dict[str, Callable[[Image], None]] = {
    "a data cluster is forgotten": l2_entry(0),
    "a data cluster twice": duplicate_data,
    "data in the L1 table": to_metadata,
    "data nowhere": l2_entry(1 << 63),
    "data beyond the end": l2_entry(1 << 63 | 1 << 40),
    "data not aligned": flip(lambda image: image.l2, 0x200),
    "reserved bits in L2": flip(lambda image: image.l2, 0x4),
    "L2 copied flag": flip(lambda image: image.l2, 1 << 63),
    "L1 copied flag": flip(lambda image: image.header.l1_table_offset, 1 << 63),
    "compressed beyond the end": l2_entry(1 << 62 | 1 << 45),
    "compressed with subclusters": l2_entry(1 << 62 | 0x1000, 7),
    "compressed with the copied flag": l2_entry(3 << 62 | 0x1000),
    "subclusters of nothing": l2_entry(0, 7),
    "data and zero": flip(lambda image: image.l2 + 8, 1 << 32),
    "no L2 table": lambda image: image.put(image.header.l1_table_offset, 0),
    "L2 beyond the end": lambda image: image.put(image.header.l1_table_offset, 1 << 63 | 1 << 40),
    "L1 entry leads to L1": l1_to_itself,
    "L1 reserved bits": flip(lambda image: image.header.l1_table_offset, 1 << 57),
    "refcounts zero": lambda image: image.put(image.block + 8, 0),
    "refcounts many": flip(lambda image: image.block + 8, 0x0002000300040005),
    "no refcount block": lambda image: image.put(image.header.refcount_table_offset, 0),
    "refcount block at L1": lambda image: image.put(
        image.header.refcount_table_offset, image.header.l1_table_offset
    ),
    "refcount block beyond the end": lambda image: image.put(
        image.header.refcount_table_offset, 1 << 40
    ),
    "refcount block not aligned": flip(lambda image: image.header.refcount_table_offset, 0x200),
}
KINDS = [plain(4096), ours("qcow2", 16384)]


def qemu_report(path: Path) -> dict[str, int]:
    report = json.loads(run(["qemu-img", "check", "--output=json", path], check=False))
    assert isinstance(report, dict)
    return report


def qemu_errors(path: Path) -> int:
    return qemu_report(path).get("corruptions", 0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("damage", DAMAGE)
def test_check_agrees_with_qemu_img(damage: str, kind: ImageKind, tmp_path: Path) -> None:
    image = Image.make(tmp_path / "disk", kind)
    DAMAGE[damage](image)
    report = qemu_report(image.path)
    expected = report.get("corruptions", 0), report.get("leaks", 0)
    assert expected != (0, 0)
    try:
        leaf = open_leaf(str(image.path), read_only=True, format="qcow2")
    except LeafFormatError:
        # What cannot be opened for reading cannot be checked by us either.
        assert damage in ("L2 beyond the end", "L1 entry leads to L1", "L1 reserved bits")
        return
    result = leaf.check(repair=False)
    leaf.close()
    if report["check-errors"]:  # then QEMU stopped counting
        assert result.errors >= expected[0]
    else:
        assert (result.errors, result.leaks) == expected, result
    assert len(result.messages) > 0 and result.repaired == 0


REPAIRABLE = (
    "a data cluster is forgotten",
    "L2 copied flag",
    "L1 copied flag",
    "no L2 table",
    "refcounts many",
)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("damage", REPAIRABLE)
def test_repair(damage: str, kind: ImageKind, tmp_path: Path) -> None:
    image = Image.make(tmp_path / "disk", kind)
    DAMAGE[damage](image)
    leaf = open_leaf(str(image.path), format="qcow2")
    result = leaf.check(repair=True)
    assert result.repaired == result.errors + result.leaks > 0
    assert leaf.check(repair=False).errors == 0
    write(leaf, 1 << 20, pattern(0, 512 * 1024, 9))
    leaf.close()
    qemu_check(image.path, "qcow2")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("corrupt", (False, True))
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_repair_leaves_an_image_that_qemu_finds_clean(
    damage: str, corrupt: bool, kind: ImageKind, tmp_path: Path
) -> None:
    image = Image.make(tmp_path / "disk", kind)
    DAMAGE[damage](image)
    if corrupt:
        image.put(72, image.header.incompatible_features | 2)
        with pytest.raises(LeafUnsupportedError, match="nbdstream check --repair"):
            open_leaf(str(image.path), format="qcow2")
    leaf = open_leaf(str(image.path), format="qcow2", repair=True)
    result = leaf.check(repair=True)
    assert result.repaired == result.errors + result.leaks > 0
    assert not leaf.describe()["corrupt"]
    leaf.close()
    qemu_check(image.path, "qcow2")
    leaf = open_leaf(str(image.path), format="qcow2")
    write(leaf, 1 << 20, pattern(0, 512 * 1024, 9))
    leaf.close()
    qemu_check(image.path, "qcow2")


def test_an_image_of_version_2_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    by_qemu("qcow2", "compat=0.10,cluster_size=4096").make(path, SIZE, None)
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", path])
    with path.open("rb") as file:
        image = Image(path, read_header(file.fileno(), str(path)))
    assert image.header.version == 2
    image.put(image.l2, 1 << 63 | 1 << 40)
    invoke("check", "--repair", "-f", "qcow2", path, status=0)
    qemu_check(path, "qcow2")
    leaf = open_leaf(str(path), read_only=True, format="qcow2")
    assert read(leaf, 0, 65536, b"") == bytes(4096) + b"\1" * 61440
    leaf.close()


def test_a_repair_names_the_guest_ranges_that_it_costs(tmp_path: Path) -> None:
    image = Image.make(tmp_path / "disk", plain(4096))
    for index in (1, 2, 3, 200):
        image.put(image.l2 + 8 * index, 1 << 63 | 1 << 40)
    foretold = invoke("check", image.path, status=2)
    assert "guest range 0x1000 to 0x4000 will lose its local data to --repair" in foretold
    told = invoke("check", "--repair", image.path, status=0)
    assert "guest range 0x1000 to 0x4000 lost its local data, it reads as zeroes" in told
    leaf = open_leaf(str(image.path), read_only=True, format="qcow2")
    data = pattern(0, 256 * 1024, 0)
    assert read(leaf, 0, 256 * 1024, b"") == data[:4096] + bytes(3 * 4096) + data[4 * 4096 :]
    leaf.close()
    assert "No errors" in invoke("check", image.path, status=0)


def invoke(*arguments: object, status: int) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.output


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_repair_that_is_cut_off_is_repeated(cut: int, tmp_path: Path) -> None:
    """Its first ``cut`` syncs succeed, the next one fails."""
    image = Image.make(tmp_path / "disk", plain(4096))
    DAMAGE["data in the L1 table"](image)
    image.put(72, image.header.incompatible_features | 2)
    real, left = os.fdatasync, itertools.count(cut, -1)

    def fdatasync(fd: int) -> None:
        if next(left) == 0:
            raise OSError(errno.EIO, "bad sector")
        real(fd)

    with mock.patch.object(os, "fdatasync", fdatasync), contextlib.suppress(OSError):
        leaf = open_leaf(str(image.path), format="qcow2", repair=True)
        leaf.close()
    leaf = open_leaf(str(image.path), format="qcow2", repair=True)
    leaf.check(repair=True)
    leaf.close()
    qemu_check(image.path, "qcow2")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("damage", [name for name in DAMAGE if name.startswith("refcount")])
def test_a_dirty_image_gets_new_refcounts(damage: str, kind: ImageKind, tmp_path: Path) -> None:
    image = Image.make(tmp_path / "disk", kind)
    DAMAGE[damage](image)
    image.put(72, image.header.incompatible_features | 1)
    leaf = open_leaf(str(image.path), format="qcow2")
    assert leaf.check(repair=False).errors == 0
    write(leaf, 1 << 20, pattern(0, 512 * 1024, 9))
    leaf.close()
    qemu_check(image.path, "qcow2")


# -- the corrupt bit ---------------------------------------------------------------------


def marked(image: Image) -> bool:
    return bool(image.get(72) & 2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_damage_is_recorded_before_the_file_grows(kind: ImageKind, tmp_path: Path) -> None:
    image = Image.make(tmp_path / "disk", kind)
    size = image.path.stat().st_size
    entry = 1 << 63 | size
    image.put(image.l2, entry)
    leaf = open_leaf(str(image.path), format="qcow2")
    with pytest.raises(LeafFormatError, match=f"L2 entry at {image.l2:#x}"):
        extents(leaf, 0, 4096)
    assert leaf.dirty
    content = pattern(0, 256 * 1024, 9)
    with pytest.raises(FlushNeeded):
        leaf.write(768 * 1024, memoryview(content))
    assert image.path.stat().st_size == size
    flush(leaf)
    assert marked(image) and not leaf.dirty
    assert image.get(image.l2) == entry | 1 << 57
    leaf.write(768 * 1024, memoryview(content))
    leaf.close()
    assert marked(image)
    assert run(["qemu-io", "-r", "-f", "qcow2", "-c", "read 768k 64k", image.path])
    assert "corrupt" in run(["qemu-img", "info", image.path])


@pytest.mark.parametrize("fails", (0, 1, 2))
def test_damage_is_not_recorded_after_a_failed_sync(fails: int, tmp_path: Path) -> None:
    """The sync of the mark itself may fail; the damage may be met after a failed sync."""
    image = Image.make(tmp_path / "disk", plain(4096))
    image.put(image.l2, 1 << 63 | 1 << 40)
    leaf = open_leaf(str(image.path), format="qcow2")
    if fails == 0:
        with mock.patch.object(os, "fdatasync", side_effect=OSError(errno.EIO, "bad sector")):
            with pytest.raises(SyncError):
                flush(leaf)
    with pytest.raises(LeafFormatError):
        extents(leaf, 0, 4096)
    if fails:
        with mock.patch.object(os, "fdatasync", side_effect=OSError(errno.EIO, "bad sector")):
            with pytest.raises(SyncError):
                flush(leaf)
    before = image.path.read_bytes()
    for _ in range(fails):
        with pytest.raises(SyncError):
            flush(leaf)
    with pytest.raises(SyncError):
        leaf.close()
    assert image.path.read_bytes() == before
    assert fails or not marked(image)


def test_a_flush_that_records_damage_can_be_repeated(tmp_path: Path) -> None:
    image = Image.make(tmp_path / "disk", plain(4096))
    image.put(image.l2, 1 << 63 | 1 << 40)
    leaf = open_leaf(str(image.path), format="qcow2")
    with pytest.raises(LeafFormatError):
        extents(leaf, 0, 4096)
    with mock.patch.object(os, "pwrite", side_effect=OSError(errno.ENOSPC, "full")):
        with pytest.raises(OSError, match="full"):
            flush(leaf)
    assert not marked(image) and leaf.dirty
    flush(leaf)
    assert marked(image) and not leaf.dirty
    assert image.get(image.l2) == 1 << 63 | 1 << 40
    leaf.close()


def test_reading_a_damaged_image_marks_nothing(tmp_path: Path) -> None:
    image = Image.make(tmp_path / "disk", plain(4096))
    image.put(image.l2, 1 << 63 | 1 << 40)
    before = image.path.read_bytes()
    leaf = open_leaf(str(image.path), read_only=True, format="qcow2")
    with pytest.raises(LeafFormatError):
        extents(leaf, 0, 4096)
    assert not leaf.dirty
    leaf.close()
    assert image.path.read_bytes() == before


def test_a_leaf_marked_corrupt_can_be_repaired_while_it_is_open(tmp_path: Path) -> None:
    image = Image.make(tmp_path / "disk", plain(4096))
    image.put(image.l2, 1 << 63 | 1 << 40)
    leaf = open_leaf(str(image.path), format="qcow2")
    with pytest.raises(LeafFormatError):
        extents(leaf, 0, 4096)
    assert leaf.check(repair=True).errors == 1
    extents(leaf)
    leaf.close()
    assert not marked(image)
    qemu_check(image.path, "qcow2")


# -- hostile images --------------------------------------------------------------------


@pytest.fixture
def limits() -> Iterator[None]:
    """No test here may take long, or much memory."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - started < 30
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400 << 10, f"{grown} KiB"


def use(path: Path, *, read_only: bool) -> str:
    """Open, look at everything, write, and close: return the error, if there was one.

    Nothing but a `LeafError` of one line, or EIO, may come out.
    """
    try:
        leaf = open_leaf(str(path), read_only=read_only, format="qcow2")
    except LeafError as error:
        assert "\n" not in str(error)
        return str(error)
    try:
        for number, extent in enumerate(drive(leaf, lambda: list(leaf.extents(0, leaf.size)))):
            if extent.state in (State.DATA, State.COMPRESSED) and number < 50:
                length = min(extent.length, 1 << 16)
                leaf.read(extent._replace(length=length), memoryview(bytearray(length)))
        for offset in range(0, leaf.size - leaf.size % 512, 512):
            assert not 0 <= leaf.locate(offset, 512) < leaf.cluster_size, "data in the header"
        leaf.check(repair=False)
        if not read_only and leaf.size:
            size = min(leaf.cluster_size, leaf.size)
            write(leaf, 0, bytes(size))
            drive(leaf, lambda: leaf.zero(0, size, unmap=True))
    except LeafError as error:
        assert "\n" not in str(error)
        return str(error)
    except OSError as error:
        assert "compressed cluster" in str(error) or "cannot grow" in str(error), error
        return str(error)
    finally:
        leaf.close()
    return ""


def left_as_it_was(now: bytes, before: bytes) -> bool:
    """Whether nothing was changed but to record damage: the corrupt bit, the bit in entries."""
    changed = [at for at, (new, old) in enumerate(zip(now, before, strict=True)) if new != old]
    return all(now[at] ^ before[at] == 2 and (at == 79 or at % 8 == 0) for at in changed)


@pytest.mark.parametrize("kind", KINDS, ids=str)
# That two entries share a cluster shows only when all tables are read.
@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "a data cluster twice"])
def test_damage_is_not_made_worse(
    damage: str, kind: ImageKind, tmp_path: Path, limits: None
) -> None:
    image = Image.make(tmp_path / "disk", kind)
    DAMAGE[damage](image)
    before = image.path.read_bytes()
    use(image.path, read_only=True)
    assert image.path.read_bytes() == before
    errors = qemu_errors(image.path)
    use(image.path, read_only=False)
    # A mark that keeps an entry damaged is counted, too.
    assert qemu_errors(image.path) <= errors + 1


@pytest.mark.parametrize("field", range(4, 112, 4))
def test_every_header_field_with_every_kind_of_nonsense(
    field: int, tmp_path: Path, limits: None
) -> None:
    image = Image.make(tmp_path / "disk", plain(4096))
    good = image.path.read_bytes()
    values = (0, 1, 2, 9, 21, 63, 0x200, 0x1000, 0x3000, 0x8000, 0x7FFFFFFF, 0xFFFFFFFF)
    for value in values:
        bad = good[:field] + value.to_bytes(4, "big") + good[field + 4 :]
        for read_only in (True, False):
            image.path.write_bytes(bad)
            error = use(image.path, read_only=read_only)
            if error or read_only:
                same = left_as_it_was(image.path.read_bytes(), bad)
                assert same or "compressed" in error, error


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_fuzzed_metadata(kind: ImageKind, seed: int, tmp_path: Path, limits: None) -> None:
    rng = random.Random(seed)
    image = Image.make(tmp_path / "disk", kind)
    good = image.path.read_bytes()
    cluster = image.header.cluster_size
    tables = (0, image.header.refcount_table_offset, image.header.l1_table_offset, image.l2)
    for _ in range(60):
        bad = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 5, 40))):
            at = rng.choice(tables) + rng.randrange(0, rng.choice((128, cluster)), 8)
            value = rng.choice(
                (
                    rng.randrange(1 << 64),
                    rng.randrange(len(good) // cluster) * cluster | rng.choice((0, 1 << 63)),
                    rng.randrange(len(good)) | rng.choice((0, 1, 1 << 62, 1 << 63)),
                    U64.unpack_from(bad, at)[0] ^ 1 << rng.randrange(64),
                )
            )
            U64.pack_into(bad, at, value)
        for read_only in (True, False):
            image.path.write_bytes(bad)
            use(image.path, read_only=read_only)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_cut_off_files(kind: ImageKind, tmp_path: Path, limits: None) -> None:
    image = Image.make(tmp_path / "disk", kind)
    good = image.path.read_bytes()
    for length in (0, 3, 4, 8, 71, 72, 103, 111, 112, 200, 4096, 20000, 50000, len(good) // 2):
        for read_only in (True, False):
            image.path.write_bytes(good[:length])
            assert use(image.path, read_only=read_only), length
            assert left_as_it_was(image.path.read_bytes(), good[:length])


def test_tables_that_lead_all_over_a_huge_sparse_file(tmp_path: Path, limits: None) -> None:
    """An L1 table of 4 MiB whose entries point to as many places in 2^43 bytes of nothing;
    and one L2 table for all of them."""
    path = tmp_path / "disk"
    by_qemu("qcow2", "cluster_size=512").make(path, 16 << 30, None)
    with path.open("rb") as file:
        header = read_header(file.fileno(), str(path))
    entries = header.l1_size
    os.truncate(path, 1 << 43)
    scattered = b"".join(
        U64.pack(1 << 63 | (1 << 32) + number * 0x7FFE00) for number in range(entries)
    )
    shared = U64.pack(1 << 63 | 1 << 32) * entries
    for table in (scattered, shared):
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), table, header.l1_table_offset)
            os.pwrite(file.fileno(), U64.pack(1), 72)  # dirty: it would have to be rebuilt
        for read_only in (True, False):
            with pytest.raises(LeafFormatError):
                leaf = open_leaf(str(path), read_only=read_only, format="qcow2")
                try:
                    leaf.check(repair=False)
                finally:
                    leaf.close()


def test_a_fresh_image_of_8_tib_is_small(tmp_path: Path, limits: None) -> None:
    path = tmp_path / "disk"
    ours("qcow2").make(path, 8 << 40, None)
    started = time.monotonic()
    leaf = open_leaf(str(path), format="qcow2")
    assert [extent.state for extent in extents(leaf)] == [State.ZERO]
    leaf.close()
    assert time.monotonic() - started < 20


def test_snapshots_beyond_any_file_are_damage(tmp_path: Path) -> None:
    """The offset is a 64-bit number, and system calls take 63 bits."""
    path = tmp_path / "disk.qcow2"
    ours("qcow2").make(path, 1 << 20, None)
    with path.open("r+b") as image:
        image.seek(60)  # number and offset of snapshots
        image.write((1).to_bytes(4, "big") + (1 << 63).to_bytes(8, "big"))
    leaf = open_leaf(str(path), read_only=True)
    with pytest.raises(LeafFormatError, match="beyond any file"):
        leaf.check(repair=False)
    leaf.close()
