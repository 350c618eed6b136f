# SPDX-License-Identifier: Apache-2.0
"""The two levels of tables of a QED image (docs/interop/qed_spec.rst, "Tables").

The L1 table is in memory as far as the disk reaches; of the L2 tables a bounded number of
4 KiB pages is, 512 entries each. An entry is 0 (unallocated), 1 (zeroes), or the
offset of a data cluster. Whatever comes from the file is judged once, when it enters
memory; what is in memory is trusted. Entries that are damaged fail what lies under them
and nothing else (`nbdstream.leaf.pages`).

Clusters are only ever taken from the end of the file, and stay with their guest cluster
for good: zeroing one punches a hole into it. So no cluster ever changes hands, and no
crash can show one guest cluster's bytes in the place of another's.
"""

import os
import struct
import sys
from array import array
from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from itertools import pairwise

from nbdstream.errors import LeafFormatError
from nbdstream.extents import align_up
from nbdstream.leaf.base import ALL_ZERO, SCATTERED
from nbdstream.leaf.pages import PAGE_SIZE, ZERO_PAGE, PageCache
from nbdstream.leaf.qed.header import Header
from nbdstream.leaf.redo import TABLE, RedoLog

PAGE_ENTRIES = PAGE_SIZE // 8
UNALLOCATED = 0
ZERO = 1
MAX_DAMAGED = 1024  # damaged L1 entries that are lived with
_REMEDY = "try: nbdstream check --repair"

_ENTRY = struct.Struct("<Q")
_PAGE = struct.Struct(f"<{PAGE_ENTRIES}Q")


def load_entries(data: bytes) -> "array[int]":
    """Table entries as they are in a file, as integers."""
    entries = array("Q", data)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


def store_entries(entries: "array[int]") -> bytes:
    """The opposite of `load_entries`."""
    if sys.byteorder == "big":
        entries = array("Q", entries)
        entries.byteswap()
    return entries.tobytes()


def rows(entries: Sequence[int], step: int) -> Iterator[tuple[int, int, int]]:
    """Entries in rows (index, count, first entry): of zeroes, of ones, or of clusters that
    follow each other."""
    start, total = 0, len(entries)
    while start < total:
        entry = entries[start]
        distance = step if entry > ZERO else 0
        stop, expected = start + 1, entry + distance
        while stop < total and entries[stop] == expected:
            stop += 1
            expected += distance
        yield start, stop - start, entry
        start = stop


