# SPDX-License-Identifier: Apache-2.0
"""Checking and repairing a QED image (docs/interop/qed_spec.rst, "Consistency checking").

Works on the file alone, with nothing of it in memory, and counts as ``qemu-img check``
does: each invalid offset and each second reference to a cluster is an error, each
cluster that nothing refers to is a leak.

A repair clears invalid offsets, as QEMU's does. An automatic one (``strict``) clears
only what a crash may have left: an entry that points beyond the file, in an image without
backing, belongs to a write that was never flushed. With a backing, QEMU and this package sync
data before the entry that shows it, so such an entry is damage (the file was cut off, say), as
are entries that are not aligned or lead into the header. These are refused: the range under
them would silently show the backing.

Unlike QEMU's, our repair also gives leaked clusters back:
those behind the last used cluster are cut off, and those before it are filled with data
clusters from the end, whose entries then follow. A copy is synced before the entry
changes, and the entry before the file is cut, so a crash during a repair leaves an
image to be repaired. Clusters referred to twice are beyond repair: nothing tells whose
they are. Then nothing is moved.
"""

import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nbdstream.errors import LeafFormatError, LeafUnsupportedError
from nbdstream.extents import align_down, align_up
from nbdstream.leaf import files
from nbdstream.leaf.base import CheckResult, read_exactly, write_exactly
from nbdstream.leaf.bits import bit_run, set_bits
from nbdstream.leaf.durability import Syncs
from nbdstream.leaf.qed.header import BACKING_FILE, Header
from nbdstream.leaf.qed.tables import (
    UNALLOCATED,
    ZERO,
    Tables,
    load_entries,
    rows,
    store_entries,
)

MAX_OFFSET = 1 << 62  # no file reaches it
PIN = 2  # no cluster is so small
SPARE = 1 << 30  # what the file may grow by for tables, at most
_CHUNK = 65536  # bytes of a table looked at in one go
_SET_PAGE = 512  # bytes of a `ClusterSet` page: 4096 clusters
_SET_BITS = _SET_PAGE * 8
_MAX_SET_PAGES = 524288  # 256 MiB: enough for 128 TiB of 64 KiB clusters


