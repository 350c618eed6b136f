# SPDX-License-Identifier: Apache-2.0
"""Writing and zeroing: which clusters change, and how.

A change has three parts, in this order, so that it happens as a whole or not at all:

1. *plan*: load the slices it touches, decide for each cluster; nothing is changed, and
   all signals (ColdMetadata, FlushNeeded) are raised here;
2. *allocate and store*: reserve host clusters, write the data to them. If that fails the
   reservation is given back, and no table ever referred to it;
3. *commit*: change the tables in memory. This cannot fail.

A new cluster is reserved whole; of its blocks only those that were stored are marked, so
that what the host cluster had before is never seen.
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nbdstream.leaf.base import FlushNeeded, write_exactly
from nbdstream.leaf.files import zero_range
from nbdstream.leaf.qcow2.layout import Cluster, Geometry
from nbdstream.leaf.qcow2.redo import log_entries
from nbdstream.leaf.qcow2.space import Space
from nbdstream.leaf.qcow2.tables import DAMAGED, Tables
from nbdstream.leaf.redo import TABLE, RedoLog


@dataclass(slots=True)
class Part:
    """What a change touches of one cluster.

    ``start`` and ``length`` are the guest range; ``mask`` has the blocks that it touches.
    ``entries`` is None if the L2 table is missing. ``host`` is where the cluster will be.
    """

    start: int
    length: int
    mask: int
    key: int
    index: int
    entries: "array[int] | None"
    old: Cluster
    host: int = 0


NOTHING = Cluster(0, 0, 0)


class Changes:
    """The methods of the leaf that change what the guest sees. Event loop only."""

    def __init__(self, fd: int, geometry: Geometry, tables: Tables, space: Space) -> None:
        self._fd = fd
        self._geometry = geometry
        self._tables = tables
        self._space = space
        self._redo = RedoLog()

    def log_to(self, redo: RedoLog) -> None:
        """Record all changes in a redo log from now on."""
        self._redo = redo

    # -- the interface -----------------------------------------------------------------

    def write(self, offset: int, view: memoryview) -> None:
        """See `Leaf.write`."""
        parts = self._plan(offset, len(view))
        for part in parts:
            self._require_whole_blocks(part)
        self._reserve_records(len(parts))
        new = [part for part in parts if not part.old.host]
        self._reserve(parts, new)
        try:
            self._store(offset, view, parts)
        except BaseException:
            self._give_back(new)
            raise
        self._commit(parts, new, self._written)

    def zero(self, offset: int, length: int, *, unmap: bool, backing: bool) -> None:
        """See `Leaf.zero`; without a backing, what is unallocated is zero already.

        Raises ValueError if the range cuts a compressed cluster, besides what `Leaf.zero` raises.
        """
        ranges = list(self._zero_ranges(offset, length, skip=unmap and not backing))
        plans = [self._plan(start, size) for start, size in ranges]
        self._reserve_records(sum(map(len, plans)))
        for parts in plans:
            for part in parts:
                if part.old.packed >= 0 and not self._whole(part):
                    raise ValueError(
                        f"a zero of {part.length} at {part.start} cuts a compressed cluster"
                    )
            if unmap:
                self._unmap(parts, backing=backing)
            else:
                self._zero_reserved(parts)

    def _zero_ranges(self, offset: int, length: int, *, skip: bool) -> Iterator[tuple[int, int]]:
        """The range, or those parts of it that have an L2 table."""
        if not skip:
            yield offset, length
            return
        end = offset + length
        span = 1 << self._geometry.table_bits
        while offset < end:
            stop = min(end, (offset // span + 1) * span)
            if self._tables.load(offset) is None:
                stop = min(end, self._tables.next_table(offset))
            else:
                yield offset, stop - offset
            offset = stop

    def _unmap(self, parts: list[Part], *, backing: bool) -> None:
        changed = []
        for part in parts:
            old = part.old
            if not backing and not old.host and old.packed < 0 and not old.zero:
                continue
            if old.zero | part.mask == old.zero and (old.data or not old.host):
                continue
            if old.data & ~part.mask:
                part.host = old.host
            changed.append(part)
        self._reserve_tables(changed)
        self._commit(changed, [], self._zeroed)

    def _zero_reserved(self, parts: list[Part]) -> None:
        new = [part for part in parts if not part.old.host]
        self._reserve(parts, new)
        try:
            for host, length in _runs([(part.host, self._geometry.cluster_size) for part in new]):
                zero_range(self._fd, host, length, unmap=False)
        except BaseException:
            self._give_back(new)
            raise
        self._commit(parts, new, self._zeroed)

    # -- planning ----------------------------------------------------------------------

    def _plan(self, offset: int, length: int) -> list[Part]:
        """The clusters of a range. Raises ColdMetadata, FlushNeeded, LeafFormatError."""
        geometry = self._geometry
        bits, size, words = geometry.cluster_bits, geometry.cluster_size, geometry.words
        entry_mask = geometry.slice_entries - 1
        end = offset + length
        parts = []
        keys: dict[int, array[int] | None] = {}
        while offset < end:
            stop = min(end, ((offset >> bits) + 1) << bits)
            key = offset >> geometry.slice_bits
            if key not in keys:
                keys[key] = self._tables.load(offset)
            entries = keys[key]
            index = ((offset >> bits) & entry_mask) * words
            old = NOTHING
            if entries is not None:
                if entries[index] == DAMAGED:
                    raise self._tables.damage(offset)
                old = geometry.decode(entries[index], entries[index + 1] if words == 2 else 0)
            mask = geometry.full
            if stop - offset != size:
                mask = self._mask(offset, stop)
            parts.append(Part(offset, stop - offset, mask, key, index, entries, old))
            offset = stop
        if self._space.full or self._tables.alarmed or not self._tables.room(set(keys)):
            raise FlushNeeded
        return parts

    def _reserve_records(self, clusters: int) -> None:
        """Make room in the redo log for a change of so many clusters, each perhaps in a table of
        its own. Raises FlushNeeded."""
        self._redo.reserve(2 * clusters)

    def _mask(self, start: int, stop: int) -> int:
        """The blocks of one cluster that a range touches."""
        geometry = self._geometry
        base = start >> geometry.cluster_bits << geometry.cluster_bits
        first = (start - base) // geometry.block_size
        last = -(-(stop - base) // geometry.block_size)
        return (1 << last) - (1 << first)

    def _whole(self, part: Part) -> bool:
        """Whether a part is all that the disk has of its cluster."""
        cluster = self._geometry.cluster_size
        start = part.start // cluster * cluster
        return part.length == min(cluster, self._geometry.size - start)

    def _require_whole_blocks(self, part: Part) -> None:
        """The caller's promise: what is covered in part is DATA already."""
        block = self._geometry.block_size
        stop = part.start + part.length
        edges = 0
        if part.start % block:
            edges |= self._mask(part.start, part.start + 1)
        if stop % block and stop != self._geometry.size:
            edges |= self._mask(stop - 1, stop)
        if part.old.packed >= 0 and not self._whole(part):
            edges = part.mask
        if edges & ~part.old.data:
            raise ValueError(f"a write of {part.length} at {part.start} covers a part of a block")

    # -- space and data ----------------------------------------------------------------

    def _reserve(self, parts: list[Part], new: list[Part]) -> None:
        """Find a place for each part: where it is, or a new cluster, neighbours together."""
        for part in parts:
            part.host = part.old.host
        self._reserve_tables(parts)
        taken = 0
        try:
            while taken < len(new):
                count = 1
                while taken + count < len(new) and self._adjacent(new[taken + count - 1 :]):
                    count += 1
                host = self._space.allocate(count)
                for part in new[taken : taken + count]:
                    part.host = host
                    host += self._geometry.cluster_size
                taken += count
        except BaseException:
            self._give_back(new[:taken])
            raise

    def _adjacent(self, parts: list[Part]) -> bool:
        return parts[0].start + parts[0].length == parts[1].start

    def _give_back(self, parts: list[Part]) -> None:
        for part in reversed(parts):
            self._space.give_back(part.host, 1)

    def _reserve_tables(self, parts: list[Part]) -> None:
        """Make the L2 tables that are missing. They stay, empty, if the change fails."""
        geometry = self._geometry
        for part in parts:
            if part.entries is None:
                part.entries = self._tables.load(part.start)
            if part.entries is None:
                host = self._space.allocate_table(1)
                self._space.use(host, 1)
                index = part.start >> geometry.table_bits
                self._tables.add_table(index, host)
                self._redo.append(TABLE | index, self._tables.l1[index])
                part.entries = self._tables.load(part.start)

    def _store(self, offset: int, view: memoryview, parts: list[Part]) -> None:
        """Write the data, in as few pieces as the places allow."""
        geometry = self._geometry
        cluster_mask = geometry.cluster_size - 1
        done = 0
        for host, length in _runs(
            [(part.host + (part.start & cluster_mask), part.length) for part in parts]
        ):
            write_exactly(self._fd, view[done : done + length], host)
            done += length
        last = parts[-1]
        if offset + len(view) == geometry.size and last.mask & ~last.old.data:
            # A disk may end within a block. What lies behind its end must not be whatever
            # the cluster had before, in case the image grows one day.
            rest = bytes(-geometry.size % geometry.block_size)
            at = last.host + (last.start & cluster_mask) + last.length
            write_exactly(self._fd, memoryview(rest), at)

    # -- tables ------------------------------------------------------------------------

    def _written(self, part: Part) -> Cluster:
        return Cluster(part.host, part.old.data | part.mask, part.old.zero & ~part.mask)

    def _zeroed(self, part: Part) -> Cluster:
        return Cluster(part.host, part.old.data & ~part.mask, part.old.zero | part.mask)

    def _commit(
        self, parts: list[Part], new: list[Part], changed: Callable[[Part], Cluster]
    ) -> None:
        geometry = self._geometry
        for host, length in _runs([(part.host, geometry.cluster_size) for part in new]):
            self._space.use(host, length >> geometry.cluster_bits)
        entries = []
        for part in parts:
            old, cluster = part.old, changed(part)
            if cluster == old:
                continue
            assert part.entries is not None
            entry, bitmap = geometry.encode(cluster)
            part.entries[part.index] = entry
            if geometry.extended:
                part.entries[part.index + 1] = bitmap
            self._tables.mark_dirty(part.key, part.entries)
            entries.append((part.start >> geometry.cluster_bits, entry, bitmap))
            if old.packed >= 0:
                self._space.drop(*geometry.packed_range(old.packed), compressed=True)
            elif old.host and not cluster.host:
                self._space.drop(old.host, geometry.cluster_size)
        log_entries(self._redo, geometry, entries)


def _runs(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join (offset, length) pieces that touch."""
    if len(pieces) < 2:
        return pieces
    joined = pieces[:1]
    for offset, length in pieces[1:]:
        start, before = joined[-1]
        if start + before == offset:
            joined[-1] = start, before + length
        else:
            joined.append((offset, length))
    return joined
