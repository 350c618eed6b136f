# SPDX-License-Identifier: Apache-2.0
"""The L1 table, and a bounded cache of slices of L2 tables.

A slice is an array of 64-bit words; its *key* is the guest offset shifted right by
`Geometry.slice_bits`. Slices live in two generations: ``young`` has what was asked for
recently; when it is full it becomes the old generation, and what was in that and was
not asked for again is forgotten. That makes a hit one dictionary lookup. Slices that
were changed stay (in ``_dirty``, or in ``_flushing`` while a flush writes a copy of them)
until they are in the file.

A slice is checked when it comes in, as a whole, so that nobody has to check entries
again: every data cluster that it refers to is aligned, within the file, no metadata and,
unless the image is read-only, ours to change (refcount one).

A new L2 table is known to the tables in memory at once, but until a flush has written
it, what the file has in its place means nothing: slices of it that are not cached are
empty.
"""

import functools
import operator
import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from nbdstream.errors import LeafFormatError
from nbdstream.leaf.base import write_exactly
from nbdstream.leaf.durability import Syncs
from nbdstream.leaf.files import read_cached, zero_range
from nbdstream.leaf.qcow2.layout import (
    COMPRESSED,
    COPIED,
    LOW_32,
    OFFSET,
    RESERVED_L1,
    RESERVED_L2,
    ZERO,
    Geometry,
    is_run,
    joined_runs,
    load_words,
    store_words,
)
from nbdstream.leaf.qcow2.space import Metadata

# Bounds in bytes of table content, for each generation, and for the changed slices.
CACHE_BYTES = 12 << 20
DIRTY_BYTES = 16 << 20
# A piece of the L1 table that is skipped at a time when nothing is allocated.
SKIP = 1024


@dataclass
class TableSnapshot:
    """What a flush writes: copies, which nobody else touches.

    ``new_tables`` are the places of tables to make; ``slices`` and ``pointers`` (L1
    entries) are (offset in the file, content) and (index, content).
    """

    new_tables: list[int] = field(default_factory=list)
    slices: list[tuple[int, "array[int]"]] = field(default_factory=list)
    pointers: list[tuple[int, int]] = field(default_factory=list)


