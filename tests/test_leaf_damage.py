# SPDX-License-Identifier: Apache-2.0
"""Damaged metadata, and errors while it is read, fail what lies under them and nothing else."""

import errno
import itertools
import logging
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio

from nbdstream.disk import open_disk
from nbdstream.disk.disk import StreamedDisk
from nbdstream.errors import LeafError
from nbdstream.leaf import open_leaf
from nbdstream.leaf.base import Leaf
from testbed.leaves import flush
from tests.doubles import GatedBacking
from tests.leaf_support import ImageKind, by_qemu, extents, ours, pattern, qemu_check, read, write

UNIT = 16384
SIZE = 12 << 20
CONTENT = pattern(0, SIZE)
# A few places in each of the tables that the kinds below have, and one that grows the file.
PLACES = [at + rest for at in (0, 4 << 20, 8 << 20) for rest in (0, UNIT, 5 * UNIT)]
GROWTH = [at + 40 * UNIT for at in (0, 4 << 20, 8 << 20)]
KINDS = [
    by_qemu("qcow2", "cluster_size=4096"),
    ours("qcow2", 16384),
    by_qemu("qed", "cluster_size=4096,table_size=2"),
]


@dataclass(frozen=True)
class Entry:
    """An entry in the file: its place, and the guest range that lies under it."""

    place: int
    start: int
    length: int


