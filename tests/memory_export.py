# SPDX-License-Identifier: Apache-2.0
"""A disk in memory whose answers a test decides: hit or miss, now or later, or an error."""

import errno

import trio

from nbdstream.export import Hit, StatusExtent


class MemoryExport:
    """An `Export` of ``size`` bytes, at first filled with a pattern.

    While ``misses`` is set the hot path answers MISS to everything; reads of the ranges in
    ``slow`` are misses always, and the async methods wait for ``gate``. ``error`` is raised
    by every call. Zeroes are known in units of ``granularity``. ``calls`` records what the
    async methods were asked for.
    """

    granularity = 4096

    def __init__(self, size: int, *, name: str = "disk", read_only: bool = False) -> None:
        self.name = name
        self.description = f"{size} bytes of memory"
        self.size = size
        self.read_only = read_only
        self.preferred_block_size = 4096
        self.data = bytearray((b"nbd stream" * (size // 10 + 1))[:size])
        self.misses = False
        self.slow: list[range] = []
        self.gate = trio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.calls: list[tuple[object, ...]] = []

    def _raise(self) -> None:
        if self.error:
            raise self.error

    def _is_zero(self, offset: int, length: int) -> bool:
        return not any(self.data[offset : offset + length])

    def read_nowait(self, view: memoryview, offset: int) -> Hit:
        self._raise()
        if self.misses or any(offset in slow for slow in self.slow):
            return Hit.MISS
        if self._is_zero(offset, len(view)):
            return Hit.ZERO
        view[:] = self.data[offset : offset + len(view)]
        return Hit.DONE

    def write_nowait(self, view: memoryview, offset: int) -> Hit:
        self._raise()
        if self.misses:
            return Hit.MISS
        self.data[offset : offset + len(view)] = view
        return Hit.DONE

    async def _asked(self, *call: object) -> None:
        self.calls.append(call)
        await self.gate.wait()
        await trio.lowlevel.checkpoint()
        self._raise()

    async def read(self, view: memoryview, offset: int) -> list[tuple[int, int]]:
        await self._asked("read", offset, len(view))
        view[:] = self.data[offset : offset + len(view)]
        extents = self._extents(offset, len(view))
        return [(extent.offset, extent.length) for extent in extents if extent.zero]

    async def write(self, view: memoryview, offset: int, *, fua: bool) -> None:
        await self._asked("write", offset, len(view), fua)
        self.data[offset : offset + len(view)] = view

    async def zero(
        self, offset: int, length: int, *, may_trim: bool, fast_only: bool, fua: bool
    ) -> None:
        await self._asked("zero", offset, length, may_trim, fast_only, fua)
        if fast_only and length % self.granularity:
            raise OSError(errno.ENOTSUP, "not fast")
        self.data[offset : offset + length] = bytes(length)

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        await self._asked("trim", offset, length, fua)

    async def flush(self) -> None:
        await self._asked("flush")

    async def cache(self, offset: int, length: int) -> None:
        await self._asked("cache", offset, length)

    async def block_status(self, offset: int, length: int, limit: int) -> list[StatusExtent]:
        await self._asked("block_status", offset, length)
        return self._extents(offset, length)[:limit]

    def _extents(self, offset: int, length: int) -> list[StatusExtent]:
        """One extent for each unit; every other one is local."""
        extents = []
        end = offset + length
        while offset < end:
            unit = offset // self.granularity
            stop = min(end, (unit + 1) * self.granularity)
            zero = self._is_zero(offset, stop - offset)
            local = unit % 2 == 0
            extents.append(
                StatusExtent(offset, stop - offset, local, zero, zero, 1 if local else 2)
            )
            offset = stop
        return extents


def held_export(size: int) -> MemoryExport:
    """An export whose requests all miss, and wait until a test sets its `gate`."""
    export = MemoryExport(size)
    export.misses = True
    export.gate = trio.Event()
    return export
