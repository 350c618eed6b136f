# SPDX-License-Identifier: Apache-2.0
"""The connections of one backing: kept up, watched, and handed out.

The first connection is for demand: bulk data does not fill it, so a demand read waits
for nothing but the link itself. If the server allows several connections
(NBD_FLAG_CAN_MULTI_CONN), a few more carry background reads; they are made for the first such
read. Otherwise, and until then, the one carries everything, which is correct, only less prompt.

Each connection has a slot and a task that replaces it for as long as the pool lives,
with backoff and jitter. A new connection goes into service only after ``verify`` has
looked at what is served there. An image of no more than `BULK_LEAST` bytes would be complete
before they are of use: it has the one.

A server of our own (`OwnServer`) has an export for each class of background reads, and a
connection for each class is made when such a read first needs one. It is on this host, where
the kernel tells at once that a process has ended, and it is silent for as long as the far end
is: so silence is no reason to give up a connection to it.

Elsewhere, one that is silent for too long although something was
asked of it (a half-open or stalled link) is given up; patience grows with each such
event and comes back to normal when data does, so a server that is merely slow gets
its time.
"""

import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import trio

from nbdstream.backing.base import Priority
from nbdstream.backing.connect import CONNECT_TIMEOUT, Endpoint, connect
from nbdstream.backing.connection import Connection, ConnectionLostError
from nbdstream.errors import BackingError, BackingGoneError, BackingMismatchError

log = logging.getLogger(__name__)

BACKOFF_FIRST = 0.1
BACKOFF_MOST = 5.0
# A connection that lasted this long was a good one: its successor is made without delay.
GOOD_LIFE = 1.0
# Silence that is taken for a lost link; doubled each time, up to the second figure.
PATIENCE_FIRST = 5.0
PATIENCE_MOST = 120.0
WATCH_INTERVAL = 0.5
# An image that is smaller is read on one connection.
BULK_LEAST = 4 << 20

_BACKGROUND = frozenset(Priority) - {Priority.DEMAND}

Verify = Callable[[Connection], Awaitable[None]]


def jittered(delay: float) -> float:
    """``delay`` spread, so that those who lost a server together do not return together."""
    return delay * random.uniform(0.5, 1.0)


@dataclass(eq=False)
class _Slot:
    """A place for a connection to an endpoint, for reads of some classes.

    ``tried``: at least one attempt to fill it has ended. ``needed``: it is to be filled.
    """

    endpoint: Endpoint
    carries: frozenset[Priority]
    needed: trio.Event = field(default_factory=trio.Event)
    connection: Connection | None = None
    tried: bool = False


def _live(slots: list[_Slot]) -> list[Connection]:
    return [
        slot.connection
        for slot in slots
        if slot.connection is not None and not slot.connection.lost
    ]


