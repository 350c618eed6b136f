# SPDX-License-Identifier: Apache-2.0
"""What a guest's reads take, and whether an experiment hurts them.

Reads differ in length, so what is compared is a read's time less what its bytes take at the
link's rate. What is usual is smoothed over the reads that were sent while the window was steady.
Reads that are sent while more is tried are compared with that. If they are later, by
more than reads usually differ, the experiment costs the guest more than it may bring.
"""

import math

from nbdstream.backing.window.measures import Row

# How fast the usual figures follow new reads; the first few reads weigh more.
GAIN = 1 / 16
# Reads are late by so many deviations (fewer for a mean of several), and at the least by this
# part of the usual time.
LATE_DEVIATIONS = 4.0
LATE_PART = 0.25


class DemandGauge:
    """The demand reads of one backing.

    Attributes:
        usual: seconds that a read takes beside its own transmission; 0 until known.
        deviation: mean seconds by which reads differ from that.
    """

    def __init__(self) -> None:
        self.usual = self.deviation = 0.0
        self._reads = 0
        self._trying_since = math.inf
        self._tried = Row()

    def try_more(self, now: float) -> None:
        """Reads sent from now on show what more background work does to them."""
        self._trying_since = now
        self._tried = Row()

    def be_usual(self) -> None:
        """The trial is over. Reads that are under way count for nothing."""
        self._trying_since = math.inf

    def answered(self, sent: float, now: float, transmission: float) -> None:
        """A demand read sent at ``sent`` was answered; its bytes take ``transmission``."""
        seconds = max(now - sent - transmission, 0.0)
        if sent >= self._trying_since:
            self._tried.add(seconds)
        elif self._trying_since == math.inf:
            self._reads += 1
            gain = max(GAIN, 1 / self._reads)
            self.deviation += gain * (abs(seconds - self.usual) - self.deviation)
            self.usual += gain * (seconds - self.usual)

    @property
    def is_hurt(self) -> bool:
        """What is tried makes the guest's reads later."""
        if not self._tried.count:
            return False
        late = LATE_DEVIATIONS * self.deviation / math.sqrt(self._tried.count)
        return self._tried.mean > self.usual + max(late, LATE_PART * self.usual)
