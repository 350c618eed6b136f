# SPDX-License-Identifier: Apache-2.0
"""Who refers to which host cluster: a walk over all tables of an image, counted.

This reads the file, not an open leaf's memory, and trusts nothing in it. What it finds
wrong on the way it counts as ``qemu-img check`` counts corruptions. A table that several
others refer to is read once and counts for each; a table that is a hole in the file is
not read at all; so the work is bounded by the data that the file has, whatever it says.

Specification: QEMU's docs/interop/qcow2, "Snapshots" and "Bitmaps" for the tables that
this package otherwise leaves alone.
"""

import os
import struct
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from nbdstream.errors import LeafFormatError
from nbdstream.extents import align_up
from nbdstream.leaf import files
from nbdstream.leaf.qcow2.header import BITMAPS, BITMAPS_EXTENSION, Header
from nbdstream.leaf.qcow2.layout import (
    COMPRESSED,
    COPIED,
    LOW_32,
    MAX_L1_BYTES,
    OFFSET,
    RESERVED_L1,
    RESERVED_L2,
    SLICE_BYTES,
    ZERO,
    is_run,
    load_words,
)

# Counts are kept in pages, made when needed: one byte each, larger ones aside.
PAGE = 1024
MANY = 255
ONES = b"\1" * PAGE
# What hostile references, scattered over a huge sparse file, may cost beyond what the
# file itself takes on the disk.
SPARE_BYTES = 64 << 20

SNAPSHOT = struct.Struct(">QIHHIIQII")
BITMAP = struct.Struct(">QIIBBHI")
BITMAPS_HEADER = struct.Struct(">IIQQ")
RESERVED_BITMAP_ENTRY = 0xFF00_0000_0000_01FE
MAX_OFFSET = 1 << 62  # no file reaches it, and the system calls take it
MAX_DIRECTORY_BYTES = 64 << 20
MAX_BITMAP_TABLE = 0x800_0000  # entries: QEMU's limit