class Pool:
    """Connections to one endpoint.

    Attributes:
        connected: there is a connection in service.
        since: POSIX time at which ``connected`` last changed.
        last_error: why a connection or an attempt last failed.
        reconnects: connections made to replace lost ones.
        on_change: called when ``connected`` has changed.
        timeout: how long `acquire` waits without any connection, in seconds; None is for ever.
    """

    def __init__(self, endpoint: Endpoint, verify: Verify, timeout: float | None) -> None:
        self._endpoint = endpoint
        self._verify = verify
        self.timeout = timeout
        self._slots: list[_Slot] = []
        self._changed = trio.lowlevel.ParkingLot()
        self._failure: BackingError | None = None
        self._lost_at = trio.current_time()
        self._patience = PATIENCE_FIRST
        self.connected = False
        self.on_change: Callable[[], None] = lambda: None
        self.since = time.time()
        self.last_error = ""
        self.reconnects = 0

    # -- handing out -------------------------------------------------------------------

    async def acquire(self, priority: Callable[[], Priority]) -> Connection:
        """A connection for a request of this priority, as soon as there is one.

        Raises:
            BackingGoneError: there has been none for the timeout, or the pool is closed.
            BackingMismatchError: what answers now is another image.
        """
        while True:
            if self._failure is not None:
                raise type(self._failure)(str(self._failure))
            connection = self._pick(priority())
            if connection is not None:
                return connection
            with trio.move_on_at(self._give_up_at()):
                await self._changed.park()
                continue
            raise BackingGoneError(
                f"{self._endpoint.name}: out of reach for more than {self.timeout:g} s: "
                f"{self.last_error}"
            )

    def _give_up_at(self) -> float:
        if self.timeout is None or self.connected:
            return float("inf")
        return self._lost_at + self.timeout

    def _pick(self, priority: Priority) -> Connection | None:
        """The least busy connection of those meant for the priority, if one is up."""
        meant = [slot for slot in self._slots if priority in slot.carries]
        for slot in meant:
            slot.needed.set()
        candidates = _live(meant)
        if not candidates and self._endpoint.own is None:
            # Bulk takes demand's connection for as long as its own are being made: they take a
            # few round trips, in which the window is still small.
            candidates = _live(self._slots)
        return min(candidates, key=lambda connection: connection.in_flight, default=None)

    def _live(self) -> list[Connection]:
        return _live(self._slots)

    @property
    def connections(self) -> int:
        """How many are in service."""
        return len(self._live())

    def progress(self) -> None:
        """A request was answered: silence means what it usually does."""
        self._patience = PATIENCE_FIRST

    def hint(self, offset: int, length: int) -> None:
        """Tell a server of ours that a guest now waits for a range that was asked for in the
        background; others could not do anything about it."""
        if self._endpoint.own is not None:
            connection = self._pick(Priority.DEMAND)
            if connection is not None:
                connection.hint(offset, length)

    def note(self, error: Exception | str) -> None:
        """Remember trouble for those who ask how things stand; what has ended all of it stays."""
        self.last_error = str(self._failure or error)

    # -- keeping up --------------------------------------------------------------------

    async def start(self, nursery: trio.Nursery, first: Connection | None) -> None:
        """Keep connections up from now on, beginning with ``first``, which the caller made.

        Returns once that one is in service. Without it, returns at once; reads wait then.

        Raises:
            BackingMismatchError: ``first`` leads to another image.
            BackingGoneError: ``first`` was lost again.
        """
        slot = _Slot(self._endpoint, frozenset({Priority.DEMAND}))
        slot.needed.set()
        self._slots.append(slot)
        nursery.start_soon(self._keep, slot, first, nursery)
        nursery.start_soon(self._watch)
        while first is not None and not slot.tried:
            await self._changed.park()
        if self._failure is not None:
            raise self._failure
        if first is not None and slot.connection is None:
            raise BackingGoneError(f"{self._endpoint.name}: {self.last_error}")

    def set_timeout(self, timeout: float | None) -> None:
        """Change the timeout, also for those who wait already."""
        self.timeout = timeout
        self._changed.unpark_all()

    def close(self) -> None:
        """End all connections; tasks that wait for one get BackingGoneError."""
        self.fail(BackingGoneError(f"{self._endpoint.name}: the backing was closed"))

    def fail(self, error: BackingError) -> None:
        """End all connections; tasks that wait for one get the error, now and later."""
        self._failure = self._failure or error
        self.note(error)
        for slot in self._slots:
            if slot.connection is not None:
                slot.connection.kill(str(error))
        self._wake()

    def _wake(self) -> None:
        """The set of connections changed."""
        connected = bool(self._live())
        if connected != self.connected:
            self.connected = connected
            self.since = time.time()
            self._lost_at = trio.current_time()
            if connected:
                log.info("%s: connected", self._endpoint.name)
            elif self._failure is None:
                log.warning("%s: disconnected: %s", self._endpoint.name, self.last_error)
            self.on_change()
        self._changed.unpark_all()

    async def _keep(self, slot: _Slot, ready: Connection | None, nursery: trio.Nursery) -> None:
        """Fill the slot, again and again; the first time with ``ready`` if there is one."""
        delay = BACKOFF_FIRST
        await slot.needed.wait()
        while self._failure is None:
            began = trio.current_time()
            first, ready = ready, None
            try:
                connection = first or await connect(slot.endpoint)
                await self._serve(slot, connection, nursery)
            except BackingMismatchError as error:
                if first is None:  # else `start` raises it
                    log.error("%s", error)  # noqa: TRY400 - an operator's message, no traceback
                self.fail(error)
            except (BackingError, ConnectionLostError, OSError) as error:
                self.note(error)
            except Exception as error:
                # A bug, or a system that has no threads left: this attempt has failed, and
                # the next one may not. The disk, which this task serves, goes on.
                log.exception("%s: an attempt to connect failed unexpectedly", self._endpoint.name)
                self.note(error)
            slot.tried = True
            self._wake()
            if trio.current_time() - began > GOOD_LIFE + delay:
                delay = BACKOFF_FIRST
            await trio.sleep(jittered(delay))
            delay = min(delay * 2, BACKOFF_MOST)

    async def _serve(self, slot: _Slot, connection: Connection, nursery: trio.Nursery) -> None:
        """Have the connection in service until it ends, and always raise why it did."""
        failure: Exception | None = None
        async with trio.open_nursery() as own:
            own.start_soon(connection.run)
            try:
                await self._look_at(connection)
            except (BackingError, ConnectionLostError) as error:
                failure = error
                connection.kill(str(error))
            else:
                self.reconnects += slot.tried
                slot.connection, slot.tried = connection, True
                self._add_bulk_slots(connection, nursery)
                self._wake()
        slot.connection = None
        raise failure or ConnectionLostError(connection.lost)

    async def _look_at(self, connection: Connection) -> None:
        with trio.move_on_after(CONNECT_TIMEOUT):
            await self._verify(connection)
            return
        raise BackingGoneError(f"{self._endpoint.name}: no answer in {CONNECT_TIMEOUT:g} s")

    def _add_bulk_slots(self, connection: Connection, nursery: trio.Nursery) -> None:
        if len(self._slots) > 1:
            return
        own = self._endpoint.own
        if own is not None:
            for priority, uri in own.classes.items():
                endpoint = replace(self._endpoint, uri=uri)
                self._slots.append(_Slot(endpoint, frozenset({priority})))
        elif connection.multi_conn and connection.size > BULK_LEAST:
            for _ in range(self._endpoint.bulk_connections):
                self._slots.append(_Slot(self._endpoint, _BACKGROUND))
        for slot in self._slots[1:]:
            nursery.start_soon(self._keep, slot, None, nursery)

    async def _watch(self) -> None:
        """Give up connections on which nothing comes although something should."""
        while True:
            await trio.sleep(WATCH_INTERVAL)
            if self._endpoint.own is not None and self.timeout is None:
                continue
            now = trio.current_time()
            stalled = [
                connection
                for connection in self._live()
                if connection.stalled_for(now) > self._patience
            ]
            for connection in stalled:
                connection.kill(f"nothing came for {self._patience:g} s")
            if stalled:
                self._patience = min(self._patience * 2, PATIENCE_MOST)
                self._wake()
