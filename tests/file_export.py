# SPDX-License-Identifier: Apache-2.0
"""The simplest disk that can be served: a plain file, for tests of the server alone."""

import errno
import os
from pathlib import Path

import trio

from nbdstream.export import Hit, StatusExtent


class FileExport:
    """An `Export` over a file. Reads are hits where the page cache has the data."""

    def __init__(
        self, path: Path, *, name: str = "disk", read_only: bool = False, description: str = ""
    ) -> None:
        self.name = name
        self.description = description
        self.read_only = read_only
        self.preferred_block_size = 4096
        self._fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
        self.size = os.fstat(self._fd).st_size

    def close(self) -> None:
        os.close(self._fd)

    def read_nowait(self, view: memoryview, offset: int) -> Hit:
        try:
            done = os.preadv(self._fd, (view,), offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return Hit.MISS
        return Hit.DONE if done == len(view) else Hit.MISS

    def write_nowait(self, view: memoryview, offset: int) -> Hit:
        os.pwrite(self._fd, view, offset)
        return Hit.DONE

    async def read(self, view: memoryview, offset: int) -> list[tuple[int, int]]:
        await trio.to_thread.run_sync(os.preadv, self._fd, (view,), offset)
        zeroes = [e for e in self._extents(offset, len(view)) if e.zero]
        return [(e.offset, e.length) for e in zeroes]

    async def write(self, view: memoryview, offset: int, *, fua: bool) -> None:
        await trio.to_thread.run_sync(os.pwrite, self._fd, view, offset)
        if fua:
            await self.flush()

    async def zero(
        self, offset: int, length: int, *, may_trim: bool, fast_only: bool, fua: bool
    ) -> None:
        if fast_only:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        for start in range(offset, offset + length, 1 << 20):
            await self.write(
                memoryview(bytes(min(1 << 20, offset + length - start))), start, fua=False
            )
        if fua:
            await self.flush()

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        await trio.lowlevel.checkpoint()

    async def flush(self) -> None:
        await trio.to_thread.run_sync(os.fdatasync, self._fd)

    async def cache(self, offset: int, length: int) -> None:
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)
        await trio.lowlevel.checkpoint()

    async def block_status(self, offset: int, length: int, limit: int) -> list[StatusExtent]:
        await trio.lowlevel.checkpoint()
        return self._extents(offset, length)[:limit]

    def _extents(self, offset: int, length: int) -> list[StatusExtent]:
        """Data and holes of the file system's, tiling the range."""
        extents = []
        end = offset + length
        while offset < end:
            data = self._seek(offset, os.SEEK_DATA)
            stop = min(end, data if data > offset else self._seek(offset, os.SEEK_HOLE))
            hole = data > offset
            extents.append(StatusExtent(offset, stop - offset, not hole, hole, hole, int(not hole)))
            offset = stop
        return extents

    def _seek(self, offset: int, whence: int) -> int:
        try:
            return os.lseek(self._fd, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data up to the end of the file
                return self.size
            raise