class ClusterSet:
    """A set of cluster numbers that takes a bit each, in the neighbourhoods that it has."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self.count = 0

    def add(self, first: int, count: int) -> int:
        """Add ``count`` clusters in a row; returns how many were in the set already.

        Raises LeafUnsupportedError at the bound on memory.
        """
        before = self.count
        for number, bit, length in _by_page(first, count):
            page = self._pages.get(number)
            if page is None:
                if len(self._pages) >= _MAX_SET_PAGES:
                    raise LeafUnsupportedError("the image is too scattered to be checked")
                page = self._pages[number] = bytearray(_SET_PAGE)
            self.count += set_bits(page, bit, length)
        return count - (self.count - before)

    def missing(self, first: int, stop: int) -> Iterator[int]:
        """The numbers in a range that are not in the set."""
        nothing = bytes(_SET_PAGE)
        for number, bit, length in _by_page(first, stop - first):
            page = self._pages.get(number, nothing)
            end = bit + length
            while bit < end:
                run, present = bit_run(page, bit)
                run = min(run, end - bit)
                if not present:
                    yield from range(number * _SET_BITS + bit, number * _SET_BITS + bit + run)
                bit += run

    def last(self) -> int:
        """The highest number in the set, which is not empty."""
        number = max(self._pages)
        top = int.from_bytes(self._pages[number], "little").bit_length() - 1
        return number * _SET_BITS + top


def _by_page(first: int, count: int) -> Iterator[tuple[int, int, int]]:
    stop = first + count
    while first < stop:
        number, bit = divmod(first, _SET_BITS)
        length = min(_SET_BITS - bit, stop - first)
        yield number, bit, length
        first += length


@dataclass
class _Scan:
    """A walk through all tables of an image, and what it found."""

    fd: int
    header: Header
    repair: bool
    used: ClusterSet = field(default_factory=ClusterSet)
    invalid: int = 0
    doubled: int = 0
    damage: str = ""  # the first entry that no crash leaves

    def __post_init__(self) -> None:
        self.backing = bool(self.header.features & BACKING_FILE)
        self.end = align_down(os.fstat(self.fd).st_size, self.header.cluster_size)

    def run(self) -> None:
        """Raises LeafUnsupportedError, OSError."""
        header = self.header
        tables = header.table_bytes // header.cluster_size
        self._use(header.l1_table_offset, tables)
        for chunk_offset, entries in chunks(self.fd, header.l1_table_offset, header.table_bytes):
            changed = False
            for index, entry in enumerate(entries):
                if entry == UNALLOCATED:
                    continue
                if not self._valid(entry, header.table_bytes):
                    self._invalid(chunk_offset + 8 * index, entry)
                    entries[index] = UNALLOCATED
                    changed = True
                elif self._use(entry, tables):
                    self._scan_l2(entry)
            if changed and self.repair:
                write_exactly(self.fd, memoryview(store_entries(entries)), chunk_offset)

    def _scan_l2(self, table: int) -> None:
        cluster_size = self.header.cluster_size
        for chunk_offset, entries in chunks(self.fd, table, self.header.table_bytes):
            changed = False
            for start, count, entry in rows(entries, cluster_size):
                if entry <= ZERO:
                    continue
                if self._valid(entry, count * cluster_size):
                    self._use(entry, count)
                    continue
                for index in range(start, start + count):  # a part of the row may be right
                    if self._valid(entries[index], cluster_size):
                        self._use(entries[index], 1)
                    else:
                        self._invalid(chunk_offset + 8 * index, entries[index])
                        entries[index] = UNALLOCATED
                        changed = True
            if changed and self.repair:
                write_exactly(self.fd, memoryview(store_entries(entries)), chunk_offset)

    def _valid(self, offset: int, length: int) -> bool:
        aligned = offset % self.header.cluster_size == 0
        return aligned and self.header.header_bytes <= offset <= self.end - length

    def _invalid(self, place: int, entry: int) -> None:
        self.invalid += 1
        aligned = entry % self.header.cluster_size == 0
        crash = aligned and entry >= self.header.header_bytes and not self.backing
        if not self.damage and not crash:
            self.damage = f"the entry at {place:#x} is {entry:#x}, which is no place of a cluster"

    def _use(self, offset: int, clusters: int) -> bool:
        """Count a reference; whether it is the first to all of these clusters."""
        doubled = self.used.add(offset // self.header.cluster_size, clusters)
        self.doubled += doubled
        return doubled == 0


def check_image(
    fd: int, header: Header, syncs: Syncs, *, repair: bool, strict: bool = False
) -> CheckResult:
    """Check all tables of an image that no other process uses (blocks; reads every table).

    With ``strict``, damage that no crash leaves is raised as LeafFormatError before anything is
    written. Raises LeafUnsupportedError where that would take unreasonable memory, OSError.
    """
    scan = _Scan(fd, header, repair and not strict)
    scan.run()
    if strict and scan.damage:
        raise LeafFormatError(
            f"is damaged, and not by a crash: {scan.damage}; open it read-only, or try: nbdstream"
            " check --repair, which drops the local data under damaged entries"
        )
    if strict and repair and scan.invalid:
        scan = _Scan(fd, header, repair)
        scan.run()
    total = scan.end // header.cluster_size - header.header_size
    leaks = total - scan.used.count
    messages = []
    if scan.invalid:
        messages.append(f"table entries that point to where nothing can be: {scan.invalid}")
    if scan.doubled:
        messages.append(f"clusters that are referred to more than once: {scan.doubled}")
    if leaks:
        messages.append(f"leaked clusters: {leaks}")
    repaired = 0
    if repair:
        repaired = scan.invalid
        if scan.invalid:
            syncs.sync(fd)
        if not scan.doubled:
            repaired += leaks - _give_back(scan, syncs)
    return CheckResult(scan.invalid + scan.doubled, leaks, repaired, tuple(messages))


def first_unallocated(fd: int, header: Header, judge: Tables) -> int | None:
    """The lowest guest offset whose cluster has no sound entry in the file; None: all have
    (blocks). ``judge`` are the tables of the open leaf.

    Damaged entries have no readable data, and a repair makes them unallocated:
    with the backing, its content shows there; without it, zeroes would.
    """
    clusters = align_up(header.image_size, header.cluster_size) // header.cluster_size
    tables = align_up(clusters, header.table_entries) // header.table_entries
    l1 = load_entries(os.pread(fd, 8 * tables, header.l1_table_offset))
    for number, table in enumerate(l1):
        first = number * header.table_entries
        if table == UNALLOCATED or number in judge.damaged_l1:
            return first * header.cluster_size
        needed = min(header.table_entries, clusters - first)
        for offset, entries in chunks(fd, table, needed * 8, holes=True):
            missing = judge.first_missing(offset, entries)
            if missing is not None:
                return (first + (offset - table) // 8 + missing) * header.cluster_size
    return None


def pin_beyond_end(fd: int, header: Header, tables: Iterable[int], syncs: Syncs) -> int:
    """Keep damaged those entries that lead beyond the file's end, durably, before it grows: they
    would seem right then, and show one guest cluster's data in the place of another (blocks).

    They get a bit that makes them unaligned, for QEMU as well. Those that the file cannot come
    to by growing stay as they are. ``tables`` are the sound L2 tables, which are apart from each
    other. Returns how many entries were changed. Raises OSError.
    """
    end = align_down(os.fstat(fd).st_size, header.cluster_size)
    last = end + 2 * header.image_size + SPARE
    pinned = 0
    for table in (header.l1_table_offset, *tables):
        for offset, entries in chunks(fd, table, header.table_bytes):
            if max(entries) < end:
                continue
            for index, entry in enumerate(entries):
                if end <= entry < last and entry % header.cluster_size == 0:
                    word = store_entries(array("Q", [entry | PIN]))
                    write_exactly(fd, memoryview(word), offset + 8 * index)
                    pinned += 1
    if pinned:
        syncs.sync(fd)
    return pinned


def chunks(
    fd: int, offset: int, length: int, *, holes: bool = False
) -> Iterator[tuple[int, "array[int]"]]:
    """A table in pieces: (offset of the piece, its entries). Holes are left out, unless
    asked for: a table may have 1 GiB of them."""
    position, end = offset, offset + length
    while position < end:
        if not holes:
            data = files.next_data(fd, position)
            if data is None or data >= end:
                return
            position = max(position, align_down(data, 4096))
        piece = memoryview(bytearray(min(_CHUNK, end - position)))
        read_exactly(fd, piece, position)
        yield position, load_entries(bytes(piece))
        position += len(piece)


# -- giving leaked clusters back ----------------------------------------------------------


def _give_back(scan: _Scan, syncs: Syncs) -> int:
    """Fill the holes with data clusters from the end and cut the file there; returns how
    many leaked clusters are left, because a table at the end cannot move."""
    header = scan.header
    size = header.cluster_size
    end = header.header_size + scan.used.count  # with every hole filled
    holes = list(scan.used.missing(header.header_size, end))
    movers = list(_entries_from(scan, end * size)) if holes else []
    if len(movers) == len(holes):
        _move(scan.fd, movers, holes, size, syncs)
    else:
        end = scan.used.last() + 1
    if end * size < os.fstat(scan.fd).st_size:
        os.ftruncate(scan.fd, end * size)
        syncs.sync(scan.fd)
    return end - header.header_size - scan.used.count


def _entries_from(scan: _Scan, lowest: int) -> Iterator[tuple[int, int]]:
    """The data clusters at or behind an offset: (where the entry is, where the data is)."""
    header = scan.header
    for _, tables in chunks(scan.fd, header.l1_table_offset, header.table_bytes):
        for table in filter(None, tables):
            for chunk_offset, entries in chunks(scan.fd, table, header.table_bytes):
                for start, count, entry in rows(entries, header.cluster_size):
                    if entry <= ZERO or entry + count * header.cluster_size <= lowest:
                        continue
                    for index in range(start, start + count):
                        if entries[index] >= lowest:
                            yield chunk_offset + index * 8, entries[index]


def _move(
    fd: int, movers: list[tuple[int, int]], holes: list[int], size: int, syncs: Syncs
) -> None:
    buffer = memoryview(bytearray(size))
    for (_, source), hole in zip(movers, holes, strict=True):
        read_exactly(fd, buffer, source)
        write_exactly(fd, buffer, hole * size)
    syncs.sync(fd)
    for (entry_offset, _), hole in zip(movers, holes, strict=True):
        write_exactly(fd, memoryview((hole * size).to_bytes(8, "little")), entry_offset)
    syncs.sync(fd)
