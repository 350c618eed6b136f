# SPDX-License-Identifier: Apache-2.0
"""How long reads take, counted in buckets: what a Prometheus histogram is made of."""

from bisect import bisect_left
from typing import TypedDict

BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the buckets, in seconds; one more bucket is for what took longer."""


class Counts(TypedDict):
    """``count`` reads took ``sum`` seconds in all; ``buckets`` are cumulative, as Prometheus has
    them: how many reads took no longer than each of `BOUNDS`."""

    count: int
    sum: float
    buckets: list[int]


class Latency:
    """The latency of one class of reads."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """A read took so long."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._sum += seconds

    def counts(self) -> Counts:
        """What was counted so far."""
        buckets, count = [], 0
        for each in self._counts:
            count += each
            buckets.append(count)
        return {"count": count, "sum": self._sum, "buckets": buckets[:-1]}
