# SPDX-License-Identifier: Apache-2.0
"""How far a stream job is, how fast it goes, and when it will be done.

Two measures, because they answer different questions. ``settled`` counts bytes of the
disk, as QEMU's jobs do: it ends at the disk's size, and holes pass in a leap. What
takes time is only data that crosses the link; the estimate is made from that. Pure
arithmetic: the caller passes the time in.
"""

from collections import deque

# The rate is that of the last few seconds: it follows a link that changes, and a
# stall shows at once. On a slow link a few seconds may see but two or three units, too
# few to tell a rate from: there it looks back over so many, up to so many seconds.
RATE_SPAN = 5.0
RATE_UNITS = 8
RATE_SPAN_MOST = 20.0
SAMPLE_INTERVAL = 0.25


class Progress:
    """Counters of one run of the job over a disk of ``length`` bytes.

    Attributes:
        settled: bytes of the disk known to be local by now.
        scouted: bytes, from the start of the disk, whose extents have been looked up.
        data: bytes among those that had to be fetched.
        fetched: bytes of these that have been.
    """

    def __init__(self, length: int, now: float) -> None:
        self.length = length
        self.settled = 0
        self.scouted = 0
        self.data = 0
        self.fetched = 0
        self._samples: deque[tuple[float, int]] = deque([(now, 0)])

    def saw(self, length: int, *, data: bool) -> None:
        """The next ``length`` bytes were looked up: to be fetched, or settled already."""
        self.scouted += length
        if data:
            self.data += length
        else:
            self.settled += length

    def got(self, length: int, now: float) -> None:
        """``length`` bytes of what was seen as data have become local."""
        self.fetched += length
        self.settled += length
        # The last sample is always up to date, so that a stall ends in a rate of nothing.
        if len(self._samples) > 1 and now - self._samples[-2][0] < SAMPLE_INTERVAL:
            self._samples.pop()
        self._samples.append((now, self.fetched))
        while now - self._samples[0][0] > RATE_SPAN_MOST and len(self._samples) > 2:
            self._samples.popleft()

    def passed(self, length: int) -> None:
        """``length`` bytes of what was seen as data were local when their turn came."""
        self.data -= length
        self.settled += length

    def resumed(self, now: float) -> None:
        """After a pause, during which nothing was meant to come: it says nothing of the rate."""
        self._samples = deque([(now, self.fetched)])

    def remaining(self) -> int:
        """Bytes still to be fetched; an estimate until all extents have been looked up."""
        known = self.data - self.fetched
        unseen = self.length - self.scouted
        density = self.data / self.scouted if self.scouted else 1.0
        return known + int(unseen * density)

    def rate(self, now: float) -> float:
        """Bytes fetched per second, over the last seconds."""
        span = self._span()
        then, fetched = self._samples[0]
        for sample in self._samples:
            if now - sample[0] <= span:
                break
            then, fetched = sample
        elapsed = now - then
        return (self.fetched - fetched) / elapsed if elapsed > 0 else 0.0

    def _span(self) -> float:
        """How many seconds to look back."""
        intervals = max(len(self._samples) - 1, 1)
        interval = (self._samples[-1][0] - self._samples[0][0]) / intervals
        return min(max(RATE_SPAN, RATE_UNITS * interval), RATE_SPAN_MOST)

    def eta(self, now: float) -> float | None:
        """Seconds until all is local, or None while nothing moves."""
        remaining = self.remaining()
        if remaining == 0:
            return 0.0
        rate = self.rate(now)
        return remaining / rate if rate > 0 else None
