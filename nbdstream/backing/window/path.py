# SPDX-License-Identifier: Apache-2.0
"""What is known of a path, and which window and unit fit it.

The window that fits a rate is rate * (base + target). The *base* is the mean delay that the
last experiment saw with less in flight. The *target* is a queue of a few milliseconds that
covers our own jitter.

The *unit* of background reads is what the link carries in `UNIT_TIME`, so that a demand read
which comes while one is being sent waits no longer than that; larger where a probe found
that larger requests bring more.
"""

import math

from nbdstream.backing.window.measures import Lowest, RateMeter

KIB = 1024
MIB = 1024 * KIB

# Bounds of the window: its largest is also how much memory background reads may take.
WINDOW_FIRST = 256 * KIB
WINDOW_LEAST = 64 * KIB
WINDOW_MOST = 64 * MIB
UNIT_LEAST = 64 * KIB
UNIT_MOST = MIB
UNIT_TIME = 0.004
# At least so many units fit in the window, so that there is always one on its way;
# slow links, where even the least unit is long, are the exception.
UNITS_LEAST = 4
# The queue wanted: 4 ms at 100 Mbit/s, with one over the square root of the rate; no
# less than the event loop's own jitter, nor than a twentieth of the path.
TARGET_TIME = 0.004
TARGET_RATE = 12.5e6
TARGET_LEAST = 0.003
TARGET_MOST = 0.030
TARGET_PART = 0.05
# A queue may be as long as the server's times differ by, if they differ by so much of the
# base: then a shorter one costs rate. They are smoothed.
SPREAD_PART = 0.15
SPREAD_GAIN = 0.25
# For how many seconds the shortest delay is remembered.
MEMORY = 30.0
# The rate is measured over spans of a round trip, and no less than this.
RATE_SPAN = 0.05


class Path:
    """What is known of one path.

    Attributes:
        base_rtt: mean seconds from request to reply without a queue of ours; 0 until known.
        queue_delay: what replies took beyond that in the last trial, in seconds.
        unit: bytes that one background read should ask for, at the most.
        unit_floor: no smaller than this, because it was found to bring more.
    """

    def __init__(self, unit_least: int) -> None:
        """``unit_least``: a power of two, where requests are so dear that less is waste."""
        self.meter = RateMeter(0.0, RATE_SPAN)
        self.base_rtt = 0.0
        self.queue_delay = 0.0
        self.unit = self._unit_least = unit_least
        self.unit_floor = 0
        self._spread = 0.0
        self._shortest = Lowest()

    @property
    def rate(self) -> float:
        """Bytes per second delivered, lately, at best."""
        return self.meter.rate

    @property
    def target(self) -> float:
        """The queueing delay wanted, in seconds."""
        by_rate = TARGET_TIME * math.sqrt(TARGET_RATE / self.rate) if self.rate else TARGET_MOST
        wanted = min(max(by_rate, TARGET_LEAST, TARGET_PART * self.base_rtt), TARGET_MOST)
        return wanted + self._spread if self._spread > SPREAD_PART * self.base_rtt else wanted

    @property
    def unit_time(self) -> float:
        """What one unit takes on the path, in seconds, at the rate that was seen."""
        return self.unit / self.rate if self.rate else 0.0

    def saw_delay(self, now: float, delay: float) -> None:
        """A trial saw this mean delay, in seconds."""
        self.queue_delay = max(delay - self.base_rtt, 0.0)
        self._shortest.add(now, delay, now - MEMORY)

    def saw_spread(self, spread: float) -> None:
        """The times of replies differed by so many seconds."""
        self._spread += SPREAD_GAIN * (spread - self._spread)

    def outgrew(self, times: float, delay: float, now: float) -> None:
        """Forget the shortest delay if this one, seen with less in flight, is so many times
        as long: the path has changed."""
        if delay > times * self._shortest.least:
            self._shortest = Lowest()
            self._shortest.add(now, delay, now)

    def crowded(self, delay: float) -> bool:
        """Whether there may be more of a queue than all flows of a link are to have."""
        slack = TARGET_MOST + self._spread + self.unit_time
        return delay > self._shortest.least + slack

    # -- the window --------------------------------------------------------------------

    def wanted(self, rate: float, slack: float = 0.0) -> float:
        """The window for a rate, in bytes."""
        return rate * (self.base_rtt + self.target + slack)

    def fitting(self, rate: float, slack: float = 0.0) -> int:
        """`wanted` in whole units, because on slow links each is long."""
        return bounded(self.whole(self.wanted(rate, slack)))

    def whole(self, size: float) -> int:
        """The nearest number of whole units, of one at the least."""
        return max(round(size / self.unit), 1) * self.unit

    # -- the unit ----------------------------------------------------------------------

    def set_unit_least(self, length: int) -> None:
        """From now on no request is smaller than ``length`` bytes."""
        self._unit_least = max(self._unit_least, 1 << (length - 1).bit_length())
        self.unit = max(self.unit, self._unit_least)

    def choose_unit(self, size: int) -> None:
        """Choose the unit for a window of ``size`` bytes."""
        self.unit = max(self.ruled_unit(size), self.unit_floor)

    def start_unit(self, size: int, rate: float) -> None:
        """Choose it while a window of ``size`` bytes grows, from the rate that one reply shows:
        what was in flight over its delay. The meter's comes too late for that. Only larger."""
        self.unit = max(self.unit, self._bounded_unit(size, rate))

    def ruled_unit(self, size: int) -> int:
        """What the unit is by rule. A power of two, so that it does not change with every
        breath."""
        # Not of the window alone: where requests are what costs the time, it is never used
        # up, and larger ones are what it takes.
        return self._bounded_unit(max(size, self.wanted(self.rate)), self.rate)

    def _bounded_unit(self, room: float, rate: float) -> int:
        wanted = min(rate * UNIT_TIME, room / UNITS_LEAST, UNIT_MOST)
        return max(self._unit_least, 1 << max(int(wanted), 1).bit_length() - 1)


def bounded(size: float) -> int:
    """A window of ``size`` bytes, or the nearest that is allowed."""
    return int(min(max(size, WINDOW_LEAST), WINDOW_MOST))
