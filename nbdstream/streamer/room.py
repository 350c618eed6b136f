# SPDX-License-Identifier: Apache-2.0
"""A full disk stops streams before it stops guests.

What is streamed can be fetched later, and a guest's write cannot wait: without space it fails, and
the guest's file system with it. So the stream job pauses while there is little space left on the
leaf's file system, and goes on when there is more.
"""

import errno
import logging
import os
import time
from collections.abc import Callable

import trio

from nbdstream.streamer.job import StreamJob
from nbdstream.units import format_size

log = logging.getLogger(__name__)

# Background work leaves this much of the file system to guests' writes, or this part of it,
# whichever is less.
RESERVE = 1 << 30
RESERVE_PART = 0.05
# Below this many times as much, images that have no user should make room.
LOW_TIMES = 2
# Seconds for which a look at the free space holds.
LOOK_INTERVAL = 1.0


class Space:
    """The free space of the file system on which a file is."""

    def __init__(self, fd: Callable[[], int]) -> None:
        """``fd`` returns a descriptor on that file system."""
        self._fd = fd
        self._free = 0
        self._reserve = 0.0
        self._look_at = 0.0

    @property
    def free(self) -> int:
        """Bytes, as of the last look. Raises OSError."""
        now = time.monotonic()
        if now >= self._look_at:
            status = os.fstatvfs(self._fd())
            self._free = status.f_bavail * status.f_frsize
            self._reserve = min(RESERVE, status.f_blocks * status.f_frsize * RESERVE_PART)
            self._look_at = now + LOOK_INTERVAL
        return self._free

    @property
    def tight(self) -> bool:
        """Whether background work should leave the rest to guests. Raises OSError."""
        return self.free < self._reserve

    @property
    def low(self) -> bool:
        """Whether it is going to be tight. Raises OSError."""
        return self.free < self._reserve * LOW_TIMES

    def look_again(self) -> None:
        """Something was freed: the last look does not hold any more."""
        self._look_at = 0.0


async def leave_room(job: StreamJob, space: Space, leaf: str) -> None:
    """A task: pause the job of a leaf while there is little space; ends with the job's work."""
    paused = False
    while not job.completed.is_set():
        await trio.sleep(LOOK_INTERVAL)
        try:
            tight = space.tight
        except OSError:
            continue  # the leaf was let go of
        if tight and job.running:
            reason = f"only {format_size(space.free)} free: kept for guests' writes"
            log.warning("%s: streaming pauses: %s", leaf, reason)
            job.make_way(OSError(errno.ENOSPC, reason))
            paused = True
        elif paused and not tight:
            paused = False
            if job.io_status == "nospace":  # else the operator has steered it meanwhile
                job.resume()