class References:
    """How often each host cluster is referred to."""

    def __init__(self, limit: int) -> None:
        """``limit``: bytes of memory for the counts."""
        self._pages: dict[int, bytearray] = {}
        self._limit = limit // PAGE
        self._large: Counter[int] = Counter()
        self.clusters = 0  # one more than the last cluster that is referred to

    def add(self, first: int, count: int = 1, times: int = 1) -> None:
        """Count references to a run of clusters. Raises LeafFormatError."""
        end = first + count
        self.clusters = max(self.clusters, end)
        while first < end:
            page = self._page(first // PAGE)
            start = first % PAGE
            stop = min(PAGE, start + end - first)
            if times == 1 and not any(page[start:stop]):
                page[start:stop] = ONES[start:stop]
            else:
                for index in range(start, stop):
                    self._add_one(page, index, first - start + index, times)
            first += stop - start

    def _add_one(self, page: bytearray, index: int, cluster: int, times: int) -> None:
        total = page[index] + times
        if total < MANY:
            page[index] = total
        else:
            self._large[cluster] += times if page[index] == MANY else total
            page[index] = MANY

    def _page(self, number: int) -> bytearray:
        page = self._pages.get(number)
        if page is None:
            if len(self._pages) >= self._limit:
                raise LeafFormatError("the tables refer to clusters all over a mostly empty file")
            page = self._pages[number] = bytearray(PAGE)
        return page

    def get(self, cluster: int) -> int:
        """How often a cluster is referred to."""
        page = self._pages.get(cluster // PAGE)
        count = page[cluster % PAGE] if page is not None else 0
        return self._large[cluster] if count == MANY else count

    def windows(self, size: int) -> set[int]:
        """Which runs of ``size`` clusters, by number, may have references."""
        step = min(size, PAGE)
        return {
            (number * PAGE + part) // size
            for number in self._pages
            for part in range(0, PAGE, step)
        }

    def window(self, first: int, count: int) -> bytes:
        """The counts of a run of clusters, a byte each; `MANY` stands for that or more."""
        parts = []
        at, end = first, first + count
        while at < end:
            stop = min(end, (at // PAGE + 1) * PAGE)
            page = self._pages.get(at // PAGE)
            skip = at % PAGE
            parts.append(page[skip : skip + stop - at] if page is not None else bytes(stop - at))
            at = stop
        return b"".join(parts)


class Run(NamedTuple):
    """Entries of an L2 table at ``place`` in the file: ``length`` clusters that are alike, one
    behind the other; ``entry`` and ``bitmap`` are the first one's words (or 0)."""

    place: int
    entry: int
    bitmap: int
    length: int


class Walk:
    """The walk, and what it found.

    Attributes:
        references: the counts, complete after `run`.
        errors: structures that cannot be right.
        messages: a line for each kind of error.
    """

    def __init__(self, fd: int, header: Header) -> None:
        status = os.fstat(fd)
        self._fd = fd
        self._header = header
        self._geometry = header.geometry
        self._file_size = status.st_size
        self.references = References(SPARE_BYTES + status.st_blocks * 512)
        self._messages: Counter[str] = Counter()

    @property
    def errors(self) -> int:
        return self._messages.total()

    @property
    def messages(self) -> tuple[str, ...]:
        return tuple(f"{text} ({count}x)" for text, count in self._messages.items())

    def _error(self, text: str, times: int = 1) -> None:
        self._messages[text] += times

    def _refer(self, offset: int, length: int, times: int = 1) -> None:
        """A range of the file is referred to. Its last cluster may be cut by the file's end."""
        if not length:
            return
        if offset + length - self._file_size >= self._geometry.cluster_size:
            self._error("reference to space beyond the end of the file", times)
            return
        first = offset >> self._geometry.cluster_bits
        last = (offset + length - 1) >> self._geometry.cluster_bits
        self.references.add(first, last - first + 1, times)

    def run(self) -> None:
        """Walk over everything but the refcount blocks. Raises LeafFormatError, OSError."""
        header = self._header
        self._refer(0, header.cluster_size)
        l1_tables = [(header.l1_table_offset, header.l1_size), *self._snapshots()]
        tables: list[int] = []
        budget = MAX_L1_BYTES + max(MAX_L1_BYTES, self._file_size)
        for offset, size in l1_tables:
            budget -= size * 8
            if size * 8 > MAX_L1_BYTES or budget < 0:
                raise LeafFormatError(f"an L1 table of {size} entries at {offset:#x} is too large")
            self._refer(offset, size * 8)
            tables += self._l1_entries(offset, size)
        for table, group in groupby(sorted(tables)):
            self._l2_table(table, sum(1 for _ in group))
        self._bitmaps()
        self._refer(
            header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits
        )

    def run_refcount_blocks(self, blocks: "array[int]") -> list[tuple[int, bool]]:
        """Count the refcount blocks, last of all.

        Returns the indexes of those that cannot be used (not in the file, or referred to
        by another entry as well), and whether the count includes them.
        """
        bad = []
        clusters = max(self.references.clusters, self._geometry.clusters(self._file_size))
        for index, entry in enumerate(blocks):
            if not entry:
                continue
            cluster = entry >> self._geometry.cluster_bits
            if entry & ~OFFSET & 0x1FF or entry % self._geometry.cluster_size:
                self._error("refcount table entry that is not aligned")
                bad.append((index, False))
            elif cluster >= clusters:
                self._error("refcount block beyond the end of the file")
                bad.append((index, False))
            else:
                self._refer(entry, self._geometry.cluster_size)
                if self.references.get(cluster) != 1:
                    self._error("refcount block in a cluster with other content")
                    bad.append((index, True))
        return bad

    # -- L1 and L2 -----------------------------------------------------------------------

    def _l1_entries(self, offset: int, size: int) -> Iterator[int]:
        for entry in filter(None, self.read_words(offset, size * 8)):
            if entry & RESERVED_L1:
                self._error("L1 entry with reserved bits set")
            table = entry & OFFSET
            if table:
                yield table

    def read_words(self, offset: int, length: int) -> "array[int]":
        """The table of ``length`` bytes at ``offset`` of the file; zeroes where the file has ended
        or has a hole. Raises LeafFormatError (no file is as long), OSError."""
        if offset >= MAX_OFFSET:
            raise LeafFormatError(f"a table at {offset:#x} is beyond any file")
        data = files.next_data(self._fd, offset)
        if data is None or data >= offset + length:
            return load_words(bytes(length))
        return load_words(os.pread(self._fd, length, offset).ljust(length, b"\0"))

    def _read(self, offset: int, length: int) -> bytes:
        """A part of the file, as far as it goes. Raises LeafFormatError, OSError."""
        if offset >= MAX_OFFSET:
            raise LeafFormatError(f"a table at {offset:#x} is beyond any file")
        return os.pread(self._fd, length, offset)

    def _l2_table(self, table: int, times: int) -> None:
        """One L2 table, which ``times`` L1 entries refer to."""
        size = self._geometry.cluster_size
        self._refer(table, size, times)
        if table % size:
            self._error("L2 table that is not aligned to a cluster", times)
        for run in self.l2_runs(table):
            if run.entry & COMPRESSED:
                self._compressed_entry(run, times)
            else:
                self._standard_entries(run, times)

    def l2_runs(self, table: int) -> Iterator[Run]:
        """The entries of an L2 table that say anything."""
        words = self.read_words(table, self._geometry.cluster_size)
        step = self._geometry.words
        for start in range(0, len(words), SLICE_BYTES // 8):
            part = words[start : start + SLICE_BYTES // 8]
            if any(part):
                bitmaps = part[1::2] if step == 2 else array("Q", bytes(8 * len(part)))
                yield from self._runs(table + 8 * start, part[::step], bitmaps)

    def _runs(self, place: int, entries: "array[int]", bitmaps: "array[int]") -> Iterator[Run]:
        """Runs in these entries: all of them, or those of each half."""
        entry, bitmap = entries[0], bitmaps[0]
        count = len(entries)
        step = self._geometry.cluster_size if entry & OFFSET else 0
        if count == 1 or (not entry & COMPRESSED and is_run(entries, step) and is_run(bitmaps, 0)):
            if entry or bitmap:
                yield Run(place, entry, bitmap, count)
            return
        half = count // 2
        yield from self._runs(place, entries[:half], bitmaps[:half])
        place += 8 * self._geometry.words * half
        yield from self._runs(place, entries[half:], bitmaps[half:])

    def _compressed_entry(self, run: Run, times: int) -> None:
        if run.entry & COPIED:
            self._error("compressed cluster with the copied flag", times)
        if run.bitmap:  # qemu-img does not count what such an entry refers to
            self._error("compressed cluster with subclusters", times)
            return
        self._refer(*self._geometry.packed_range(run.entry & (COMPRESSED - 1)), times)

    def _standard_entries(self, run: Run, times: int) -> None:
        entry, bitmap = run.entry, run.bitmap
        times_all = times * run.length
        if entry & (RESERVED_L2 | (ZERO if self._geometry.extended else 0)):
            self._error("L2 entry with reserved bits set", times_all)
        host = entry & OFFSET
        if host:
            if bitmap & (bitmap >> 32):
                self._error("subcluster that is both data and zero", times_all)
            if host % self._geometry.cluster_size:
                self._error("data cluster that is not aligned", times_all)
            size = self._geometry.cluster_size
            if host + run.length * size <= self._file_size:
                self._refer(host, run.length * size, times)
            else:
                for number in range(run.length):
                    self._refer(host + number * size, size, times)
        elif bitmap & LOW_32:
            self._error("allocated subcluster in no cluster", times_all)

    # -- what this package does not use ----------------------------------------------------

    def _snapshots(self) -> list[tuple[int, int]]:
        """(offset, entries) of the L1 tables of internal snapshots; counts their directory."""
        start = at = self._header.snapshots_offset
        tables = []
        for _ in range(self._header.nb_snapshots):
            fields = self._read(at, SNAPSHOT.size)
            if len(fields) < SNAPSHOT.size:
                raise LeafFormatError(f"the snapshot table at {start:#x} is cut off")
            offset, entries, id_size, name_size, *_, extra = SNAPSHOT.unpack(fields)
            tables.append((offset, entries))
            at += align_up(SNAPSHOT.size + extra + id_size + name_size, 8)
        if tables:
            self._refer(start, at - start)
        return tables

    def _bitmaps(self) -> None:
        """Count the clusters of persistent dirty bitmaps, unless they are void."""
        data = self._header.extension(BITMAPS_EXTENSION)
        if data is None or not self._header.autoclear_features & BITMAPS:
            return
        if len(data) < BITMAPS_HEADER.size:
            raise LeafFormatError("the bitmaps extension is too short")
        count, _, size, offset = BITMAPS_HEADER.unpack_from(data)
        if size > MAX_DIRECTORY_BYTES:
            raise LeafFormatError(f"a bitmap directory of {size} bytes is too large")
        self._refer(offset, size)
        directory = self._read(offset, size)
        at = 0
        for _ in range(count):
            if at + BITMAP.size > len(directory):
                raise LeafFormatError(f"the bitmap directory at {offset:#x} is cut off")
            table, entries, *_, name_size, extra = BITMAP.unpack_from(directory, at)
            self._bitmap(table, entries)
            at += align_up(BITMAP.size + name_size + extra, 8)

    def _bitmap(self, table: int, entries: int) -> None:
        if entries > min(MAX_BITMAP_TABLE, self._file_size // 8):
            raise LeafFormatError(f"a bitmap table of {entries} entries is too large")
        self._refer(table, entries * 8)
        for entry in filter(None, self.read_words(table, entries * 8)):
            if entry & RESERVED_BITMAP_ENTRY:
                self._error("bitmap table entry with reserved bits set")
            elif entry & OFFSET:
                self._refer(entry & OFFSET, self._geometry.cluster_size)
