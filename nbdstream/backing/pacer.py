# SPDX-License-Identifier: Apache-2.0
"""A speed cap that holds over any one-second interval, not only on average.

Two rules together. Reads are *spaced*: after one of n bytes the next goes n / speed
seconds later, and time in which nothing was sent earns no credit. And the reads sent
within `INTERVAL` add up to no more than the cap; spacing alone would let one too
many into some seconds. A single read larger than the cap goes out alone and pays with
the time it is worth.

Pure arithmetic: the time is passed in.
"""

from collections import deque

# A little more than the second it is about, for clocks that do not agree.
INTERVAL = 1.02
# Reads should be at most this part of what a second may carry, for the cap to be met.
UNITS_PER_SECOND = 16


class Pacer:
    """When the next read may go, under a cap of ``speed`` bytes per second (0: none)."""

    def __init__(self) -> None:
        self.speed = 0
        self._next = 0.0
        self._recent: deque[tuple[float, int]] = deque()
        self._recent_bytes = 0

    def spend(self, now: float, length: int) -> None:
        """A read of ``length`` bytes goes out now."""
        if self.speed == 0:
            return
        self._next = max(self._next, now) + length / self.speed
        self._recent.append((now, length))
        self._recent_bytes += length

    def ready_at(self, now: float, length: int) -> float:
        """The earliest time, from ``now`` on, for a read of ``length`` bytes."""
        if self.speed == 0:
            return now
        while self._recent and self._recent[0][0] <= now - INTERVAL:
            self._recent_bytes -= self._recent.popleft()[1]
        ready = max(self._next, now)
        excess = self._recent_bytes + length - self.speed
        for time, spent in self._recent:
            if excess <= 0:
                break
            ready = max(ready, time + INTERVAL)
            excess -= spent
        return ready

    def limit(self, unit: int) -> int:
        """The size of read to grant where ``unit`` would be without a cap."""
        return min(unit, max(self.speed // UNITS_PER_SECOND, 1)) if self.speed else unit

    def set_speed(self, speed: int) -> None:
        """Change the cap; 0 is none."""
        self.speed = speed
        self._next = 0.0
        if speed == 0:
            self._recent.clear()
            self._recent_bytes = 0
