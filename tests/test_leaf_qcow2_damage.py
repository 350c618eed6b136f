# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile qcow2 images: judged as qemu-img judges them, and never trusted."""

import os
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdstream.errors import LeafError, LeafFormatError
from nbdstream.leaf import open_leaf
from nbdstream.leaf.base import State
from nbdstream.leaf.qcow2.header_file import read_header
from testbed.leaves import drive
from tests.leaf_support import ImageKind, by_qemu, extents, ours, plain, write
from tests.qcow2_damage import DAMAGE, KINDS, U64, Image, qemu_errors, qemu_report


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
