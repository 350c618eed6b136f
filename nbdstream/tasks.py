# SPDX-License-Identifier: Apache-2.0
"""Background tasks that live as long as a ``with`` block, without exception groups.

A nursery wraps even a lone exception of its body in a group. Whoever writes ``async with
QMPClient.connect(…)`` does not see the nursery inside, and expects ``except`` to work.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


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
