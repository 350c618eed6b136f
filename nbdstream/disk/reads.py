# SPDX-License-Identifier: Apache-2.0
"""Reads that could not be answered at once: from the leaf, from fetches, from both.

A read first makes a *plan*: who has each part of the range. What only the backing has is fetched,
and then the plan is made again, because the guest may have written meanwhile.
"""

import os
from collections.abc import Callable

import trio

from nbdstream.disk.atomic import Atomically
from nbdstream.disk.fetch import Fetch
from nbdstream.disk.lookup import Lookup, Plan, is_remote, same_place
from nbdstream.disk.zeroes import zeroes
from nbdstream.errors import BackingError
from nbdstream.extents import pieces
from nbdstream.leaf.base import Leaf, LeafExtent, State
from nbdstream.tasks import in_worker

# Up to here a copy between memory and the page cache is quick enough for the event loop;
# larger ones are cut, so that others get their turn in between.
COPY_PIECE = 1 << 20


class Reader:
    """The reads of one disk."""

    def __init__(
        self,
        leaf: Leaf,
        lookup: Lookup,
        atomically: Atomically,
        demand: Callable[[list[LeafExtent]], list[Fetch]],
        hot: int,
    ) -> None:
        """``demand`` has missing extents fetched; ``hot`` are the flags of preadv(2) with which
        a read does not wait for a device."""
        self._leaf = leaf
        self._lookup = lookup
        self._atomically = atomically
        self._demand = demand
        self._hot = hot

    async def read(self, view: memoryview, offset: int) -> list[tuple[int, int]]:
        """Fill the view; see `Export.read`. Raises OSError, BackingError, LeafError."""
        plan = await self._plan_read(offset, len(view))
        # No await since the plan was made: what it says of the leaf still holds.
        cold: list[tuple[LeafExtent, memoryview]] = []
        hot_bytes = 0
        for extent, source in plan:
            if source is None and extent.state is not State.ZERO:
                part = view[extent.offset - offset : extent.end - offset]
                hot_bytes += extent.length
                if hot_bytes > COPY_PIECE or not self._read_hot(extent, part):
                    cold.append((extent, part))
        # What a fetch brought, and what was zero, was true at a time within this request: a
        # write that happens from here on is one that the guest made at the same time.
        copied = 0
        for extent, source in plan:
            if source is not None or extent.state is State.ZERO:
                for at, length in pieces(extent.offset, extent.length, COPY_PIECE):
                    part = view[at - offset : at - offset + length]
                    part[:] = source.view(at, length) if source is not None else zeroes(length)
                    copied += length
                    if copied > COPY_PIECE:
                        copied = 0
                        await trio.lowlevel.checkpoint()
        if cold:
            await self._read_cold(cold)
        return [
            (extent.offset, extent.length)
            for extent, source in plan
            if source is None and extent.state is State.ZERO
        ]

    async def _plan_read(self, offset: int, length: int) -> Plan:
        """Where each part of a range is, once all of it is here: in the leaf, or fetched."""
        fetched: list[Fetch] = []
        failure: BackingError | None = None
        while True:
            plan = await self._atomically(self._lookup.plan, offset, length, fetched)
            missing = [extent for extent, source in plan if source is None and is_remote(extent)]
            if not missing:
                return plan
            if failure is not None:
                raise failure
            for fetch in self._demand(missing):
                try:
                    await fetch.wait_data()
                    fetched.append(fetch)
                except BackingError as error:
                    # The guest may have written there meanwhile: look once more.
                    failure = error

    def _read_hot(self, extent: LeafExtent, view: memoryview) -> bool:
        if extent.state is State.COMPRESSED:
            return False
        try:
            return os.preadv(self._leaf.fd, [view], extent.host, self._hot) == len(view)
        except OSError:
            return False

    async def _read_cold(self, parts: list[tuple[LeafExtent, memoryview]]) -> None:
        """Read local data in a worker. Meanwhile the space may have been given back and
        used for something else: then what was read is not ours, and is read again."""

        def read_all() -> None:
            for extent, view in parts:
                self._leaf.read(extent, view)

        await in_worker(read_all)
        for extent, view in parts:
            now = await self._atomically(self._lookup.extents, extent.offset, extent.length)
            if not all(same_place(part, extent) for part in now):
                await self.read(view, extent.offset)
