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

import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar, TypeVarTuple

import trio

from nbdstream.errors import NbdstreamError, sole_error

log = logging.getLogger(__name__)

T = TypeVar("T")
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


class NoThreadError(OSError):
    """No thread can be started now; nothing has been called."""


async def in_worker(
    call: Callable[[*Ts], T],
    *args: *Ts,
    limiter: trio.CapacityLimiter | None = None,
    abandon_on_cancel: bool = False,
) -> T:
    """`trio.to_thread.run_sync`, whose lack of a thread is an error of the system.

    Every worker of nbdstream is started here, so that those who deal with an `OSError` deal with
    this one. Raises NoThreadError if no thread can be started, and what ``call`` raises.
    """
    try:
        return await trio.to_thread.run_sync(
            call, *args, limiter=limiter, abandon_on_cancel=abandon_on_cancel
        )
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        raise NoThreadError(errno.EAGAIN, "no thread can be started") from error


async def surely(call: Callable[[], None]) -> None:
    """Run what has to be done at the end of something: in a worker, or here if there is none.

    Not to be cancelled. Raises what ``call`` raises.
    """
    with trio.CancelScope(shield=True):
        try:
            await in_worker(call)
        except NoThreadError:
            call()


def log_failure(name: str, error: BaseException) -> None:
    """Log why a task failed: one line for an error of ours or of the system, else all there is."""
    if isinstance(error, (NbdstreamError, OSError)):
        log.error("%s: %s", name, error)
    else:
        log.error("%s: unexpected error", name, exc_info=error)


@asynccontextmanager
async def open_background_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks are cancelled when the block ends.

    Raises what the block or a task raises: a single exception as it is, several as a group.
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


async def together(*calls: Callable[[], Awaitable[object]]) -> None:
    """Run calls at the same time. Raises what the first to fail raises; the others are cancelled
    then."""
    failures: list[Exception] = []

    async def run(call: Callable[[], Awaitable[object]]) -> None:
        try:
            await call()
        except Exception as error:
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(run, call)
    if failures:
        raise failures[0]