class Tables:
    """Where the guest's clusters are, and the end of the file, where new ones come from.

    Attributes:
        cache: pages of L2 tables, by page number in the file.
        l1: the L1 entries that the disk's size needs.
        damaged_l1: L1 entries that lead to no table, by index; they are 0 in ``l1``.
        dirty_l1: pages of the L1 table that only memory has.
        end: where the next cluster will be; a multiple of the cluster size.
    """

    def __init__(self, fd: int, header: Header, end: int) -> None:
        """Load the L1 table (may block). Raises LeafFormatError, without the path, OSError."""
        self._fd = fd
        self._header = header
        self.cluster_bits = header.cluster_size.bit_length() - 1
        self._table_bits = header.table_entries.bit_length() - 1
        self._table_mask = header.table_entries - 1
        self._cluster_mask = header.cluster_size - 1
        span = header.table_entries * header.cluster_size
        length = 8 * (align_up(header.image_size, span) // span)
        data = os.pread(fd, length, header.l1_table_offset).ljust(length, b"\0")
        self.l1 = load_entries(data)
        self.dirty_l1: set[int] = set()
        self._flushing_l1: set[int] = set()
        self.end = end
        self._first_end = end
        self.damaged_l1: dict[int, int] = {}
        self._starts = self._judge_l1()
        self.cache = PageCache(fd, self._judge_page)
        self._redo = RedoLog()

    def log_to(self, redo: RedoLog) -> None:
        """Record all changes in a redo log from now on."""
        self._redo = redo

    # -- what is in the file -----------------------------------------------------------

    def _judge_l1(self) -> "array[int]":
        """Sorted offsets of all tables. L1 entries of tables that are not in the file, or not
        apart from each other, are damaged."""
        header = self._header
        limit = self.end - header.table_bytes
        first = header.l1_table_offset
        starts = [(first, -1)]
        for index, start in enumerate(self.l1):
            if not start:
                continue
            if (
                start % header.cluster_size
                or not header.header_bytes <= start <= limit
                or first - header.table_bytes < start < first + header.table_bytes
            ):
                self._damage_l1(index)
            else:
                starts.append((start, index))
        starts.sort()
        for (start, index), (after, other) in pairwise(starts):
            if after < start + header.table_bytes:
                self._damage_l1(index)
                self._damage_l1(other)
        return array("Q", (start for start, index in starts if index not in self.damaged_l1))

    def _damage_l1(self, index: int) -> None:
        if len(self.damaged_l1) >= MAX_DAMAGED:
            raise LeafFormatError("the L1 table has many entries that lead to no table")
        self.damaged_l1.setdefault(index, self.l1[index])
        self.l1[index] = UNALLOCATED

    def _judge_page(self, number: int, page: bytes) -> dict[int, bytes]:
        """The entries that do not point to places where data may be. Only a page that was
        changed since the open may refer to what lies behind the end that the file had then."""
        end = self.end if self.cache.written(number) else self._first_end
        damaged = {}
        for index, entry in enumerate(_PAGE.unpack(page)):
            if entry > ZERO and self._wrong(entry, end):
                damaged[index * 8] = page[index * 8 : index * 8 + 8]
        return damaged

    def _wrong(self, entry: int, end: int) -> str:
        """What is wrong with the entry of a data cluster, or ""."""
        header = self._header
        if entry & self._cluster_mask:
            return "is not aligned"
        if not header.header_bytes <= entry <= end - header.cluster_size:
            return "is not within the file"
        table = bisect_right(self._starts, entry) - 1
        if table >= 0 and entry < self._starts[table] + header.table_bytes:
            return "lies within a table"
        return ""

    def first_missing(self, offset: int, entries: "array[int]") -> int | None:
        """The first of these entries of a table, as in the file at an offset, that has nothing
        or is damaged."""
        for start, count, entry in rows(entries, self._header.cluster_size):
            if entry == UNALLOCATED:
                return start
            if entry == ZERO:
                continue
            for index in range(start, start + count):
                written = self.cache.written((offset + 8 * index) // PAGE_SIZE)
                if self._wrong(entries[index], self.end if written else self._first_end):
                    return index
        return None

    def _damage(self, number: int, index: int, cluster: int) -> LeafFormatError:
        """What is wrong with a damaged entry."""
        entry: int = _ENTRY.unpack(self.cache.damaged[number][index * 8])[0]
        return LeafFormatError(
            f"the QED L2 entry at {number * PAGE_SIZE + index * 8:#x}, for guest offset"
            f" {cluster << self.cluster_bits:#x}: a data cluster at {entry:#x}"
            f" {self._wrong(entry, self._first_end)}; {_REMEDY}"
        )

    # -- looking up --------------------------------------------------------------------

    def place(self, cluster: int) -> tuple[int, int] | None:
        """The page number and the byte within that page of a cluster's L2 entry, or None
        where there is no L2 table."""
        l2 = self.l1[cluster >> self._table_bits]
        if l2 == UNALLOCATED:
            return None
        index = cluster & self._table_mask
        return (l2 // PAGE_SIZE) + index // PAGE_ENTRIES, index % PAGE_ENTRIES * 8

    def locate(self, offset: int, length: int) -> int:
        """As `Leaf.locate`, from memory alone."""
        cluster = offset >> self.cluster_bits
        l2 = self.l1[cluster >> self._table_bits]
        if l2 == UNALLOCATED:
            return SCATTERED
        index = cluster & self._table_mask
        page = self.cache.pages.get((l2 >> 12) + (index >> 9))
        if page is None:
            return SCATTERED
        count = ((offset + length - 1) >> self.cluster_bits) - cluster + 1
        if count == 1:
            entry: int = _ENTRY.unpack_from(page, (index & 511) << 3)[0]
            if entry > ZERO:
                return entry + (offset & self._cluster_mask)
            return ALL_ZERO if entry == ZERO else SCATTERED
        if (index & 511) + count > PAGE_ENTRIES:
            return SCATTERED
        entries = struct.unpack_from(f"<{count}Q", page, (index & 511) << 3)
        first: int = entries[0]
        size = self._header.cluster_size
        if first > ZERO and entries == tuple(range(first, first + count * size, size)):
            return first + (offset & self._cluster_mask)
        return ALL_ZERO if first == ZERO and entries.count(ZERO) == count else SCATTERED

    def runs(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Tile clusters ``first`` to ``stop`` - 1 with (cluster, count, entry), where the
        entry is that of the first of ``count`` alike ones, or of ones in a row.

        Lazy, and quick over what is unallocated. Raises ColdMetadata, LeafFormatError.
        """
        while first < stop:
            index = first & self._table_mask
            table_stop = min(first - index + self._header.table_entries, stop)
            where = self.place(first)
            if where is None:
                last = first >> self._table_bits
                if last in self.damaged_l1:
                    raise LeafFormatError(
                        f"entry {last} of the QED L1 table is {self.damaged_l1[last]:#x}, which is"
                        f" no table: guest offsets from {first << self.cluster_bits:#x} are lost;"
                        f" {_REMEDY}"
                    )
                limit = ((stop - 1) >> self._table_bits) + 1
                while last < limit and self.l1[last] == UNALLOCATED:
                    if last in self.damaged_l1:
                        break
                    last += 1
                table_stop = min(last << self._table_bits, stop)
                yield first, table_stop - first, UNALLOCATED
                first = table_stop
                continue
            number, byte = where
            page = self.cache.pages.get(number, ZERO_PAGE)
            if page is ZERO_PAGE:  # not loaded, or empty: skip as far as possible
                pages = (index % PAGE_ENTRIES + table_stop - first - 1) // PAGE_ENTRIES + 1
                used = self.cache.next_used(number, number + pages)
                if used > number:
                    skipped = (used - number) * PAGE_ENTRIES - index % PAGE_ENTRIES
                    count = min(skipped, table_stop - first)
                    yield first, count, UNALLOCATED
                    first += count
                    continue
                page = self.cache.load(number)
            count = min(PAGE_ENTRIES - byte // 8, table_stop - first)
            good = self._good(number, byte, count)
            entries = struct.unpack_from(f"<{good}Q", page, byte)
            for start, length, entry in rows(entries, self._header.cluster_size):
                yield first + start, length, entry
            if good < count:
                raise self._damage(number, byte // 8 + good, first + good)
            first += count

    def _good(self, number: int, byte: int, count: int) -> int:
        """How many of the entries at a place of a page come before one that is damaged."""
        damaged = self.cache.damaged.get(number)
        if damaged is None:
            return count
        return min((at - byte) // 8 for at in (byte + count * 8, *damaged) if at >= byte)

    # -- changing ----------------------------------------------------------------------

    def add_table(self, cluster: int) -> None:
        """Give a cluster that has none an L2 table, at the end of the file.

        Raises FlushNeeded, OSError.
        """
        self._redo.reserve(1)
        start = self.end
        # What may be there is what a failed write left: the new table has to be zeroes.
        os.ftruncate(self._fd, start)
        os.ftruncate(self._fd, start + self._header.table_bytes)
        self.end = start + self._header.table_bytes
        index = cluster >> self._table_bits
        self.l1[index] = start
        self.dirty_l1.add(index // PAGE_ENTRIES)
        insort(self._starts, start)
        self._redo.append(TABLE | index, start)

    def claim(self, first: int, count: int) -> list[tuple[bytearray, int, int]]:
        """Get ready to `store` entries of clusters that have an L2 table: (page, byte, count).

        Changes nothing that can be seen. Raises ColdMetadata, FlushNeeded.
        """
        claims = []
        stop = first + count
        while first < stop:
            where = self.place(first)
            assert where is not None
            number, byte = where
            length = min(PAGE_ENTRIES - byte // 8, stop - first)
            claims.append((self.cache.writable(number), byte, length))
            first += length
        return claims

    def store(self, claims: list[tuple[bytearray, int, int]], cluster: int, entry: int) -> None:
        """Set the claimed entries of clusters from ``cluster`` on to `ZERO`, or to data clusters
        in a row from ``entry`` on."""
        self._redo.append(cluster, sum(count for _, _, count in claims), entry)
        step = self._header.cluster_size if entry > ZERO else 0
        for page, byte, count in claims:
            entries = (entry + step * index for index in range(count))
            struct.pack_into(f"<{count}Q", page, byte, *entries)
            entry += step * count

    # -- flushing ----------------------------------------------------------------------

    def begin_flush(self) -> tuple[dict[int, bytes | bytearray], dict[int, bytes]]:
        """The snapshot: pages of L2 tables, and of the L1 table, by page number in the file."""
        first = self._header.l1_table_offset // PAGE_SIZE
        l1_pages = {}
        for index in self.dirty_l1:
            start = index * PAGE_ENTRIES
            entries = self.l1[start : start + PAGE_ENTRIES]
            for damaged, entry in self.damaged_l1.items():
                if start <= damaged < start + len(entries):
                    entries[damaged - start] = entry
            # Entries behind the disk's end, in the last page, are none of ours: not written.
            l1_pages[first + index] = store_entries(entries)
        l2_pages = self.cache.begin_flush()
        self._flushing_l1, self.dirty_l1 = self.dirty_l1, set()
        return l2_pages, l1_pages

    def end_flush(self, *, ok: bool) -> None:
        """The snapshot is durable, or dirty again."""
        self.cache.end_flush(ok=ok)
        if not ok:
            self.dirty_l1 |= self._flushing_l1
        self._flushing_l1 = set()
