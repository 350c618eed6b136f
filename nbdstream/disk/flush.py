# SPDX-License-Identifier: Apache-2.0
"""Durability: flushes that are shared, and checkpoints.

Any number of flush requests may be waiting; each is served by the first flush that
*begins* after it was made, so that a burst of them costs two syncs at the most
(invariant 2: everything completed before the request is durable).

A failed sync is final. The kernel may have dropped the dirty pages and will report
success next time, so that no later sync could be trusted ("fsync failure"); every
later flush fails with the same error, until the leaf is opened anew and shows what
is really there. A flush that found no space for metadata can be repeated.
"""

import logging
from collections.abc import Awaitable, Callable

import trio

from nbdstream.leaf.base import Leaf, SyncError

log = logging.getLogger(__name__)


class Flusher:
    """Runs the flushes of one leaf, one at a time."""

    def __init__(self, leaf: Leaf) -> None:
        self._leaf = leaf
        self._lock = trio.Lock()
        self._begun = 0
        self._ended = 0
        self._failure: OSError | None = None

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
        """Flush, then run ``work`` in a worker before any other flush may begin."""
        async with self._lock:
            await self._run()
            await trio.to_thread.run_sync(work)

    async def _run(self) -> None:
        if self._failure is not None:
            raise OSError(self._failure.errno, f"an earlier sync failed: {self._failure}")
        self._begun += 1
        finish = self._leaf.begin_flush()
        try:
            await trio.to_thread.run_sync(finish)
        except OSError as error:
            self._leaf.end_flush(ok=False)
            if not isinstance(error, SyncError):
                raise  # no space for metadata: that can be mended
            self._failure = error
            log.critical("%s: sync failed, flushes fail from now on: %s", self._leaf.path, error)
            raise
        self._leaf.end_flush(ok=True)
        self._ended = self._begun


# A crash loses at most what was streamed in this many seconds (it is fetched again).
CHECKPOINT_INTERVAL = 5.0


async def run_checkpoints(leaf: Leaf, flush: Callable[[], Awaitable[None]]) -> None:
    """Now and then make durable what has become local, so that a crash costs little.

    Ends when a sync has failed: from then on there is nothing to be had from more.
    """
    while True:
        await trio.sleep(CHECKPOINT_INTERVAL)
        if leaf.dirty:
            try:
                await flush()
            except SyncError:
                return  # the flusher has said so, and tells every client that flushes
            except OSError as error:
                log.warning("%s: cannot make durable what is local: %s", leaf.path, error)
