# SPDX-License-Identifier: Apache-2.0
"""A client of a path: a window, and around it the rules of the scheduler and the pool.

Background reads go on the least busy of three connections, demand on one of its own.
Background reads go out while all that is in flight, demand included, leaves room in the
window; one unit may always be under way. Demand never waits. What is lost with a
connection is asked for again, and its time is not shown to the window.
"""

from dataclasses import dataclass
from typing import Protocol

from nbdstream.backing.window import Sent
from testbed.paths.events import Events
from testbed.paths.network import Link
from testbed.paths.servers import Server

BULK_CONNECTIONS = 3
# Delivered bytes are counted in steps of so many seconds.
STEP = 0.25
RECONNECT_TIME = 0.1
RECONNECT_TRIPS = 4


class Controller(Protocol):
    """What `nbdstream.backing.window.Window` looks like to a client."""

    @property
    def size(self) -> int: ...
    @property
    def unit(self) -> int: ...
    def sent(self, now: float, length: int, *, background: bool = True) -> Sent: ...
    def lost(self, request: Sent) -> None: ...
    def delivered(self, request: Sent, now: float, *, limited: bool = True) -> None: ...


class FixedWindow:
    """A controller that controls nothing: the oracle's."""

    def __init__(self, size: int, unit: int) -> None:
        self.size, self.unit = size, unit

    def sent(self, now: float, length: int, *, background: bool = True) -> Sent:
        return Sent(now, length, 0, background)

    def lost(self, request: Sent) -> None:
        pass

    def delivered(self, request: Sent, now: float, *, limited: bool = True) -> None:
        pass


@dataclass(eq=False)
class Read:
    """A read under way. ``ended`` is called for a guest's when it is answered."""

    offset: int
    length: int
    demand: bool
    began: float
    connection: int
    sent: Sent
    tainted: bool = False
    attempt: int = 0


class Client:
    """One leaf that streams all of an image, without an end.

    Attributes:
        steps: bytes of background reads delivered, by steps of `STEP` seconds.
        demand: (began, length, seconds) of each answered demand read.
        in_flight: bytes asked for and not yet answered.
    """

    def __init__(
        self, events: Events, link: Link, server: Server, window: Controller, *, stream: bool = True
    ) -> None:
        self.steps: list[int] = []
        self.demand: list[tuple[float, int, float]] = []
        self.in_flight = 0
        self.largest_unit = 0
        self.window = window
        self._events, self._link, self._server = events, link, server
        self._stream = stream
        self._background = 0
        self._offset = 0
        self._busy = [0] * (1 + BULK_CONNECTIONS)
        self._reads: set[Read] = set()
        self._connected_at = 0.0

    def start(self) -> None:
        """Begin to stream."""
        self._fill()

    def bytes_between(self, first: float, last: float) -> int:
        """Background bytes delivered; times are rounded to steps."""
        return sum(self.steps[round(first / STEP) : round(last / STEP)])

    # -- sending -----------------------------------------------------------------------

    def _fill(self) -> None:
        if not self._stream:
            return
        window = self.window
        while self._background == 0 or self.in_flight + window.unit <= window.size:
            self.largest_unit = max(self.largest_unit, window.unit)
            self._send(self._offset, window.unit, demand=False)
            self._offset += window.unit

    def read(self, offset: int, length: int) -> Read:
        """A guest's read goes out now."""
        return self._send(offset, length, demand=True)

    def _send(self, offset: int, length: int, *, demand: bool) -> Read:
        now = self._events.now
        connection = 0 if demand else min(range(1, len(self._busy)), key=self._busy.__getitem__)
        self.in_flight += length
        if not demand:
            self._background += length
        self._busy[connection] += length
        sent = self.window.sent(now, length, background=not demand)
        read = Read(offset, length, demand, now, connection, sent)
        self._reads.add(read)
        if self._connected_at > now:
            read.tainted = True
            self._events.at(self._connected_at, self._request, read, read.attempt)
        else:
            self._request(read, read.attempt)
        return read

    def _request(self, read: Read, attempt: int) -> None:
        def arrived() -> None:
            self._server.serve(lane, read.offset, read.length, served)

        def served() -> None:
            self._link.send(lane, read.length, answered)

        def answered() -> None:
            self._answered(read, attempt)

        lane = (self, read.connection)
        self._events.at(self._events.now + self._link.delay / 2, arrived)

    def cut(self) -> None:
        """Lose all connections, and what was asked for on them; they come back soon."""
        now = self._events.now
        self._connected_at = now + RECONNECT_TIME + RECONNECT_TRIPS * self._link.delay
        for read in sorted(self._reads, key=lambda read: (read.began, read.offset)):
            read.attempt += 1
            read.tainted = True
            self.window.lost(read.sent)
            read.sent = self.window.sent(now, read.length, background=not read.demand)
            self._events.at(self._connected_at, self._request, read, read.attempt)

    # -- answers -----------------------------------------------------------------------

    def _answered(self, read: Read, attempt: int) -> None:
        if attempt != read.attempt:
            return
        now = self._events.now
        self._reads.remove(read)
        self.in_flight -= read.length
        self._busy[read.connection] -= read.length
        if not read.demand:
            self._background -= read.length
        if read.tainted:
            self.window.lost(read.sent)
        else:
            self.window.delivered(read.sent, now, limited=self._stream)
        if read.demand:
            self.demand.append((read.began, read.length, now - read.began))
        else:
            step = int(now / STEP)
            self.steps.extend([0] * (step + 1 - len(self.steps)))
            self.steps[step] += read.length
        self._fill()
        self.on_answer(read)

    def on_answer(self, read: Read) -> None:
        """Guests that wait for their reads replace this."""
