# SPDX-License-Identifier: Apache-2.0
"""Plain steps on the leaf, run as a whole: the one answer to all races.

A step looks at the leaf and acts on what it saw, without an await in between. The leaf may
interrupt it by a signal, always before it has changed anything; then the matter is settled, and
the step is repeated from its start.
"""

from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from nbdstream.disk.gate import Gate
from nbdstream.leaf.base import ColdMetadata, FlushNeeded
from nbdstream.tasks import in_worker

P = ParamSpec("P")
T = TypeVar("T")


class Atomically:
    """Runs steps on one leaf."""

    def __init__(self, flush: Callable[[], Awaitable[None]], gate: Gate) -> None:
        """``flush`` makes the leaf's metadata durable, which makes room for more."""
        self._flush = flush
        self._gate = gate

    async def __call__(self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a step until it goes through; there is no await between its end and the return.

        Raises what the step raises, and OSError if metadata cannot be read, or if the leaf was
        let go of.
        """
        while True:
            if self._gate.let_go:
                self._gate.check()
            try:
                return step(*args, **kwargs)
            except ColdMetadata as cold:
                await in_worker(cold.warm)
            except FlushNeeded:
                await self._flush()
