# SPDX-License-Identifier: Apache-2.0
"""Makes ranges of a disk local, unit by unit, as the backing has room: the one way in which
the stream job, boot profiles, NBD_CMD_CACHE and the stepwise interface get their data.

Admission is built in. What is known to be zero becomes a zero in the leaf and needs no room.
What is under way already is joined and needs no room either. All else waits for a grant, and
what is still missing is looked up again once there is one: nothing left to fetch means that the
grant is given back at once. A range is walked once from its start to its end, so that a caller
always gets on, whatever happens to the blocks behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import trio

from nbdstream.backing.base import Backing, Grant, Priority
from nbdstream.disk.atomic import Atomically
from nbdstream.disk.fetch import MAX_FETCH, Fetch, Fetcher
from nbdstream.disk.lookup import Lookup
from nbdstream.disk.writeback import Writeback
from nbdstream.extents import align_down, align_up
from nbdstream.leaf.base import Leaf, LeafExtent

# How far one look at the leaf's extents goes.
LOOK_PIECE = 256 << 20
# What one call of Leaf.zero covers at the most.
ZERO_PIECE = 32 << 20


@dataclass(frozen=True)
class Unit:
    """A piece of a range that was not local: filled with zeroes, or on its way.

    ``fetch`` is None where it was filled.
    """

    offset: int
    length: int
    fetch: Fetch | None

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def done(self) -> bool:
        """Whether `wait` returns, or raises, at once."""
        return self.fetch is None or self.fetch.done.is_set()

    async def wait(self) -> None:
        """Wait until it is local.

        Raises:
            BackingError: the read failed.
            OSError, LeafError: the leaf would not take the data.
        """
        if self.fetch is not None:
            await self.fetch.wait_stored()


async def first_gap(
    atomically: Atomically, lookup: Lookup, offset: int, end: int
) -> LeafExtent | None:
    """The first unallocated extent between the offsets (more may follow it), or None."""
    while offset < end:
        length = min(LOOK_PIECE, end - offset)
        found = await atomically(lookup.first_unallocated, offset, length)
        if found is not None:
            return found
        offset += length
        await trio.lowlevel.checkpoint()
    return None


class Populator:
    """Makes ranges of one disk local."""

    def __init__(
        self,
        leaf: Leaf,
        backing: Backing,
        lookup: Lookup,
        fetcher: Fetcher,
        atomically: Atomically,
        writeback: Writeback,
        *,
        store: bool = True,
    ) -> None:
        """``store``: put into the leaf what is fetched. Without it, units are only fetched, so
        that a store which is the backing has them."""
        self._store = store
        self._leaf = leaf
        self._backing = backing
        self._lookup = lookup
        self._fetcher = fetcher
        self._atomically = atomically
        self._writeback = writeback
        self._first_gap = partial(first_gap, atomically, lookup)

    async def next_unit(self, offset: int, end: int, priority: Priority) -> Unit | None:
        """Begin to make local the first piece between the offsets that is not.

        Returns the piece, within the offsets (the blocks at its ends become local as a whole), or
        None if there is none. Raises OSError and LeafError, of the leaf. Cancelled: nothing
        was begun.
        """
        if offset >= end:
            return None
        block = self._leaf.block_size
        start, stop = align_down(offset, block), min(align_up(end, block), self._leaf.size)
        while (gap := await self._first_gap(start, stop)) is not None:
            unit = await self._next(gap, stop, priority)
            if unit is not None:
                first, last = max(unit.offset, offset), min(unit.end, end)
                return Unit(first, last - first, unit.fetch)
            start = gap.offset  # that piece has become local meanwhile
        return None

    async def _next(self, gap: LeafExtent, end: int, priority: Priority) -> Unit | None:
        if self._lookup.known_zero(gap):
            if self._store:
                await self.fill_zero(gap.offset, gap.length)
            return Unit(gap.offset, gap.length, None)
        unit = await self._atomically(self._begin, gap.offset, end, priority, None)
        if unit is None:
            if priority is not Priority.DEMAND:
                await self._writeback.wait_for_room()
            with await self._backing.wait_for_room(priority) as grant:
                unit = await self._atomically(self._begin, gap.offset, end, priority, grant)
        return unit

    async def bring(
        self, offset: int, length: int, demand: Callable[[list[LeafExtent]], list[Fetch]]
    ) -> None:
        """Make a range allocated that a guest waits for: by ``demand``, which fetches what it is
        told as a guest's read does, readahead included. Raises as `populate` does."""
        first = min(length, MAX_FETCH)
        if missing := await self._atomically(self._lookup.missing, offset, first):
            for fetch in demand(missing):
                await fetch.wait_stored()
        await self.populate(offset, length, Priority.DEMAND)

    async def populate(self, offset: int, length: int, priority: Priority) -> int:
        """Make every block that the range touches local; returns how many bytes were not.

        Raises:
            BackingError: the backing timeout ended.
            OSError, LeafError: the leaf would not take the data.
        """
        end = offset + length
        done = 0
        under_way: list[Unit] = []
        while (unit := await self.next_unit(offset, end, priority)) is not None:
            done += unit.length
            offset = unit.end
            under_way.append(unit)
            for finished in [unit for unit in under_way if unit.done]:
                under_way.remove(finished)  # and its buffer with it
                await finished.wait()
        for unit in under_way:
            await unit.wait()
        return done

    async def fill_zero(self, offset: int, length: int) -> None:
        """Mark as zero the unallocated whole blocks of a range that is a hole in the
        backing. Raises OSError, LeafError."""
        start, end = self._lookup.whole_blocks(offset, length)

        def fill(at: int, size: int) -> None:
            for extent in self._lookup.unallocated(at, size):
                self._leaf.zero(extent.offset, extent.length, unmap=True, as_backing=True)

        for at in range(start, end, ZERO_PIECE):
            await self._atomically(fill, at, min(ZERO_PIECE, end - at))
            await trio.lowlevel.checkpoint()

    def _begin(self, offset: int, end: int, priority: Priority, grant: Grant | None) -> Unit | None:
        """One step: join the fetch that has the first gap from ``offset`` on, or send one if
        there is a ``grant`` for it. None: there is no gap, or no grant."""
        gap = self._lookup.first_unallocated(offset, min(LOOK_PIECE, end - offset))
        if gap is None:
            return None
        cluster = self._leaf.cluster_size
        stop = align_down(gap.offset, cluster) + cluster
        if self._fetcher.under_way(gap.offset) is None:
            if grant is None:
                return None
            # Units end where clusters end, so that no two of them share one.
            most = stop - cluster + max(align_down(MAX_FETCH, cluster), cluster)
            limit = min(max(align_down(gap.offset + grant.length, cluster), stop), most)
            while stop < min(limit, gap.end) and self._fetcher.under_way(stop) is None:
                stop += cluster
        length = min(stop, gap.end) - gap.offset
        fetches = self._fetcher.start(gap.offset, length, priority, store=self._store, grant=grant)
        return Unit(gap.offset, length, fetches[0])
