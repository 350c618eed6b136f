# SPDX-License-Identifier: Apache-2.0
"""No step of a migration waits without an end, whichever program has stopped answering."""

import math
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager

import trio

from nbdstream.migrate.plan import MigrationError
from nbdstream.qmp.client import QMPClient

# Seconds that a program gets to answer.
ANSWER_SECONDS = 20.0


@contextmanager
def limit(what: str, seconds: float = ANSWER_SECONDS) -> Iterator[None]:
    """End the block after so many seconds.

    Raises:
        MigrationError: it took longer; ``what`` is what did not happen.
    """
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise MigrationError(f"{what} in {seconds:g} s")


@asynccontextmanager
async def answered(
    connection: AbstractAsyncContextManager[QMPClient], who: str
) -> AsyncIterator[QMPClient]:
    """A connection, if its server answers soon. The block may take as long as it likes.

    Raises:
        MigrationError: it does not answer; ``who`` is what it is called.
    """
    with trio.move_on_after(ANSWER_SECONDS) as scope:
        async with connection as client:
            scope.deadline = math.inf
            yield client
    if scope.cancelled_caught:
        raise MigrationError(f"{who} does not answer in {ANSWER_SECONDS:g} s")
