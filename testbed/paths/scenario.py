# SPDX-License-Identifier: Apache-2.0
"""A combination of path and guest, drawn or named, and one run of it."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from testbed.paths.client import Client, Controller, FixedWindow
from testbed.paths.events import Events
from testbed.paths.guests import GUESTS, Guest
from testbed.paths.network import Link
from testbed.paths.servers import Constant, HeavyTailed, Server, Service, Tiers, Uniform

T = TypeVar("T")
Choose = Callable[[Sequence[T]], T]

MBIT = 1e6 / 8
MIB = 1 << 20
# What cross traffic sends at a time.
CROSS_PIECE = 64 << 10


@dataclass(frozen=True)
class Cross:
    """Traffic of others on the link: ``share`` of its rate, between two times."""

    share: float
    first: float
    last: float


@dataclass(frozen=True)
class Scenario:
    """A path, what happens to it, and a guest.

    ``rate`` in bytes per second, ``delay`` (round trip) and times in seconds. ``changes`` are
    (time, rate, delay); ``stalls`` (time, seconds); ``cuts`` are times at which all connections
    are lost.
    """

    rate: float = 100 * MBIT
    delay: float = 0.02
    queue: float = math.inf
    burst: int = 0
    service: Service = field(default_factory=lambda: Constant(0.0))
    serial: bool = False
    slots: int | None = None
    changes: tuple[tuple[float, float, float], ...] = ()
    cross: tuple[Cross, ...] = ()
    stalls: tuple[tuple[float, float], ...] = ()
    cuts: tuple[float, ...] = ()
    guest: str | None = None
    seconds: float = 20.0
    seed: int = 0

    @property
    def disturbed(self) -> list[tuple[float, float]]:
        """Spans of time in which something other than the controller sets what is delivered."""
        spans = [(at, at + seconds + 1) for at, seconds in self.stalls]
        return spans + [(at, at + 1 + 8 * self.delay) for at in self.cuts]


class Run:
    """One run of a scenario with one controller.

    Attributes:
        client, guest: with what they saw; ``guest`` is None without one.
    """

    def __init__(self, scenario: Scenario, window: Controller, *, stream: bool = True) -> None:
        self.events = Events()
        rng = random.Random(scenario.seed)
        self.link = Link(
            self.events,
            scenario.rate,
            scenario.delay,
            queue=scenario.queue,
            burst=scenario.burst,
        )
        server = Server(
            self.events,
            scenario.service,
            random.Random(rng.random()),
            serial=scenario.serial,
            slots=scenario.slots,
        )
        self.client = Client(self.events, self.link, server, window, stream=stream)
        self.guest: Guest | None = None
        if scenario.guest is not None:
            guest_rng = random.Random(rng.random())
            self.guest = Guest(self.events, self.client, scenario.guest, guest_rng)
            self.events.at(0.0, self.guest.start)
        self.events.at(0.0, self.client.start)
        for time, rate, delay in scenario.changes:
            self.events.at(time, self._change, rate, delay)
        for time, seconds in scenario.stalls:
            self.events.at(time, self.link.stall, seconds)
        for time in scenario.cuts:
            self.events.at(time, self.client.cut)
        for cross in scenario.cross:
            self.events.at(cross.first, self._cross, cross)
        self.events.run(scenario.seconds)

    def _change(self, rate: float, delay: float) -> None:
        self.link.rate, self.link.delay = rate, delay

    def _cross(self, cross: Cross) -> None:
        if self.events.now < cross.last:
            self.link.send(cross, CROSS_PIECE, lambda: None)
            pause = CROSS_PIECE / (cross.share * self.link.rate)
            self.events.at(self.events.now + pause, self._cross, cross)

    def latencies(self, after: float = 0.0) -> list[float]:
        """Sorted seconds of a guest's requests that began after a time."""
        found = self.guest.latencies if self.guest is not None else []
        return sorted(seconds for began, seconds in found if began >= after)


def idle_run(scenario: Scenario) -> Run:
    """The same guest while nothing is streamed."""
    return Run(scenario, FixedWindow(1, 1), stream=False)


def percentile(values: Sequence[float], part: float) -> float:
    """Of sorted values."""
    return values[min(int(len(values) * part), len(values) - 1)]


SERVICES: Sequence[Service] = (
    Constant(0.0),
    Constant(0.005),
    Tiers(64 * MIB),
    Tiers(4 * MIB),
    Tiers(256 << 10),
    Uniform(0.02, 0.12),
    Uniform(0.0, 0.05),
    HeavyTailed(0.008),
)
RATES = (10 * MBIT, 50 * MBIT, 100 * MBIT, 200 * MBIT, 400 * MBIT, 1600 * MBIT)
DELAYS = (0.0005, 0.005, 0.02, 0.05, 0.1)


def draw(choose: Choose[object], seed: int = 0) -> Scenario:
    """A combination; ``choose`` takes one of a row."""

    def one(row: Sequence[T]) -> T:
        return choose(row)  # type: ignore[return-value]

    drawn = Scenario(rate=one(RATES), delay=one(DELAYS), service=one(SERVICES), seed=seed)
    kind = one(("fifo", "fifo", "turns", "bucket"))
    if kind == "turns":
        drawn = replace(drawn, queue=drawn.rate * one((0.01, 0.1)))
    elif kind == "bucket":
        drawn = replace(drawn, burst=int(drawn.rate * one((0.1, 1.0))))
    limit = one(("none", "none", "serial", "slots"))
    if limit == "serial":
        drawn = replace(drawn, serial=True)
    elif limit == "slots":
        drawn = replace(drawn, slots=one((1, 4, 16)))
    event = one(("none", "none", "rate", "delay", "cross", "stall", "cut"))
    if event == "rate":
        drawn = replace(drawn, changes=((8.0, drawn.rate * one((0.2, 0.5, 3.0)), drawn.delay),))
    elif event == "delay":
        drawn = replace(drawn, changes=((8.0, drawn.rate, drawn.delay * one((0.2, 4.0))),))
    elif event == "cross":
        drawn = replace(drawn, cross=(Cross(one((0.3, 0.6)), 6.0, 13.0),))
    elif event == "stall":
        drawn = replace(drawn, stalls=((8.0, one((0.3, 2.0))),))
    elif event == "cut":
        drawn = replace(drawn, cuts=(8.0,))
    slowest = min([drawn.rate] + [rate for _, rate, _ in drawn.changes])
    if drawn.cross or slowest < 50 * MBIT:
        return drawn  # a guest alone would fill what is left
    return replace(
        drawn,
        guest=one((None, None, None, *GUESTS)),
    )
