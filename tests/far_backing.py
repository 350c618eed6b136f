# SPDX-License-Identifier: Apache-2.0
"""A backing behind a link, in virtual time: what is fast and what is slow, without a clock.

For tests under trio's MockClock: a read takes a round trip plus its turn on a FIFO link
of a given rate, and background work gets room as a perfect window would give it.
"""

import trio

from nbdstream.backing.base import BackingStatistics, Grant, Priority
from tests.doubles import GatedBacking


class FarBacking(GatedBacking):
    """``rate`` in bytes per second, ``rtt`` in seconds; `room` bytes are granted at a time.

    ``window`` bytes may be in flight; 0 grants no background work any room.
    """

    def __init__(self, content: bytes, *, rate: float, rtt: float) -> None:
        super().__init__(content)
        self.rate = rate
        self.rtt = rtt
        self.room = 256 << 10
        self.window = int(1.25 * rate * rtt) + self.room
        self.in_flight = 0
        self._link_free_at = 0.0
        self._changed = trio.Event()

    async def read(
        self, view: memoryview, offset: int, priority: Priority, grant: Grant | None = None
    ) -> None:
        self.in_flight += len(view)
        try:
            now = trio.current_time()
            self._link_free_at = max(self._link_free_at, now) + len(view) / self.rate
            arrival = self._link_free_at + self.rtt
            await super().read(view, offset, priority, grant)
            await trio.sleep_until(arrival)
        finally:
            self.in_flight -= len(view)
            self._changed.set()
            self._changed = trio.Event()

    async def wait_for_room(self, priority: Priority) -> Grant:
        while self.in_flight + self.room > self.window:
            await self._changed.wait()
        return await super().wait_for_room(priority)

    def statistics(self) -> BackingStatistics:
        fields = {**vars(super().statistics()), "rate": self.rate, "base_rtt": self.rtt}
        return BackingStatistics(**fields)

    def fetched_twice(self) -> list[tuple[int, int]]:
        """As `GatedBacking.fetched_twice`; quicker, so that disks may be large."""
        reads = sorted((read.offset, read.length) for read in self.reads)
        twice, reached = [], 0
        for offset, length in reads:
            if offset < reached:
                twice.append((offset, length))
            reached = max(reached, offset + length)
        return twice


class PacedBacking(FarBacking):
    """Which also keeps to the speed cap, by spacing what it gives room for."""

    def __init__(self, content: bytes, *, rate: float, rtt: float) -> None:
        super().__init__(content, rate=rate, rtt=rtt)
        self.room = 64 << 10
        self._next = 0.0

    async def wait_for_room(self, priority: Priority) -> Grant:
        grant = await super().wait_for_room(priority)
        if self.speed:
            self._next = max(self._next, trio.current_time()) + grant.length / self.speed
            await trio.sleep_until(self._next)
        return grant
