# SPDX-License-Identifier: Apache-2.0
"""What a row of replies says of a path: the least delay, the mean one, the rate.

No clock: the caller passes the time, in seconds.
"""

from collections import deque

# The best rate of the current and of the last period counts; a period is so many seconds.
RATE_PERIOD = 1.0


class Lowest:
    """The least of the samples of a sliding span of time."""

    def __init__(self) -> None:
        self._rising: deque[tuple[float, float]] = deque()

    def add(self, now: float, sample: float, since: float) -> None:
        """Take a sample, forget those from before ``since``."""
        while self._rising and self._rising[-1][1] >= sample:
            self._rising.pop()
        self._rising.append((now, sample))
        while self._rising[0][0] < since:
            self._rising.popleft()

    @property
    def least(self) -> float:
        return self._rising[0][1]


class Row:
    """The mean of a row of samples, and how well it is known.

    Attributes:
        count: samples so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum = self._differences = self._last = 0.0

    def add(self, sample: float) -> None:
        """Take the next sample."""
        if self.count:
            self._differences += abs(sample - self._last)
        self.count += 1
        self._sum += sample
        self._last = sample

    @property
    def mean(self) -> float:
        """0 without samples."""
        return self._sum / max(self.count, 1)

    @property
    def spread(self) -> float:
        """What one sample differs from the next one by, in the mean (RFC 3550, section
        6.4.1). A slow rise or fall adds next to nothing to it."""
        return self._differences / max(self.count - 1, 1)

    @property
    def error(self) -> float:
        """The standard error of `mean`."""
        return float(self.spread / max(self.count, 1) ** 0.5)


class RateMeter:
    """What is delivered per second, at best, lately.

    Attributes:
        rate: bytes per second; 0 until known.
        spans: how often it was measured.
    """

    def __init__(self, now: float, span: float) -> None:
        """``span``: measure over no less than this many seconds, or it may be a mere burst."""
        self.rate = 0.0
        self.spans = 0
        self._span = span
        self._since = now
        self._bytes = 0
        self._last, self._this = 0.0, 0.0  # the best of the last period, and of this one
        self._period_end = now

    def idled(self, seconds: float) -> None:
        """Nothing was asked for so long: that time says nothing of the rate."""
        self._since += seconds

    def add(self, now: float, length: int, round_trip: float) -> bool:
        """``length`` bytes came; a span is no less than a round trip. Whether one is over."""
        self._bytes += length
        elapsed = now - self._since
        if elapsed < max(self._span, round_trip):
            return False
        if now >= self._period_end:
            self._last, self._this = self._this, 0.0
            self._period_end = now + max(RATE_PERIOD, 4 * round_trip)
        self._this = max(self._this, self._bytes / elapsed)
        self._since, self._bytes = now, 0
        self.rate = max(self._last, self._this)
        self.spans += 1
        return True
