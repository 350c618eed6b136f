# SPDX-License-Identifier: Apache-2.0
"""Background tasks, and what may leave them.

**The rule for errors.** A guest depends on the nurseries in which the tasks of its disk run, and
one exception that leaves a task ends the whole nursery. So no `Exception` leaves a task
that is started beside others: the task deals with the errors that it expects, and
`start_contained` stops what it does not expect, logs it, and reports it. Only cancellation,
and what Python raises to end the process, gets through. docs/architecture.md has the table of who
turns which error into what.

A nursery wraps even a single exception in a group. `open_background_nursery` undoes that for
callers who do not see the nursery.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVarTuple

import trio

from nbdstream.errors import NbdstreamError, sole_error

log = logging.getLogger(__name__)

Ts = TypeVarTuple("Ts")
Report = Callable[[str, BaseException], None]


def start_contained(
    nursery: trio.Nursery,
    name: str,
    report: Report,
    task: Callable[[*Ts], Awaitable[None]],
    *args: *Ts,
) -> None:
    """Start a background task whose failure stays its own.

    Args:
        name: what it does, for the log and the report.
        report: called with the name and the error if the task fails.
    """

    async def contained() -> None:
        failure: BaseException | None = None
        try:
            await task(*args)
        except* Exception as group:
            failure = sole_error(group)
        if failure is not None:
            log_failure(name, failure)
            report(name, failure)

    nursery.start_soon(contained, name=name)


def log_failure(name: str, error: BaseException) -> None:
    """Log why a task failed: one line for an error of ours or of the system, else all there is."""
    if isinstance(error, (NbdstreamError, OSError)):
        log.error("%s: %s", name, error)
    else:
        log.error("%s: unexpected error", name, exc_info=error)


@asynccontextmanager
async def open_background_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks are cancelled when the block ends.

    A single exception, of the block or of a task, comes out as it is; several come out
    as a group.
    """
    lone: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) != 1:
            raise
        lone = group.exceptions[0]
    if lone is not None:
        raise lone
