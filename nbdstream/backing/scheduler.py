# SPDX-License-Identifier: Apache-2.0
"""Decides when background work may send its next read, and of what size.

Every read of the backing is announced here when it is sent and when it has ended.
Demand is only counted: it never waits. Everything else asks for room first
(`wait_for_room`), is let in by priority, first come first served within one, and only
while

- all that is in flight, demand included, leaves room in the window, so that a guest's
  read takes the place of background data instead of queueing behind more of it; and
- the speed cap (`Pacer`) allows it.

Room that was granted is reserved until its read begins or its holder gives it back
(`nbdstream.backing.grant`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import trio

from nbdstream.backing.connection import Timing
from nbdstream.backing.grant import Grant, Priority
from nbdstream.backing.pacer import Pacer
from nbdstream.backing.window import Sent, Window


@dataclass(eq=False)
class Flight:
    """A read that is under way, in whatever number of attempts.

    ``priority`` may rise while it is (`Scheduler.promote`); ``background`` is how it was
    begun. ``sent`` is the window's note of the last attempt.
    """

    offset: int
    length: int
    priority: Priority
    background: bool
    began: float
    sent: Sent | None = None


class Sample(NamedTuple):
    """One answered read, and the window as it was then: a point of a picture over time."""

    time: float
    priority: Priority
    length: int
    latency: float
    window: int
    in_flight: int
    rate: float
    base_rtt: float
    queue_delay: float


class Scheduler:
    """One per backing.

    Attributes:
        window: the controller; its fields are for reading.
        in_flight: bytes asked for and not yet answered, of every priority.
        requests, bytes: answered so far, by priority.
        trace: called with a `Sample` for each answered read, if set.
    """

    def __init__(self, unit_least: int) -> None:
        self.window = Window(unit_least=unit_least)
        self.in_flight = 0
        self.requests = dict.fromkeys(Priority, 0)
        self.bytes = dict.fromkeys(Priority, 0)
        self.trace: Callable[[Sample], object] | None = None
        self._pacer = Pacer()
        self._flights: set[Flight] = set()
        self._background = 0
        self._reserved = 0
        self._queue: list[tuple[Priority, int]] = []
        self._tickets = count()
        self._changed = trio.lowlevel.ParkingLot()
        # The window, and nothing else, is why the first in the queue waits.
        self._limited = False

    # -- reads -------------------------------------------------------------------------

    def begin(
        self, offset: int, length: int, priority: Priority, grant: Grant | None = None
    ) -> Flight:
        """A read is wanted: it takes the room that ``grant`` has reserved, if there is one.
        `end` it, whatever becomes of it."""
        now = trio.current_time()
        background = priority != Priority.DEMAND
        self.in_flight += length
        if background:
            self._background += length
            self._pacer.spend(now, length)
        if grant is not None:
            grant.use(priority)
        flight = Flight(offset, length, priority, background, now)
        self._flights.add(flight)
        return flight

    def send(self, flight: Flight) -> None:
        """There is a connection, and the read goes out on it: its time counts from now."""
        if flight.sent is not None:
            self.window.lost(flight.sent)
        now = trio.current_time()
        flight.sent = self.window.sent(now, flight.length, background=flight.background)

    def end(self, flight: Flight, timing: Timing | None) -> None:
        """It was answered; or not, or only after trouble, if ``timing`` is None."""
        self._flights.remove(flight)
        self.in_flight -= flight.length
        if flight.background:
            self._background -= flight.length
        if flight.sent is not None and timing is None:
            self.window.lost(flight.sent)
        elif flight.sent is not None and timing is not None:
            self.window.delivered(flight.sent, timing.done, limited=self._limited)
            self.requests[flight.priority] += 1
            self.bytes[flight.priority] += flight.length
            if self.trace is not None:
                self.trace(self._sample(flight, timing.done))
        self._wake()

    def promote(self, offset: int, length: int) -> None:
        """A guest now waits for the reads under way that touch the range."""
        for flight in self._flights:
            if flight.offset < offset + length and offset < flight.offset + flight.length:
                flight.priority = Priority.DEMAND

    def _sample(self, flight: Flight, now: float) -> Sample:
        window = self.window
        return Sample(
            time=now,
            priority=flight.priority,
            length=flight.length,
            latency=now - flight.began,
            window=window.size,
            in_flight=self.in_flight,
            rate=window.rate,
            base_rtt=window.base_rtt,
            queue_delay=window.queue_delay,
        )

    # -- room --------------------------------------------------------------------------

    async def wait_for_room(self, priority: Priority) -> Grant:
        """See `Backing.wait_for_room`."""
        if priority == Priority.DEMAND:
            await trio.lowlevel.checkpoint()
            return Grant(self.window.unit, priority)
        place = (priority, next(self._tickets))
        self._queue.append(place)
        try:
            await trio.lowlevel.checkpoint()
            while True:
                now = trio.current_time()
                unit = self._pacer.limit(self.window.unit)
                retry_at = self._blocked_until(now, unit) if place == min(self._queue) else None
                if retry_at is not None and retry_at <= now:
                    self._reserved += unit
                    return Grant(unit, priority, self._grant_ended)
                with trio.move_on_at(float("inf") if retry_at is None else retry_at):
                    await self._changed.park()
        finally:
            self._queue.remove(place)
            self._wake()

    def _grant_ended(self, grant: Grant) -> None:
        self._reserved -= grant.length
        self._wake()

    def _blocked_until(self, now: float, unit: int) -> float:
        """When to look again whether a read of ``unit`` bytes may go: at once if not later.

        Infinity if only the end of another read can make room.
        """
        # One unit may always be under way, however small the window and busy the guest.
        alone = self._background + self._reserved == 0
        self._limited = not alone and self.in_flight + self._reserved + unit > self.window.size
        return float("inf") if self._limited else self._pacer.ready_at(now, unit)

    def set_speed(self, speed: int) -> None:
        """See `Backing.set_speed`."""
        self._pacer.set_speed(speed)
        self._wake()

    def _wake(self) -> None:
        """Those who wait for room should look again."""
        self._changed.unpark_all()
