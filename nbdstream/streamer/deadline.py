# SPDX-License-Identifier: Apache-2.0
"""``--finish-in``: a stream job that takes the time it may, and says when that is too little.

Once a second, what remains and the time left give the speed that is needed; the job is
held to a little more than that, so that it neither disturbs more than it must nor
depends on luck at the end. The speed cap that the user gave stays a cap.

For the first seconds the job runs as fast as it can. That measures the link, so that a
promise which cannot be kept is known at once, not at the end; from then on what
counts is the rate that the job really has.
"""

import logging
from typing import Protocol

import trio

from nbdstream.units import format_duration, format_rate

log = logging.getLogger(__name__)

INTERVAL = 1.0
# How long the link is measured at full speed, and when the job's own rate (which looks back
# over some seconds) says nothing any more of that time. Seconds of running.
MEASURE_TIME = 3.0
SETTLED_TIME = 10.0
# The pace: so much more than is needed, and never less than the least (bytes per second).
MARGIN = 1.05
PACE_LEAST = 64 << 10
# It is too late by more than this part of the time left, or so many seconds at the end.
LATE_PART = 0.03
LATE_LEAST = 1.0


class PacedJob(Protocol):
    """What is asked of a stream job."""

    @property
    def running(self) -> bool: ...

    @property
    def remaining(self) -> int: ...

    @property
    def rate(self) -> float: ...

    @property
    def link_rate(self) -> float:
        """Bytes per second that the backing has been seen to deliver."""
        ...

    @property
    def speed(self) -> int: ...

    def set_pace(self, pace: int) -> None:
        """Hold the job to ``pace`` bytes per second; 0: as fast as it can."""
        ...


class Deadline:
    """The deadline of one job, if it has one.

    Attributes:
        needed: bytes per second that it takes to be done in time; 0 until known.
        late: seconds by which the job is going to miss it: 0 if it will not, infinity while
            nothing comes.
    """

    def __init__(self, job: PacedJob) -> None:
        self.needed = 0.0
        self.late = 0.0
        self._job = job
        self._due: float | None = None
        self._running_since: float | None = None
        self._changed = trio.lowlevel.ParkingLot()

    @property
    def left(self) -> float | None:
        """Seconds until it, negative behind it; None without one."""
        return None if self._due is None else self._due - trio.current_time()

    def set(self, seconds: float | None) -> None:
        """Be done in ``seconds`` from now; None: whenever."""
        self._due = None if seconds is None else trio.current_time() + seconds
        self.needed = self.late = 0.0
        self.look()
        self._changed.unpark_all()

    async def run(self) -> None:
        """A task that runs as long as the job may."""
        while True:
            if self._due is None:
                self._running_since = None
                await self._changed.park()
            self.look()
            with trio.move_on_after(INTERVAL):
                await self._changed.park()

    def look(self) -> None:
        """Make the pace fit what remains, and see whether it can be kept."""
        now = trio.current_time()
        if self._due is None or not self._job.running:
            self._running_since = None
            self._job.set_pace(0)
            return
        if self._running_since is None:
            self._running_since = now
        remaining, left = self._job.remaining, self._due - now
        self.needed = remaining / left if left > 0 else float("inf")
        ran = now - self._running_since
        measuring = ran < MEASURE_TIME or left <= 0
        self._job.set_pace(0 if measuring else max(int(self.needed * MARGIN), PACE_LEAST))
        if ran >= MEASURE_TIME:
            self._judge(remaining, left, ran)

    def _judge(self, remaining: int, left: float, ran: float) -> None:
        able = self._job.rate
        if ran < SETTLED_TIME:
            able = max(able, self._job.link_rate)
        if self._job.speed:
            able = min(able, float(self._job.speed))
        takes = remaining / able if able > 0 else float("inf" if remaining else 0)
        was_late = self.late > 0
        is_late = takes - left > max(LATE_PART * left, LATE_LEAST)
        self.late = takes - left if is_late else 0.0
        if is_late and not was_late:
            log.warning("%s", self._complaint(able, left))
        elif was_late and not is_late:
            log.info("the deadline of the stream job can be met again")

    def _complaint(self, able: float, left: float) -> str:
        if left <= 0:
            return "the stream job has missed its deadline; it goes on as fast as it can"
        link = f"there is {format_rate(able)}" if able > 0 else "nothing comes"
        cap = " (capped by --speed)" if self._job.speed and self._job.speed <= able else ""
        until = f": it will take {format_duration(self.late + left)}" if able > 0 else ""
        return (
            f"the stream job cannot finish in {format_duration(left)}: that takes"
            f" {format_rate(self.needed)}, {link}{cap}{until}"
        )
