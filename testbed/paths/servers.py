# SPDX-License-Identifier: Apache-2.0
"""What a server does before it sends a reply: service times, and how many at a time."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from testbed.paths.events import Events

# Seconds to serve a read of (offset, length).
Service = Callable[[random.Random, int, int], float]


@dataclass(frozen=True)
class Constant:
    """Every read takes as long."""

    seconds: float

    def __call__(self, rng: random.Random, offset: int, length: int) -> float:
        return self.seconds


@dataclass(frozen=True)
class Tiers:
    """Regions of ``span`` bytes in turn answer in ``fast`` and in ``slow`` seconds."""

    span: int
    fast: float = 0.0002
    slow: float = 0.025

    def __call__(self, rng: random.Random, offset: int, length: int) -> float:
        return self.slow if offset // self.span % 2 else self.fast


@dataclass(frozen=True)
class Uniform:
    """Anything between two times, as object stores do."""

    low: float
    high: float

    def __call__(self, rng: random.Random, offset: int, length: int) -> float:
        return rng.uniform(self.low, self.high)


@dataclass(frozen=True)
class HeavyTailed:
    """Log-normal: a few reads take many times the median."""

    median: float
    sigma: float = 1.0
    most: float = 1.5

    def __call__(self, rng: random.Random, offset: int, length: int) -> float:
        return min(self.median * rng.lognormvariate(0, self.sigma), self.most)


class Server:
    """Serves reads: at most ``slots`` at a time in all, or one on each connection."""

    def __init__(
        self,
        events: Events,
        service: Service,
        rng: random.Random,
        *,
        serial: bool = False,
        slots: int | None = None,
    ) -> None:
        self._events, self._service, self._rng = events, service, rng
        self._serial, self._slots = serial, slots
        self._waiting: dict[object, deque[tuple[int, int, Callable[[], None]]]] = {}
        self._serving: dict[object, int] = {}

    def serve(
        self, connection: object, offset: int, length: int, reply: Callable[[], None]
    ) -> None:
        """Call ``reply`` once the read has been served."""
        if not self._serial and self._slots is None:
            seconds = self._service(self._rng, offset, length)
            self._events.at(self._events.now + seconds, reply)
            return
        lane = connection if self._serial else None
        self._waiting.setdefault(lane, deque()).append((offset, length, reply))
        self._next(lane)

    def _next(self, lane: object) -> None:
        most = 1 if self._serial or self._slots is None else self._slots
        waiting = self._waiting[lane]
        while waiting and self._serving.get(lane, 0) < most:
            offset, length, reply = waiting.popleft()
            self._serving[lane] = self._serving.get(lane, 0) + 1
            seconds = self._service(self._rng, offset, length)
            self._events.at(self._events.now + seconds, self._served, lane, reply)

    def _served(self, lane: object, reply: Callable[[], None]) -> None:
        self._serving[lane] -= 1
        reply()
        self._next(lane)
