# SPDX-License-Identifier: Apache-2.0
"""The L1 table, and a bounded cache of slices of L2 tables.

A slice is an array of 64-bit words; its *key* is the guest offset shifted right by
`Geometry.slice_bits`. Slices live in two generations: ``young`` has what was asked for
recently; when it is full it becomes the old generation, and what was in that and was
not asked for again is forgotten. That makes a hit one dictionary lookup. Slices that
were changed stay (in ``_dirty``, or in ``_flushing`` while a flush writes a copy of them)
until they are in the file.

A slice is checked when it comes in, as a whole, so that entries need no check later:
every data cluster that it refers to is aligned, within the file, no metadata and, unless
the image is read-only, ours to change (refcount one).

**Damage is contained.** An entry that fails the check is replaced by `DAMAGED` in memory, which
no range is ever found at; what it was is kept, and goes to the file with the slice. A
slice with such entries stays in memory: judged again, when the file has grown, a pointer
beyond its former end would seem right, and lead to another guest cluster's data. For the same
reason nothing but a slice that was changed since the open may refer to what lies behind the
end that the file had then.

**Damage is recorded** where the image is open for writing: the next flush sets the corrupt bit,
and writes entries that lead just beyond the file's end back with `INVALID`, so that they stay
damaged when the file has grown. While that is due (`alarmed`), nothing may make the file grow.
Entries whose refcount alone is wrong set no bit: no format check finds a fault with them.

A new L2 table is known to the tables in memory at once, but until a flush has written
it, what the file has in its place means nothing: slices of it that are not cached are
empty.
"""

import contextlib
from array import array
from collections.abc import Callable

from nbdstream.errors import LeafFormatError
from nbdstream.leaf.files import read_cached
from nbdstream.leaf.qcow2.entries import EntryCheck, wrong_pointer
from nbdstream.leaf.qcow2.header import REMEDY
from nbdstream.leaf.qcow2.layout import (
    COMPRESSED,
    COPIED,
    OFFSET,
    Geometry,
    load_words,
)
from nbdstream.leaf.qcow2.space import Metadata
from nbdstream.leaf.qcow2.table_file import MAX_DAMAGED, TableSnapshot

