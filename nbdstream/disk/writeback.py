# SPDX-License-Identifier: Apache-2.0
"""Pushes data from the page cache to the disk, so that the kernel need not hold up a writer.

Writes go to the page cache from the event loop. When a process has made too much of it dirty, the
kernel makes it sleep in pwrite(2) for up to 200 ms at a time (balance_dirty_pages), and with it
every guest's read. Two rules keep that away from the loop:

- *Background data is bounded.* Data that was streamed is written out behind the stream, and no
  more is asked for while too much of it is not. A guest's flush then has little left to write.
- *Congestion is noticed.* When a write by the loop was slow, those that follow wait in a worker
  until the file has been written out.

Writing out is sync_file_range(2): it makes nothing durable and proves nothing. It uses a file
description of its own, because the kernel reports a writeback error once to each: the error is
left for the leaf's own sync, which must not miss it.
"""

import logging
import os
import time

import trio

from nbdstream.leaf.files import write_out
from nbdstream.tasks import in_worker

log = logging.getLogger(__name__)

# Bytes of background data that are not written out: from here on they are, and from here on no
# more are asked for.
PUSH = 32 << 20
UNWRITTEN_MOST = 128 << 20
# Seconds: a write to the page cache that takes longer was held up, and for how long that counts.
SLOW = 0.05
CONGESTED_TIME = 0.5


class Writeback:
    """The writeback of one leaf's data.

    Attributes:
        congested_until: by `time.perf_counter`: writes before then should `wait_written` first.
    """

    def __init__(self, fd: int) -> None:
        """``fd`` is of the file; it is opened once more."""
        try:
            self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            # Without /proc there is no second description of the same file, and the kernel
            # decides alone when it writes.
            log.info("written data is not pushed out: %s", error)
            self._fd = -1
        self._unwritten = 0
        self.congested_until = 0.0
        self._begun = self._ended = 0
        self._turn = trio.Lock()
        self._more = trio.lowlevel.ParkingLot()

    def close(self) -> None:
        """Close the descriptor; no call is under way."""
        if self._fd >= 0:
            os.close(self._fd)

    # -- congestion ----------------------------------------------------------------------

    def held_up(self) -> None:
        """A write to the page cache has taken longer than `SLOW`."""
        self.congested_until = time.perf_counter() + CONGESTED_TIME

    # -- background data -----------------------------------------------------------------

    def stored(self, length: int) -> None:
        """``length`` bytes of background data are in the page cache."""
        self._unwritten += length
        if self._unwritten >= PUSH:
            self._more.unpark_all()

    async def wait_for_room(self) -> None:
        """Wait until more background data may be asked for."""
        while self._unwritten >= UNWRITTEN_MOST:
            await self.wait_written()

    async def run(self) -> None:
        """A task: write background data out behind the stream."""
        while True:
            while self._unwritten < PUSH:
                await self._more.park()
            await self.wait_written()

    # -- both ----------------------------------------------------------------------------

    async def wait_written(self) -> None:
        """Wait until what is in the page cache now is on its way to the disk no more.

        One call of the kernel serves all who wait for it.
        """
        mine = self._begun + 1
        async with self._turn:
            if self._ended < mine:
                self._begun += 1
                before = self._unwritten
                await in_worker(write_out, self._fd)
                self._unwritten -= before
                self._ended = self._begun
