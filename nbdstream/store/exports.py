# SPDX-License-Identifier: Apache-2.0
"""An image as its process exports it: once for reads that a guest waits for, and once for each
class of background reads.

The class of a read has to reach the far end, and an NBD request has no room for it. So it is in
the export's name: IDENTITY is for demand, IDENTITY/stream and the like for the rest. All of
them are the same disk. A guest that begins to wait for what was asked for in the background says so
with NBD_CMD_CACHE on the demand export.
"""

import errno

from nbdstream.backing.base import Priority
from nbdstream.disk import StreamedDisk
from nbdstream.disk.readonly import ReadOnlyExport
from nbdstream.export import Export
from nbdstream.leaf.base import State
from nbdstream.streamer.room import Space
from nbdstream.units import format_size

BACKGROUND = (Priority.READAHEAD, Priority.PREFETCH, Priority.STREAM)
# Extents that are looked at to find that a range is local. More are rare, and only cost time.
EXTENTS_MOST = 256


def export_name(identity: str, priority: Priority) -> str:
    """The export for reads of this class of the image with this identity."""
    return identity if priority is Priority.DEMAND else f"{identity}/{priority.name.lower()}"


def image_exports(disk: StreamedDisk, identity: str, space: Space) -> list[Export]:
    """All exports of an image, whose leaf is where ``space`` is."""
    return [
        DemandExport(disk, identity, space),
        *(BackgroundExport(disk, identity, priority, space) for priority in BACKGROUND),
    ]


class DemandExport(ReadOnlyExport):
    """For reads that a guest waits for."""

    def __init__(self, disk: StreamedDisk, identity: str, space: Space) -> None:
        name = export_name(identity, Priority.DEMAND)
        super().__init__(disk, name, "reads that a guest waits for")
        self._streamed = disk
        self._space = space
        self.cache = self._cache_now

    async def _cache_now(self, offset: int, length: int) -> None:
        """A guest waits for the range. Raises as `StreamedDisk.populate` does."""
        if self._streamed.backing is not None:
            self._streamed.reads_ahead = not self._space.tight
            await self._streamed.bring(offset, length)


class BackgroundExport(ReadOnlyExport):
    """For reads of one background class: they take their turn at the far end with all others of
    the class, whichever guest they are from."""

    def __init__(self, disk: StreamedDisk, identity: str, priority: Priority, space: Space) -> None:
        name = export_name(identity, priority)
        super().__init__(disk, name, f"reads in the background: {priority.name.lower()}")
        self._streamed = disk
        self._priority = priority
        self._space = space
        self.read = self._read_in_turn
        self.cache = self._cache_in_turn

    async def _read_in_turn(self, view: memoryview, offset: int) -> list[tuple[int, int]]:
        await self._cache_in_turn(offset, len(view))
        return await self._streamed.read(view, offset)

    async def _cache_in_turn(self, offset: int, length: int) -> None:
        """Make the range local. Raises OSError (ENOSPC where space is kept for guests),
        BackingError, LeafError."""
        if self._streamed.backing is None:
            return
        extents = await self._streamed.leaf_extents(offset, length, EXTENTS_MOST)
        known = sum(extent.length for extent in extents)
        if known < length or any(extent.state is State.UNALLOCATED for extent in extents):
            if self._space.tight:
                free = format_size(self._space.free)
                raise OSError(errno.ENOSPC, f"only {free} free in the image store: kept for guests")
            await self._streamed.populate(offset, length, self._priority)
