# SPDX-License-Identifier: Apache-2.0
"""The event queue: what happens when, in virtual time. Deterministic."""

import heapq
from collections.abc import Callable
from typing import Any


class Events:
    """Calls to be made at given times; those of the same time in the order of `at`.

    Attributes:
        now: seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        """Make a call at ``time``, or now if that has passed."""
        self._count += 1
        heapq.heappush(self._queue, (max(time, self.now), self._count, call, arguments))

    def run(self, until: float) -> None:
        """Make all calls up to ``until``."""
        queue = self._queue
        while queue and queue[0][0] <= until:
            self.now, _, call, arguments = heapq.heappop(queue)
            call(*arguments)
        self.now = until
