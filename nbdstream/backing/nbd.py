# SPDX-License-Identifier: Apache-2.0
"""The backing over NBD: reads that always end well, or say for good why not.

Puts the parts together: `Pool` has the connections, `Scheduler` decides when
background reads go, `ExtentMap` remembers block status. What is left for this module
is the promise of `Backing.read`: try again on another connection when one was lost, and
after a while when the server answered with an error, until there is data or the
backing timeout has passed.
"""

import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from time import monotonic
from typing import TypeVar

import trio

from nbdstream.backing.base import Backing, BackingStatistics, Grant, Priority
from nbdstream.backing.connect import Endpoint
from nbdstream.backing.connection import Connection, ConnectionLostError, Timing
from nbdstream.backing.extentmap import ExtentMap
from nbdstream.backing.identity import fingerprint, fingerprint_of
from nbdstream.backing.latency import Latency
from nbdstream.backing.pool import Pool, jittered
from nbdstream.backing.scheduler import Scheduler
from nbdstream.errors import (
    BackingError,
    BackingGoneError,
    BackingMismatchError,
    BackingReadError,
    UsageError,
)
from nbdstream.extents import BackingExtent, clip
from nbdstream.tasks import open_background_nursery

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_FIRST = 0.2
RETRY_MOST = 10.0
# Seconds for which a server that has no space to keep data is not asked to.
FULL_TIME = 5.0
# How much one block status query covers: adapted, so that an answer has a useful number
# of extents, and not so many that making sense of it holds up the event loop.
STATUS_FIRST = 256 << 20
STATUS_LEAST = 4 << 20
STATUS_MOST = 2 << 30
STATUS_MANY = 2048
STATUS_FEW = 128