class Tables:
    """L1 and L2 of one image. Belongs to the event loop's thread.

    Attributes:
        young: the slices asked for recently, by key; for `locate` to look into.
        l1: the L1 table, as far as the disk's size needs it.
    """

    def __init__(
        self,
        fd: int,
        geometry: Geometry,
        l1: "array[int]",
        metadata: Metadata,
        file_end: Callable[[], int],
        refcount: Callable[[int], int] | None,
    ) -> None:
        """``file_end`` says where the file's used part ends; ``refcount`` reads a host
        cluster's refcount by its offset, None for an image that is read-only."""
        self._fd = fd
        self._geometry = geometry
        self.l1 = l1
        self._metadata = metadata
        self._file_end = file_end
        self._refcount = refcount
        self._reserved = RESERVED_L2 | (ZERO if geometry.extended else 0)
        self._per_table = geometry.table_bits - geometry.slice_bits
        self._capacity = max(1, CACHE_BYTES // geometry.slice_bytes)
        self._dirty_limit = max(1, DIRTY_BYTES // geometry.slice_bytes)
        self.young: dict[int, array[int]] = {}
        self._old: dict[int, array[int]] = {}
        self._dirty: dict[int, array[int]] = {}
        self._flushing: dict[int, array[int]] = {}
        self._new: set[int] = set()  # L1 indexes of tables that are not in the file yet
        self._flushing_new: set[int] = set()

    # -- looking -----------------------------------------------------------------------

    def load(self, offset: int) -> "array[int] | None":
        """The slice for a guest offset; None where there is no L2 table.

        Raises ColdMetadata, LeafFormatError, OSError.
        """
        key = offset >> self._geometry.slice_bits
        entries = self.young.get(key)
        if entries is None:
            pointer = self.l1[offset >> self._geometry.table_bits]
            if not pointer:
                return None
            entries = self._find(key)
            if entries is None:
                entries = self._read(key, pointer & OFFSET)
            self._keep(key, entries)
        return entries

    def next_table(self, offset: int) -> int:
        """Where the first L2 table behind a guest offset without one begins to apply.

        May stop early, at a place that has none either.
        """
        index = (offset >> self._geometry.table_bits) + 1
        while index < len(self.l1) and not self.l1[index]:
            if any(self.l1[index : index + SKIP]):
                index += 1
            else:
                index += SKIP
        return index << self._geometry.table_bits

    def _find(self, key: int) -> "array[int] | None":
        for generation in (self._old, self._dirty, self._flushing):
            entries = generation.get(key)
            if entries is not None:
                return entries
        index = key >> self._per_table
        if index in self._new or index in self._flushing_new:
            return array("Q", bytes(self._geometry.slice_bytes))
        return None

    def _keep(self, key: int, entries: "array[int]") -> None:
        if len(self.young) >= self._capacity:
            self._old = dict(self.young)
            self.young.clear()  # the same object for ever: `locate` holds on to it
        self.young[key] = entries

    def _place(self, key: int, table: int) -> int:
        """Where a slice lies in the file."""
        return table + (key & ((1 << self._per_table) - 1)) * self._geometry.slice_bytes

    def _read(self, key: int, table: int) -> "array[int]":
        at = self._place(key, table)
        size = self._geometry.slice_bytes
        data = read_cached(self._fd, at, size)
        entries = load_words(data)
        if any(data) and not self._is_sound_run(entries):
            self._check(key, entries)
        return entries

    # -- checking ----------------------------------------------------------------------

    def _is_sound_run(self, entries: "array[int]") -> bool:
        """Whether the slice has data clusters in a row, nothing else, and no fault: what a
        guest or a stream that writes in sequence leaves behind, quickly recognised."""
        geometry = self._geometry
        firsts = entries[:: geometry.words]
        host = firsts[0] & OFFSET
        length = len(firsts) << geometry.cluster_bits
        return bool(
            host
            and firsts[0] == host | COPIED
            and not host % geometry.cluster_size
            and host + length <= self._file_end()
            and is_run(firsts, geometry.cluster_size)
            and (geometry.words == 1 or set(entries[1::2]) == {geometry.full})
            and not self._metadata.within(host, length)
        )

    def _check(self, key: int, entries: "array[int]") -> None:
        """Refuse a slice whose data clusters are not where data may be."""
        words = self._geometry.words
        first_words = entries[::words]
        seen = functools.reduce(operator.or_, first_words)
        if words == 2:
            self._check_bitmaps(key, entries)
        if seen & COMPRESSED:
            self._check_compressed(key, first_words)
            first_words = array("Q", (e for e in first_words if not e & COMPRESSED))
            seen = functools.reduce(operator.or_, first_words, 0)
        if seen & self._reserved or COPIED in first_words:
            raise self._damaged(key, "has entries that mean nothing")
        offsets = {entry & OFFSET for entry in first_words}
        offsets.discard(0)
        if not offsets:
            return
        if functools.reduce(operator.or_, offsets) & (self._geometry.cluster_size - 1):
            raise self._damaged(key, "refers to a cluster that is not aligned")
        if max(offsets) >= self._file_end():
            raise self._damaged(key, f"refers to {max(offsets):#x}, beyond the file's end")
        overlap = self._metadata.overlap(offsets)
        if overlap is not None:
            raise self._damaged(key, f"has data at {overlap:#x}, where a table lies")
        if self._refcount is not None and _count(COPIED, first_words) != _count(
            OFFSET, first_words
        ):
            self._claim(key, entries)

    def _check_bitmaps(self, key: int, entries: "array[int]") -> None:
        for index in range(0, len(entries), 2):
            entry, bitmap = entries[index], entries[index + 1]
            if not bitmap:
                continue
            if entry & COMPRESSED:
                entries[index + 1] = 0  # "not used"; so that `locate` need not look twice
            elif bitmap & (bitmap >> 32):
                raise self._damaged(key, "has subclusters that are both data and zero")
            elif bitmap & LOW_32 and not entry & OFFSET:
                raise self._damaged(key, "has allocated subclusters in no cluster")

    def _check_compressed(self, key: int, entries: "array[int]") -> None:
        for entry in entries:
            if entry & COMPRESSED:
                offset, length = self._geometry.packed_range(entry & (COMPRESSED - 1))
                # The last sector may be cut short by the file's end.
                if offset < self._geometry.cluster_size or offset >= self._file_end():
                    raise self._damaged(key, f"has compressed data at {offset:#x} (+{length})")

    def _claim(self, key: int, entries: "array[int]") -> None:
        """Make sure that what the slice refers to may be changed in place.

        Without internal snapshots (which are refused on write) all clusters have a
        refcount of one; entries that do not say so get the flag that does.
        """
        assert self._refcount is not None
        for index in range(0, len(entries), self._geometry.words):
            entry = entries[index]
            if entry and not entry & (COPIED | COMPRESSED) and entry & OFFSET:
                count = self._refcount(entry & OFFSET)
                if count != 1:
                    raise self._damaged(
                        key, f"refers to {entry & OFFSET:#x}, which has {count} references"
                    )
                entries[index] = entry | COPIED

    def _damaged(self, key: int, what: str) -> LeafFormatError:
        offset = key << self._geometry.slice_bits
        return LeafFormatError(
            f"the L2 table for offset {offset:#x} {what}; try: qemu-img check -r all"
        )

    # -- changing ----------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        return bool(self._dirty or self._new)

    def room(self, keys: set[int]) -> bool:
        """Whether these slices may become dirty without going over the bound."""
        if len(self._dirty) + len(keys) <= self._dirty_limit:
            return True
        return len(self._dirty.keys() | keys) <= self._dirty_limit or not self._dirty

    def add_table(self, index: int, host: int) -> None:
        """A new, empty L2 table for an L1 entry that had none."""
        self.l1[index] = host | COPIED
        self._new.add(index)
        self._metadata.add(host, self._geometry.cluster_size)

    def mark_dirty(self, key: int, entries: "array[int]") -> None:
        """This slice was changed."""
        self._dirty[key] = entries

    # -- flushing ----------------------------------------------------------------------

    def begin_flush(self) -> TableSnapshot:
        """Copy what has to go to the file."""
        assert not self._flushing, "one flush at a time"
        self._flushing, self._dirty = self._dirty, {}
        self._flushing_new, self._new = self._new, set()
        snapshot = TableSnapshot()
        for key, entries in self._flushing.items():
            table = self.l1[key >> self._per_table] & OFFSET
            snapshot.slices.append((self._place(key, table), entries[:]))
        for index in self._flushing_new:
            snapshot.new_tables.append(self.l1[index] & OFFSET)
            snapshot.pointers.append((index, self.l1[index]))
        return snapshot

    def end_flush(self, *, ok: bool) -> None:
        """The snapshot is durable, or has to be taken again."""
        if not ok:
            self._dirty = {**self._flushing, **self._dirty}
            self._new |= self._flushing_new
        self._flushing = {}
        self._flushing_new = set()


def _count(bits: int, words: "array[int]") -> int:
    """How many words have any of these bits."""
    return len(list(filter(bits.__and__, words)))


def load_l1(fd: int, geometry: Geometry, offset: int, metadata: Metadata, end: int) -> "array[int]":
    """Read the L1 table as far as the disk needs it, check it, note its tables (may block).

    Raises LeafFormatError, OSError.
    """
    size = geometry.l1_entries * 8
    l1 = load_words(os.pread(fd, size, offset).ljust(size, b"\0"))
    tables = [entry & OFFSET for entry in l1 if entry]
    for entry in filter(None, l1):
        table = entry & OFFSET
        if entry & RESERVED_L1 or table % geometry.cluster_size or not 0 < table < end:
            raise LeafFormatError(f"the L1 table has an entry {entry:#x}, which is no L2 table")
    metadata.add_all(tables)
    return l1


def write_tables(
    fd: int, snapshot: TableSnapshot, geometry: Geometry, l1_offset: int, syncs: Syncs
) -> None:
    """Worker: write a snapshot and make it durable. Raises OSError.

    New tables come first and are synced before the L1 entries that make them visible:
    otherwise a crash could leave an entry that points to whatever was there before.
    """
    for offset in snapshot.new_tables:
        # A hole where that can be: most of a new table is empty for long.
        zero_range(fd, offset, geometry.cluster_size, unmap=True)
    for offset, data in joined_runs(
        (offset, store_words(entries)) for offset, entries in sorted(snapshot.slices)
    ):
        write_exactly(fd, memoryview(data), offset)
    if snapshot.pointers:
        syncs.sync(fd)
        for offset, data in joined_runs(
            (l1_offset + 8 * index, store_words([entry]))
            for index, entry in sorted(snapshot.pointers)
        ):
            write_exactly(fd, memoryview(data), offset)
    syncs.sync(fd)
