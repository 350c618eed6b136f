# SPDX-License-Identifier: Apache-2.0
"""Durability: flushes that are shared, and checkpoints.

Any number of flush requests may be waiting; each is served by the first flush that
*begins* after it was made, so that a burst of them costs two syncs at the most
(invariant 2: everything completed before the request is durable).

A flush that has begun is not cancelled: between the snapshot of the metadata and the
worker that writes it there is no checkpoint that a cancellation could come in by. Flushes
have a thread limit of their own, so that workers which are busy with reads do not
delay them.

A failed sync is final (`nbdstream.leaf.durability`): the leaf refuses every later flush,
until it is opened again and shows what is there. A flush that found no space for
metadata can be repeated.
"""

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import trio

from nbdstream.leaf.base import Leaf, SyncError, flushing
from nbdstream.tasks import in_worker

log = logging.getLogger(__name__)


class Flusher:
    """Runs the flushes of one leaf, one at a time."""

    def __init__(self, leaf: Leaf) -> None:
        self._leaf = leaf
        self._lock = trio.Lock()
        self._threads = trio.CapacityLimiter(1)  # the lock admits one at a time, too
        self._begun = 0
        self._ended = 0

    @property
    def flushes(self) -> int:
        """How many flushes have been made."""
        return self._ended

    async def flush(self) -> None:
        """Make durable everything that was completed before this call.

        Raises OSError. Cancelled while it waits for its turn: nothing happened;
        cancelled later: the flush still runs to its end.
        """
        mine = self._begun + 1  # one that is under way now may have missed our data
        async with self._lock:
            if self._ended < mine:
                await self._run()

    async def flush_then(self, work: Callable[[], None]) -> None:
        """Flush, then run ``work`` in a worker before any other flush may begin.

        Raises OSError, and what ``work`` raises. Cancelled: as `flush`; once the flush
        has begun, ``work`` runs to its end as well.
        """
        async with self._lock:
            with trio.CancelScope(shield=True):
                await self._run()
                await self._in_worker(work)

    async def _run(self) -> None:
        self._begun += 1
        with trio.CancelScope(shield=True), _system_errors(), flushing(self._leaf) as finish:
            await self._in_worker(finish)
        self._ended = self._begun

    async def _in_worker(self, work: Callable[[], None]) -> None:
        await in_worker(work, limiter=self._threads)


@contextmanager
def _system_errors() -> Iterator[None]:
    """A lack of memory is an ``OSError``, as a lack of threads is."""
    try:
        yield
    except MemoryError as error:
        raise OSError(errno.ENOMEM, "no memory for a flush") from error


# A crash loses at most what was streamed in this many seconds (it is fetched again).
CHECKPOINT_INTERVAL = 5.0


class Flushable(Protocol):
    """A disk. Its leaf is another one after it was let go of and taken back."""

    leaf: Leaf

    async def flush(self) -> None: ...


async def run_checkpoints(disk: Flushable) -> None:
    """Now and then make durable what has become local, so that a crash costs little."""
    failed: Leaf | None = None  # a sync has failed: no later flush of this leaf can succeed
    while True:
        await trio.sleep(CHECKPOINT_INTERVAL)
        leaf = disk.leaf
        if leaf.dirty and leaf is not failed:
            try:
                await disk.flush()
            except SyncError:
                failed = leaf  # it has logged that, and tells every client that flushes
            except OSError as error:
                log.warning("%s: cannot make durable what is local: %s", leaf.path, error)
