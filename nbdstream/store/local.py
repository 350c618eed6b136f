# SPDX-License-Identifier: Apache-2.0
"""An image of the store as a guest's server reads it itself: without its process, where it can.

The process says in the live map (`nbdstream.store.live`) what the image's file has. That is read
from the file, so all guests of an image share its pages in memory, and none of them waits for
another process. All else is asked of the process.
"""

import os

import trio

from nbdstream.leaf.base import read_exactly
from nbdstream.leaf.files import hot_read_flags
from nbdstream.leaf.raw.map import BLOCK_SHIFT
from nbdstream.store.layout import Image
from nbdstream.store.live import live_path
from nbdstream.tasks import in_worker

# Seconds between two looks at whether all is local.
LOOK_INTERVAL = 1.0


class LocalImage:
    """Implements `nbdstream.backing.base.LocalCopy`. The user is in the image's register, so the
    file is neither removed nor changed where it has data."""

    def __init__(self, image: Image) -> None:
        """Open the image (worker). Raises OSError."""
        self.path = str(image.leaf)
        self.complete = trio.Event()
        self._image = image
        self._size = image.record.size
        self._live = -1
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.hot = hot_read_flags(self.fd)
            if not image.complete:
                self._open_live()
        except BaseException:
            self.close()
            raise
        if image.complete:
            self.complete.set()

    def _open_live(self) -> None:
        try:
            self._live = os.open(live_path(self._image), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # the process has not come so far
        self._live_hot = hot_read_flags(self._live)

    def close(self) -> None:
        for fd in (self.fd, self._live):
            if fd >= 0:
                os.close(fd)
        self.fd = self._live = -1

    async def watch(self) -> None:
        """A task: notice when all is local."""
        while not self.complete.is_set():
            await trio.sleep(LOOK_INTERVAL)
            if self._live < 0:
                await in_worker(self._open_live)
            if await in_worker(lambda: self._image.complete):
                self.complete.set()

    def has(self, offset: int, length: int) -> bool:
        """See `LocalCopy.has`."""
        end = offset + length
        if end > self._size or self._live < 0 or self.complete.is_set():
            return end <= self._size and self.complete.is_set()
        first, last = offset >> BLOCK_SHIFT, (end - 1) >> BLOCK_SHIFT
        start = first >> 3
        buffer = bytearray((last >> 3) - start + 1)
        try:
            if os.preadv(self._live, (buffer,), start, self._live_hot) != len(buffer):
                return False
        except OSError:
            return False
        wanted = (1 << (last - first + 1)) - 1
        return int.from_bytes(buffer, "little") >> (first & 7) & wanted == wanted

    async def read(self, view: memoryview, offset: int) -> bool:
        """See `LocalCopy.read`."""
        if not self.has(offset, len(view)):
            return False
        try:
            if os.preadv(self.fd, (view,), offset, self.hot) == len(view):
                await trio.lowlevel.checkpoint()
                return True
        except OSError:
            pass  # not in memory, or the worker's to report
        try:
            await in_worker(read_exactly, self.fd, view, offset)
        except OSError:
            return False  # the image's process meets the error, too, and says so
        return True