# Bounds in bytes of table content, for each generation, and for the changed slices.
CACHE_BYTES = 12 << 20
DIRTY_BYTES = 16 << 20
# An entry that is damaged: marked as compressed data, at a place that no file reaches.
DAMAGED = COMPRESSED | (COMPRESSED - 1)
# A reserved bit of L1 and L2 entries, for those that must not seem right once the file has grown.
INVALID = 1 << 57
# From so many changed slices on, what they may refer to is not told apart any more.
MAX_WRITTEN = 1 << 17
# A piece of the L1 table that is skipped at a time when nothing is allocated.
SKIP = 1024


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
        damaged: dict[int, str],
        l1_offset: int,
    ) -> None:
        """``file_end`` says where the file's used part ends; ``refcount`` reads a host
        cluster's refcount by its offset, None for an image that is read-only. ``damaged`` as
        from `load_l1`; ``l1_offset``: where the L1 table lies."""
        self._fd = fd
        self._geometry = geometry
        self.l1 = l1
        self._metadata = metadata
        self._file_end = file_end
        self._entries = EntryCheck(geometry, metadata, refcount)
        self._structure = EntryCheck(geometry, metadata, None)
        self._writable = refcount is not None
        self._damaged_l1 = damaged
        # Slices with damaged entries: as they are in memory, and as they are in the file.
        self._contained: dict[int, tuple[array[int], array[int]]] = {}
        self._first_end = file_end()
        # What the file can grow to at most, however its free space is scattered.
        self._last_end = self._first_end + 16 * geometry.size + (1 << 30)
        self._written: set[int] = set()
        self._per_table = geometry.table_bits - geometry.slice_bits
        self._capacity = max(1, CACHE_BYTES // geometry.slice_bytes)
        self._dirty_limit = max(1, DIRTY_BYTES // geometry.slice_bytes)
        self.young: dict[int, array[int]] = {}
        self._old: dict[int, array[int]] = {}
        self._dirty: dict[int, array[int]] = {}
        self._flushing: dict[int, array[int]] = {}
        self._new: set[int] = set()  # L1 indexes of tables that are not in the file yet
        self._flushing_new: set[int] = set()
        self._marked = False  # whether the image is, or will be, marked as corrupt
        self._damage = ""  # what to mark it for
        self._pins: dict[int, int] = {}  # damaged entries as they go to the file, by place
        self._pins_due: set[int] = set()
        self._flushing_damage: tuple[str, set[int]] = ("", set())
        for index in (index for index, what in damaged.items() if what):
            self._record(self._l1_damage(index))
            if not wrong_pointer(l1[index], geometry, metadata, self._last_end):
                self._pin(l1_offset + 8 * index, l1[index])

    # -- looking -----------------------------------------------------------------------

    def load(self, offset: int) -> "array[int] | None":
        """The slice for a guest offset; None where there is no L2 table.

        Raises ColdMetadata, LeafFormatError, OSError.
        """
        key = offset >> self._geometry.slice_bits
        entries = self.young.get(key)
        if entries is None:
            index = offset >> self._geometry.table_bits
            pointer = self.l1[index]
            if not pointer:
                return None
            if index in self._damaged_l1:
                raise self._l1_damage(index)
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
        if key in self._contained:
            return self._contained[key][0]
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
        end = self._limit(key)
        if any(data) and not self._entries.is_sound_run(entries, end):
            try:
                self._entries.check(entries, end)
            except LeafFormatError:
                self._contain(key, entries, end)
        return entries

    # -- damage ------------------------------------------------------------------------

    def _limit(self, key: int) -> int:
        """Where the data that a slice in the file refers to has to end."""
        if key in self._written or len(self._written) >= MAX_WRITTEN:
            return self._file_end()
        return self._first_end

    def _contain(self, key: int, entries: "array[int]", end: int) -> None:
        """Replace those entries that are damaged. Raises LeafFormatError if there are too many
        slices with such entries: then the slice cannot be used at all."""
        if len(self._contained) >= MAX_DAMAGED:
            error = LeafFormatError(
                f"too many L2 tables are damaged, that for {self._guest(key, 0):#x} too; {REMEDY}"
            )
            self._record(error)
            raise error
        words = self._geometry.words
        original = entries[:]
        self._contained[key] = entries, original
        for at in range(0, len(entries), words):
            entry = original[at : at + words]
            try:
                if any(entry):
                    self._entries.check(entry, end)
            except LeafFormatError:
                self._record_entry(key, at, entry, end)
                entry = array("Q", (DAMAGED, 0)[:words])
            entries[at : at + words] = entry

    def _record_entry(self, key: int, at: int, entry: "array[int]", end: int) -> None:
        """See the module's docstring for which damage is recorded, and how."""
        try:
            self._structure.check(entry[:], end)
        except LeafFormatError:
            self._record(self.damage(self._guest(key, at // self._geometry.words)))
            with contextlib.suppress(LeafFormatError):
                self._structure.check(entry[:], self._last_end)
                table = self.l1[key >> self._per_table] & OFFSET
                self._pin(self._place(key, table) + 8 * at, entry[0])

    def _record(self, damage: LeafFormatError) -> None:
        """The image is to be marked as corrupt, once."""
        if self._writable and not self._marked:
            self._marked = True
            self._damage = str(damage)

    def _pin(self, place: int, entry: int) -> None:
        """This entry, which leads beyond the file's end, is to stay damaged."""
        if self._writable:
            self._pins[place] = entry & ~COMPRESSED | INVALID
            self._pins_due.add(place)

    def _l1_damage(self, index: int) -> LeafFormatError:
        return LeafFormatError(
            f"entry {index} of the L1 table is {self.l1[index]:#x}, which is no L2 table: guest"
            f" offsets from {index << self._geometry.table_bits:#x} are lost; {REMEDY}"
        )

    def damage(self, offset: int) -> LeafFormatError:
        """What is wrong with the damaged entry for a guest offset."""
        geometry = self._geometry
        key = offset >> geometry.slice_bits
        index = (offset >> geometry.cluster_bits) & (geometry.slice_entries - 1)
        at = index * geometry.words
        entry = self._contained[key][1][at : at + geometry.words]
        what = f"is {entry[0]:#x}"
        try:
            self._entries.check(entry, self._first_end)
        except LeafFormatError as error:
            what = str(error)
        table = self._place(key, self.l1[offset >> geometry.table_bits] & OFFSET)
        return LeafFormatError(
            f"the L2 entry at {table + 8 * at:#x}, for guest offset {self._guest(key, index):#x},"
            f" {what}; {REMEDY}"
        )

    def damaged_table(self, index: int) -> bool:
        """Whether an entry of the L1 table is damaged."""
        return index in self._damaged_l1

    def first_damaged(self, key: int, entries: "array[int]") -> int | None:
        """The guest offset, from its start, of the first damaged entry of a slice that is as in
        the file. An entry of which only the refcount is wrong has its data."""
        words, end = self._geometry.words, self._limit(key)
        if not any(entries) or self._structure.is_sound_run(entries, end):
            return None
        for at in range(0, len(entries), words):
            entry = entries[at : at + words]
            try:
                if any(entry):
                    self._structure.check(entry, end)
            except LeafFormatError:
                return at // words << self._geometry.cluster_bits
        return None

    def _guest(self, key: int, index: int) -> int:
        return (key << self._geometry.slice_bits) + (index << self._geometry.cluster_bits)

    # -- changing ----------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        return bool(self._dirty or self._new or self.alarmed)

    @property
    def alarmed(self) -> bool:
        """Whether a flush has to record damage before anything makes the file grow."""
        return bool(self._damage or self._pins_due)

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
        if len(self._written) < MAX_WRITTEN:
            self._written.add(key)

    # -- flushing ----------------------------------------------------------------------

    def begin_flush(self) -> TableSnapshot:
        """Copy what has to go to the file."""
        assert not self._flushing, "one flush at a time"
        self._flushing, self._dirty = self._dirty, {}
        self._flushing_new, self._new = self._new, set()
        self._flushing_damage = self._damage, self._pins_due
        snapshot = TableSnapshot(damage=self._damage)
        snapshot.pins = [(place, self._pins[place]) for place in sorted(self._pins_due)]
        self._damage, self._pins_due = "", set()
        for key, entries in self._flushing.items():
            table = self.l1[key >> self._per_table] & OFFSET
            snapshot.slices.append((self._place(key, table), self._stored(key, entries)))
        for index in self._flushing_new:
            snapshot.new_tables.append(self.l1[index] & OFFSET)
            snapshot.pointers.append((index, self.l1[index]))
        return snapshot

    def end_flush(self, *, ok: bool) -> None:
        """The snapshot is durable, or has to be taken again."""
        if not ok:
            self._dirty = {**self._flushing, **self._dirty}
            self._new |= self._flushing_new
            damage, pins = self._flushing_damage
            self._damage = damage or self._damage
            self._pins_due |= pins
        self._flushing_damage = "", set()
        self._flushing = {}
        self._flushing_new = set()

    def _stored(self, key: int, entries: "array[int]") -> "array[int]":
        """A copy of a slice as it goes to the file: damaged entries as they were there,
        or pinned."""
        copy = entries[:]
        if key in self._contained:
            original = self._contained[key][1]
            place = self._place(key, self.l1[key >> self._per_table] & OFFSET)
            for at in range(0, len(copy), self._geometry.words):
                if copy[at] == DAMAGED:
                    copy[at : at + self._geometry.words] = original[at : at + self._geometry.words]
                    copy[at] = self._pins.get(place + 8 * at, copy[at])
        return copy
