# SPDX-License-Identifier: Apache-2.0
"""A backing in memory that takes its (virtual) time, so that requests overlap."""

import trio

from nbdstream.backing.base import Backing, BackingStatistics, Grant, Priority
from nbdstream.extents import BackingExtent

ROUND_TRIP = 0.1
UNIT = 16384


class MemoryBacking(Backing):
    """Answers every read after `ROUND_TRIP` seconds of the virtual clock."""

    def __init__(self, content: bytes) -> None:
        self.uri = "memory:"
        self.content = content
        self.size = len(content)

    async def read(
        self, view: memoryview, offset: int, priority: Priority, grant: Grant | None = None
    ) -> None:
        if grant is not None:
            grant.use(priority)
        await trio.sleep(ROUND_TRIP)
        view[:] = self.content[offset : offset + len(view)]

    async def extents(self, offset: int, length: int) -> list[BackingExtent]:
        await trio.sleep(ROUND_TRIP)
        return [BackingExtent(offset, length, False)]

    async def wait_for_room(self, priority: Priority) -> Grant:
        await trio.sleep(ROUND_TRIP)
        return Grant(UNIT, priority, lambda _grant: None)

    def promote(self, offset: int, length: int) -> None:
        pass

    def known_zero(self, offset: int, length: int) -> bool:
        return False

    def forget(self) -> None:
        pass

    async def pin(self) -> str:
        return ""

    def set_unit_least(self, length: int) -> None:
        pass

    def set_speed(self, speed: int) -> None:
        pass

    def statistics(self) -> BackingStatistics:
        return BackingStatistics(True, 0.0, 1, "", 0, 0, {}, {}, 0, 0, 0.0, 0.0)

    async def aclose(self) -> None:
        pass
