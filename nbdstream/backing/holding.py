# SPDX-License-Identifier: Apache-2.0
"""A backing that is kept open until it is let go of, and may move to another place meanwhile.

A place is a URI with what serves it: connections, a helper process, credentials. Each is kept
open by a task. The disk sees one `NbdBacking` all the time, with its window and what it knows
of extents; when it moves, it takes over the connections of the new place, and the old one ends.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from nbdstream.backing.nbd import NbdBacking
from nbdstream.errors import BackingGoneError, sole_error
from nbdstream.tasks import Report, log_failure, open_background_nursery

Opening = AbstractAsyncContextManager[NbdBacking]


class Holding:
    """Made by `holding`. ``backing`` is None where the disk has none."""

    def __init__(self, nursery: trio.Nursery, report: Report) -> None:
        self.backing: NbdBacking | None = None
        self._nursery = nursery
        self._report = report
        self._leave = trio.Event()  # the present place
        self._ended = False
        self._turn = trio.Lock()

    async def open(self, opening: Opening) -> NbdBacking:
        """Open the first place. Raises what opening raises; a failure after that is reported,
        and ends nothing but the backing."""
        self.backing, self._leave = await self._nursery.start(self._hold, opening)
        return self.backing

    async def move(self, opening: Opening, accept: Callable[[NbdBacking], Awaitable[None]]) -> None:
        """Go on at another place. ``accept`` is awaited before anything changes.

        Raises what opening and ``accept`` raise, and BackingGoneError if there is no backing any
        more. The old place stays in use then.
        """
        async with self._turn:
            self._check()
            backing, leave = await self._nursery.start(self._hold, opening)
            try:
                await accept(backing)
                self._check()
            except BaseException:
                leave.set()
                raise
            assert self.backing is not None
            self.backing.take_over(backing)
            self._leave.set()
            self._leave = leave

    def let_go(self) -> None:
        """The backing is not needed any more: hang up, end the helper."""
        self._ended = True
        self._leave.set()

    def _check(self) -> None:
        if self.backing is None or self._ended:
            raise BackingGoneError("the disk has no backing: everything is local")

    async def _hold(
        self,
        opening: Opening,
        *,
        task_status: trio.TaskStatus[tuple[NbdBacking, trio.Event]],
    ) -> None:
        leave = trio.Event()
        started = False
        try:
            async with opening as backing:
                started = True
                task_status.started((backing, leave))
                await leave.wait()
        except Exception as error:
            if not started:
                raise
            failure = sole_error(error)
            log_failure("backing", failure)
            self._report("backing", failure)


@asynccontextmanager
async def holding(report: Report) -> AsyncIterator[Holding]:
    """For the length of the block; ``report`` is told of failures."""
    async with open_background_nursery() as nursery:
        yield Holding(nursery, report)
