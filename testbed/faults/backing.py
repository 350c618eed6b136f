# SPDX-License-Identifier: Apache-2.0
"""A backing in memory that takes its (virtual) time, so that requests overlap."""

import trio

from nbdstream.backing.base import Grant, Priority
from nbdstream.extents import BackingExtent
from testbed.backings import PlainBacking

ROUND_TRIP = 0.1
UNIT = 16384


class MemoryBacking(PlainBacking):
    """Answers every read after `ROUND_TRIP` seconds of the virtual clock."""

    def __init__(self, content: bytes) -> None:
        super().__init__("memory:", len(content))
        self.content = content

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
