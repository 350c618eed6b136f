# SPDX-License-Identifier: Apache-2.0
"""What the disk asks of a backing: the one interface of everything remote.

A backing is read-only and does not change. It may be slow, and it may go away: a read
waits, with retries and backoff, until the data is there or the backing timeout ends
(invariant 7: an error is never data).
"""

import abc
from dataclasses import dataclass, field
from typing import Protocol

import trio

from nbdstream.backing.grant import Grant, Priority
from nbdstream.backing.latency import Counts
from nbdstream.extents import BackingExtent

__all__ = ["Backing", "BackingStatistics", "Grant", "LocalCopy", "Priority"]


@dataclass(frozen=True)
class BackingStatistics:
    """A snapshot of how the backing does, for ``status``, metrics and tests.

    ``since`` is a POSIX time: when ``connected`` last changed. ``requests`` and
    ``bytes`` count completed reads by priority. ``window`` is how many bytes background
    reads may have in flight; ``rate`` (bytes per second), ``base_rtt`` and ``queue_delay``
    (seconds) are what it rests on, see `nbdstream.backing.window`. ``latency``: how long
    completed reads took, retries included, by priority.
    """

    connected: bool
    since: float
    connections: int
    last_error: str
    reconnects: int
    retries: int
    requests: dict[str, int]
    bytes: dict[str, int]
    in_flight: int
    window: int
    rate: float
    base_rtt: float
    queue_delay: float = 0.0
    sandbox: str = ""
    latency: dict[str, Counts] = field(default_factory=dict)


class LocalCopy(Protocol):
    """A file of this host that has a part of a backing, or all of it, at the same offsets. What it
    has, it has for good, so a positive answer stays true.

    ``path`` and ``fd`` are the file's; ``hot`` the flags of preadv(2) with which a read does not
    wait for a device; ``complete`` is set when it has all of the backing.
    """

    path: str
    fd: int
    hot: int
    complete: trio.Event

    def has(self, offset: int, length: int) -> bool:
        """Whether it is known to have the whole range. Never blocks."""
        ...

    async def read(self, view: memoryview, offset: int) -> bool:
        """Fill the view; False, and nothing is promised of the view, where it does not have it."""
        ...


class Backing(abc.ABC):
    """An open backing. All methods run in the event loop.

    Attributes:
        uri: as the user wrote it, for messages and for the leaf's own record.
        size: bytes.
        known_identity: its fingerprint, where its server vouches for that, else "".
        timeout: seconds for which reads wait while it is lost; None: without limit.
        local: the part of it that this host has anyway, where that can be read as a file.
    """

    uri: str
    size: int
    known_identity: str = ""
    timeout: float | None = None
    local: LocalCopy | None = None

    @abc.abstractmethod
    async def read(
        self, view: memoryview, offset: int, priority: Priority, grant: Grant | None = None
    ) -> None:
        """Fill ``view`` with the backing's bytes at ``offset``.

        Returns only with all of it read without error; waits for a lost backing.
        Cancelled: nothing more is written to ``view`` after the call has returned.
        ``grant`` is the room that a background read was given; it is used up.

        Raises:
            BackingGoneError: the backing timeout ended.
            BackingMismatchError: what came back after a reconnect is another image.
        """

    async def bring(self, offset: int, length: int) -> bool:
        """Have the local copy get a range that a guest waits for, by one request; False if it did
        not: then `read` it, which says why not, or tries again."""
        return False

    @abc.abstractmethod
    def promote(self, offset: int, length: int) -> None:
        """A guest now waits for reads that were sent with a lower priority."""

    @abc.abstractmethod
    def known_zero(self, offset: int, length: int) -> bool:
        """Whether the whole range is already known to read as zeroes; sends no request."""

    @abc.abstractmethod
    def forget(self) -> None:
        """Drop what is known of the extents: the image may have been written meanwhile."""

    @abc.abstractmethod
    async def pin(self) -> str:
        """From now on the image does not change: return its fingerprint, and refuse any other
        image after a reconnect. Raises as `read` does."""

    @abc.abstractmethod
    async def extents(self, offset: int, length: int) -> list[BackingExtent]:
        """What the backing reports of a range: at least one extent, starting at ``offset``.

        May cover less than was asked for, never more. Neighbours may be alike. A
        backing that cannot tell reports data. Raises as `read` does.
        """

    @abc.abstractmethod
    async def wait_for_room(self, priority: Priority) -> Grant:
        """Wait until background work of this priority may send another read.

        Returns the room for it; its length is the unit of work, chosen from the measured
        link. Demand never waits here. Cancelled: no room is taken.
        """

    @abc.abstractmethod
    def set_unit_least(self, length: int) -> None:
        """Say that no background read will ask for less than ``length`` bytes (the leaf's
        cluster): the window must be able to tell such a read's own time from a queue's."""

    @abc.abstractmethod
    def set_speed(self, speed: int) -> None:
        """Cap background reads at ``speed`` bytes per second; 0 means no cap."""

    def set_timeout(self, timeout: float | None) -> None:
        """Change the timeout, also for reads that wait already."""
        self.timeout = timeout

    @abc.abstractmethod
    def statistics(self) -> BackingStatistics:
        """How things stand now."""

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Disconnect. Reads still waiting fail with BackingGoneError."""