@pytest.fixture(scope="module", params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> ImageKind:
    chosen: ImageKind = request.param
    return chosen


@pytest.fixture(scope="module")
def sound(kind: ImageKind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with data in all of `PLACES`."""
    path = tmp_path_factory.mktemp("sound") / "disk"
    leaf = kind.new(path, SIZE)
    for at in PLACES:
        write(leaf, at, pattern(at, UNIT, 1))
    leaf.close()
    return path


def used_entries(image: bytes, kind: ImageKind) -> Iterator[Entry]:
    """The entries of the L1 table and of all L2 tables that are in use."""
    if kind.format == "qed":
        cluster, tables = struct.unpack_from("<II", image, 4)
        l1, order, words, mask, count = (*struct.unpack_from("<Q", image, 40), "<Q", 1, ~0, 3)
        per_table = cluster * tables // 8
    else:
        cluster = 1 << int.from_bytes(image[20:24], "big")
        count = int.from_bytes(image[36:40], "big")
        l1 = int.from_bytes(image[40:48], "big")
        words = 2 if image[79] & 16 else 1
        order, mask, per_table = ">Q", 0x00FF_FFFF_FFFF_FE00, cluster // 8 // words
    for number in range(count):
        (pointer,) = struct.unpack_from(order, image, l1 + 8 * number)
        if not pointer:
            continue
        span = per_table * cluster
        yield Entry(l1 + 8 * number, number * span, span)
        for index in range(per_table):
            place = (pointer & mask) + 8 * words * index
            if any(image[place : place + 8]):
                yield Entry(place, number * span + index * cluster, cluster)


def damages(image: bytes, entry: Entry, kind: ImageKind) -> dict[str, int]:
    """What else the entry may say, none of it possible."""
    qed = kind.format == "qed"
    order, copied = ("<Q", 0) if qed else (">Q", 1 << 63)
    (value,) = struct.unpack_from(order, image, entry.place)
    (l1,) = struct.unpack_from(order, image, 40)
    end = -(-len(image) // UNIT) * UNIT
    found = {
        "misaligned": value + 512,
        "far beyond the end": copied | 1 << 50,
        "just beyond the end": copied | end,
        "into the L1 table": copied | l1,
    }
    return found if qed else found | {"reserved bits": value | 1 << 57}


async def read_disk(disk: StreamedDisk, at: int) -> bytes:
    view = memoryview(bytearray(UNIT))
    await disk.read(view, at)
    return bytes(view)


def test_a_served_leaf_lives_with_each_damaged_entry(
    kind: ImageKind, sound: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = sound.read_bytes()
    judged = 0
    for entry in used_entries(image, kind):
        # Of the clusters of one write, the first stands for all.
        if entry.length >= SIZE or (entry.length < UNIT and entry.start % UNIT):
            continue
        for name, value in damages(image, entry, kind).items():
            path = tmp_path / "disk"
            shutil.copy(sound, path)
            raw = struct.pack("<Q" if kind.format == "qed" else ">Q", value)
            with path.open("r+b") as file:
                file.seek(entry.place)
                file.write(raw)
            try:
                with caplog.at_level(logging.ERROR):
                    caplog.clear()
                    trio.run(live_with, kind, path, entry)
            except BaseException as error:
                error.add_note(f"{entry}: {name}")
                raise
            # What led beyond the end stays recognisable, and damaged when the file has grown.
            left = raw
            if "just beyond" in name:
                qed = kind.format == "qed"
                left = struct.pack("<Q", value | 2) if qed else struct.pack(">Q", value | 1 << 57)
            assert path.read_bytes()[entry.place : entry.place + 8] == left, "left as evidence"
            judged += 1
            if kind.format == "qcow2":
                assert path.read_bytes()[79] & 2, "marked corrupt"
                (line,) = [record.getMessage() for record in caplog.records]
                assert "is marked corrupt from now on: " in line
                assert f"L2 entry at {entry.place:#x}" in line or "of the L1 table" in line
                with pytest.raises(LeafError, match="nbdstream check --repair"):
                    kind.open(path)
                repair(kind, path, entry)
    assert judged >= 40


async def live_with(kind: ImageKind, path: Path, entry: Entry) -> None:
    """Serve the image; what is not under the entry is as it was, and can be changed.

    So it is after a reopen, although the file has grown over places beyond its former end.
    """

    def under(at: int) -> bool:
        return at < entry.start + entry.length and entry.start < at + UNIT

    expected = {at: pattern(at, UNIT, 1) for at in PLACES}
    damaged = [at for at in PLACES if under(at)]
    elsewhere = [at for at in PLACES + GROWTH if not under(at)]
    assert damaged and elsewhere
    leaf = kind.open(path)
    async with open_disk(leaf, GatedBacking(CONTENT)) as disk:
        for round_ in range(2):
            for at in elsewhere:
                shown = expected.get(at, CONTENT[at : at + UNIT])
                assert await read_disk(disk, at) == shown
                expected[at] = pattern(at, UNIT, 2 + round_)
                await disk.write(memoryview(expected[at]), at, fua=False)
            for at in damaged:
                with pytest.raises((LeafError, OSError)):
                    await read_disk(disk, at)
                with pytest.raises((LeafError, OSError)):
                    await disk.write(memoryview(bytes(UNIT)), at, fua=False)
                with pytest.raises((LeafError, OSError)):
                    await disk.trim(at, UNIT, fua=False)
            await disk.flush()
            forget(leaf)
    leaf.close()
    leaf = kind.open(path, read_only=True)
    for at in elsewhere:
        assert read(leaf, at, UNIT, CONTENT) == expected[at]
    for at in damaged:
        with pytest.raises(LeafError):
            read(leaf, at, UNIT, CONTENT)
    leaf.close()


def repair(kind: ImageKind, path: Path, entry: Entry) -> None:
    """Only the range under the entry loses its local data, and qemu-img finds no fault."""
    leaf = open_leaf(str(path), format=kind.format, repair=True)
    result = leaf.check(repair=True)
    assert result.errors >= 1 and result.repaired == result.errors + result.leaks
    assert f"guest range {entry.start:#x} to" in result.messages[0]
    for at in PLACES + GROWTH:
        shown = read(leaf, at, UNIT, CONTENT)
        if at < entry.start + entry.length and entry.start < at + UNIT:
            start, stop = max(at, entry.start), min(at + UNIT, entry.start + entry.length)
            assert shown[start - at : stop - at] == CONTENT[start:stop]
        else:
            assert shown == pattern(at, UNIT, 3)
    leaf.close()
    qemu_check(path, kind.format)


def forget(leaf: Leaf) -> None:
    """Have the leaf read its metadata from the file again, as when much else came by."""
    tables: Any = leaf._tables  # type: ignore[attr-defined]
    if leaf.format == "qcow2":
        tables.young.clear()
        tables._old = {}
    else:
        for number in [n for n in tables.cache.pages if n not in tables.cache.damaged]:
            tables.cache.pages.pop(number)
        tables.cache._private = len(tables.cache.pages)


# -- errors of the disk below ------------------------------------------------------------


@contextmanager
def one_failing_read(number: int) -> Iterator[list[int]]:
    """The ``number``-th read that must not wait fails with EIO; yields what failed."""
    real = os.preadv
    left = itertools.count(number, -1)
    fired: list[int] = []

    def preadv(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if next(left) == 0:
            fired.append(offset)
            raise OSError(errno.EIO, "bad sector")
        return real(fd, buffers, offset, flags)

    with mock.patch.object(os, "preadv", preadv):
        yield fired


@pytest.mark.parametrize("kind", [*KINDS, ours("raw")], ids=str)
def test_an_error_while_metadata_is_read_fails_one_request(kind: ImageKind, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    leaf = kind.new(path, SIZE)
    for at in PLACES:
        write(leaf, at, pattern(at, UNIT, 1))
    leaf.close()
    for number in itertools.count():
        leaf = kind.open(path)
        failed = []
        with one_failing_read(number) as fired:
            for at in PLACES:
                try:
                    extents(leaf, at, UNIT)
                except OSError as error:
                    assert error.errno == errno.EIO
                    failed.append(at)
        assert len(failed) == len(fired)
        for at in PLACES:
            assert read(leaf, at, UNIT, CONTENT) == pattern(at, UNIT, 1)
            write(leaf, at, pattern(at, UNIT, 1))
        flush(leaf)
        leaf.close()
        if not fired:
            break
    assert number >= 1


async def test_metadata_that_cannot_be_warmed_is_an_error(kind: ImageKind, sound: Path) -> None:
    """Not asked for again and again."""

    def cold(*_: object) -> int:
        raise BlockingIOError(errno.EAGAIN, "cold")

    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, "bad sector")

    leaf = kind.open(sound, read_only=True)
    async with open_disk(leaf, GatedBacking(CONTENT)) as disk:
        with mock.patch.object(os, "preadv", cold), mock.patch.object(os, "pread", broken):
            with trio.fail_after(30), pytest.raises(OSError, match="bad sector"):
                await read_disk(disk, PLACES[0])
        assert await read_disk(disk, PLACES[0]) == pattern(PLACES[0], UNIT, 1)
    leaf.close()