class NbdBacking(Backing):
    """An open NBD backing; made by `open_backing`.

    Attributes:
        scheduler: for those who want to watch the window at work.
        on_change: called when its connections or its place have changed.
        sandbox: says what confines the helper process, "" without one.
        words: says what the helper processes last complained of, "" for nothing.
    """

    def __init__(self, endpoint: Endpoint, size: int, timeout: float | None) -> None:
        self.uri = endpoint.name
        self.known_identity = endpoint.own.identity if endpoint.own is not None else ""
        self.size = size
        self.scheduler = Scheduler(endpoint.unit_least)
        self.timeout = timeout
        self._identity = ""
        self._opened = Pool(endpoint, self._verify, timeout)
        self._pool = self._opened
        self.on_change: Callable[[], None] = lambda: None
        self._opened.on_change = lambda: self.on_change()
        self._reconnects = 0  # of pools before this one
        self._extents = ExtentMap()
        self._status_length = STATUS_FIRST
        self._retries = 0
        self._full_until = 0.0
        self._latency = {priority: Latency() for priority in Priority}
        self.sandbox: Callable[[], str] = str
        self.words: Callable[[], str] = str

    # -- reads -------------------------------------------------------------------------

    async def read(
        self, view: memoryview, offset: int, priority: Priority, grant: Grant | None = None
    ) -> None:
        """See `Backing.read`."""
        if not view:
            return
        if offset < 0 or offset + len(view) > self.size:
            raise UsageError(f"read of {len(view)} bytes at {offset} of a {self.size} byte backing")
        if self.local is not None and await self.local.read(view, offset):
            return

        async def attempt(connection: Connection) -> Timing:
            self.scheduler.send(flight)
            timing = await self._by_file(connection, view, offset, flight.priority)
            return timing or await connection.read(view, offset)

        timing: Timing | None = None
        retries = self._retries
        flight = self.scheduler.begin(offset, len(view), priority, grant)
        try:
            timing = await self._until_answered(attempt, lambda: flight.priority)
            self._latency[flight.priority].add(trio.current_time() - flight.began)
        finally:
            # A time with trouble in it says nothing about the link.
            self.scheduler.end(flight, timing if self._retries == retries else None)

    async def bring(self, offset: int, length: int) -> bool:
        """See `Backing.bring`."""
        if self.local is None or self._full_until > monotonic():
            return False
        timing: Timing | None = None
        flight = self.scheduler.begin(offset, length, Priority.DEMAND)
        try:
            connection = await self._pool.acquire(lambda: Priority.DEMAND)
            if connection.takes_hints:
                self.scheduler.send(flight)
                timing = await connection.cache(offset, length)
                self._latency[Priority.DEMAND].add(trio.current_time() - flight.began)
        except (ConnectionLostError, BackingError) as error:
            log.debug("%s: not brought by one request: %s", self.uri, error)
        finally:
            self.scheduler.end(flight, timing)
        return timing is not None

    async def _by_file(
        self, connection: Connection, view: memoryview, offset: int, priority: Priority
    ) -> Timing | None:
        """Have the server put the data where we read it ourselves, so that it does not cross the
        socket; None if that did not work. Raises as `Connection.read` does."""
        if self.local is None or not connection.takes_hints or self._full_until > monotonic():
            return None
        try:
            timing = await connection.cache(offset, len(view))
        except BackingReadError as error:
            if error.errno != errno.ENOSPC or priority is not Priority.DEMAND:
                raise
            # It cannot keep the data, but can pass it on.
            self._full_until = monotonic() + FULL_TIME
            return None
        return timing if await self.local.read(view, offset) else None

    async def _until_answered(
        self, attempt: Callable[[Connection], Awaitable[T]], priority: Callable[[], Priority]
    ) -> T:
        """Make a request until it is answered. Raises as `read` does."""
        delay = RETRY_FIRST
        trouble_at: float | None = None
        while True:
            pool = self._pool
            try:
                connection = await pool.acquire(priority)
            except BackingGoneError:
                if pool is self._pool:
                    raise
                continue  # it moved meanwhile
            try:
                answer = await attempt(connection)
            except (ConnectionLostError, BackingReadError) as error:
                self._retries += 1
                now = trio.current_time()
                trouble_at = now if trouble_at is None else trouble_at
                # Also where each new connection is lost again, as it is to a server that
                # shakes hands and then answers nothing: to the pool it is connected.
                if self.timeout is not None and now - trouble_at > self.timeout:
                    raise BackingGoneError(
                        f"{self.uri}: failed for more than {self.timeout:g} s: {error}"
                    ) from error
                if isinstance(error, BackingReadError):
                    self._pool.note(self.words() or error)
                    await trio.sleep(jittered(delay))
                    delay = min(delay * 2, RETRY_MOST)
            else:
                self._pool.progress()
                return answer

    # -- block status ------------------------------------------------------------------

    def known_zero(self, offset: int, length: int) -> bool:
        """See `Backing.known_zero`."""
        return self._extents.is_zero(offset, length)

    def forget(self) -> None:
        """See `Backing.forget`."""
        self._extents = ExtentMap()

    async def pin(self) -> str:
        """See `Backing.pin`."""
        identity = await fingerprint(self)
        self.expect(identity)
        return identity

    async def extents(self, offset: int, length: int) -> list[BackingExtent]:
        """See `Backing.extents`."""
        known = self._extents.find(offset, length)
        if known:
            return known

        async def attempt(connection: Connection) -> list[BackingExtent] | None:
            if not connection.has_block_status:
                return None
            ask = min(self._status_length, self.size - offset)
            return await connection.block_status(offset, ask)

        memory = None
        while memory is not self._extents:
            # An answer that was under way while `forget` was called may be about an older
            # content: it is thrown away, and the question is asked again.
            memory = self._extents
            found = await self._until_answered(attempt, lambda: Priority.STREAM)
        if found is None:
            return [BackingExtent(offset, length, zero=False)]
        if len(found) > STATUS_MANY:
            self._status_length = max(self._status_length // 2, STATUS_LEAST)
        elif len(found) < STATUS_FEW:
            self._status_length = min(self._status_length * 2, STATUS_MOST)
        self._extents.add(found)
        return list(clip(found, offset, length))

    # -- room --------------------------------------------------------------------------

    def promote(self, offset: int, length: int) -> None:
        """See `Backing.promote`."""
        self.scheduler.promote(offset, length)
        self._pool.hint(offset, length)

    async def wait_for_room(self, priority: Priority) -> Grant:
        """See `Backing.wait_for_room`."""
        return await self.scheduler.wait_for_room(priority)

    def set_unit_least(self, length: int) -> None:
        """See `Backing.set_unit_least`."""
        self.scheduler.window.set_unit_least(length)

    def set_speed(self, speed: int) -> None:
        """See `Backing.set_speed`."""
        self.scheduler.set_speed(speed)

    def set_timeout(self, timeout: float | None) -> None:
        """See `Backing.set_timeout`."""
        self.timeout = timeout
        self._pool.set_timeout(timeout)

    def statistics(self) -> BackingStatistics:
        """See `Backing.statistics`."""
        pool, scheduler = self._pool, self.scheduler
        return BackingStatistics(
            connected=pool.connected,
            since=pool.since,
            connections=pool.connections,
            last_error=pool.last_error,
            reconnects=self._reconnects + pool.reconnects,
            retries=self._retries,
            requests={p.name.lower(): count for p, count in scheduler.requests.items()},
            bytes={p.name.lower(): count for p, count in scheduler.bytes.items()},
            in_flight=scheduler.in_flight,
            window=scheduler.window.size,
            rate=scheduler.window.rate,
            base_rtt=scheduler.window.base_rtt,
            queue_delay=scheduler.window.queue_delay,
            sandbox=self.sandbox(),
            latency={p.name.lower(): latency.counts() for p, latency in self._latency.items()},
        )

    # -- life --------------------------------------------------------------------------

    def expect(self, identity: str) -> None:
        """From now on, refuse any image with another fingerprint after a reconnect."""
        self._identity = identity

    def refuse(self, reason: str) -> None:
        """End all reads, now and later, with BackingMismatchError: what is served there is not
        the image any more."""
        self._opened.fail(BackingMismatchError(f"{self.uri}: {reason}"))

    async def _verify(self, connection: Connection) -> None:
        """Look at what a new connection serves, before it is used."""
        if connection.size != self.size:
            raise BackingMismatchError(
                f"{self.uri}: now has {connection.size} bytes, it had {self.size}: "
                "not the image that the leaf belongs to"
            )
        if self._identity and not self.known_identity:
            identity = await fingerprint_of(connection.size, connection.read)
            if identity != self._identity:
                raise BackingMismatchError(
                    f"{self.uri}: its content is not that of the image that the leaf belongs to "
                    f"(fingerprint {identity[:14]}…, expected {self._identity[:14]}…)"
                )

    async def start(self, nursery: trio.Nursery, first: Connection | None) -> None:
        """Begin to work with ``first``; see `Pool.start`."""
        await self._pool.start(nursery, first)

    def take_over(self, other: "NbdBacking") -> None:
        """Go on with the connections of another backing, which has the same image.

        Reads under way are sent again there. The connections still end with ``other``.
        """
        old = self._pool
        self._reconnects += old.reconnects
        self._pool = other._pool
        self.uri, self.known_identity = other.uri, other.known_identity
        self.sandbox, self.words = other.sandbox, other.words
        old.on_change = lambda: None
        self._pool.on_change = lambda: self.on_change()
        old.close()
        self.on_change()

    async def aclose(self) -> None:
        """See `Backing.aclose`. Connections that were taken over end with their own backing."""
        self._opened.close()
        await trio.lowlevel.checkpoint()


@contextlib.asynccontextmanager
async def open_nbd(
    endpoint: Endpoint,
    first: Connection | None,
    *,
    timeout: float | None,  # noqa: ASYNC109
    size: int,
    identity: str,
) -> AsyncIterator[NbdBacking]:
    """Open the backing that is served at ``endpoint``, beginning with the connection ``first``.

    ``size`` and ``identity``: what it has to be; 0 and "" for whatever it is. Without a
    ``first`` the size has to be known.

    Raises BackingMismatchError or BackingGoneError, on account of ``first``.
    """
    known = size or (first.size if first is not None else 0)
    backing = NbdBacking(endpoint, known, timeout)
    backing.expect(identity)
    async with open_background_nursery() as nursery:
        try:
            await backing.start(nursery, first)
            yield backing
        finally:
            await backing.aclose()
