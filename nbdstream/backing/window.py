# SPDX-License-Identifier: Apache-2.0
"""How many bytes of background reads may be in flight: a delay-based controller.

Pure arithmetic: no I/O, no clock. It is told when requests are sent and answered, and
answers with `Window.size` and `Window.unit`.

**What it wants.** A link delivers at its full rate R as long as the pipe never runs
empty, which takes R * (round trip) bytes in flight. Every byte more only waits in a
queue, and a guest's read then waits behind it. So: the whole rate, and a queue of a
few milliseconds that is there to cover our own jitter.

**What it can see.** With W bytes in flight, the time from request to reply is the
*base*, that of a lone request of one unit, while W is too small to fill the link; then
it is W / R. The excess over the base is the queueing delay q. The least q of a round
trip is the one that counts: what all replies of a round had to wait for is a standing
queue, what only some waited for is noise (CoDel's insight).

**What it does.**

- *Start-up*: W grows by twice what is delivered, threefold each round trip, until q shows
  or the delivered rate stops growing (as TCP slow start with HyStart, and BBR, do). Then W
  is set to what the measurements say: rate * base + the queue wanted.
- *Steady*: once a round, W moves half-way to ``W * base / (base + q) + rate * target``
  (FAST TCP's law; Vegas's equilibrium). At rest, q equals the target. A rate that
  falls shows as q at once; a queue that stays empty for several rounds although W was
  used up means that there is more to have, and starts growth again.
  Nothing is made of a queue that is no longer than what the replies of that path differ
  by anyway: its jitter.
- *Probe*: delays can mislead (a busy machine answers late without any queue), so now and
  then, while no guest is missing, W is tried a quarter larger; if that delivers more,
  there was no queue, and W stays there (BBR's way of looking for bandwidth).
- *Drain*: the base can be seen only while our own queue is empty, so every ten
  seconds or so W is lowered for a round, and the base becomes what is seen then. It is
  also done when q stays high whatever W is, which is what a longer path looks like. Any
  shorter reply lowers the base at once.

**Sharing.** Flows that fill one queue see the same q, and each is at rest where its
target equals q. The target falls with the flow's own rate (as one over its square
root), so the only common point of rest is equal rates. Drains, at random times, let
each flow see the base without the others' queues; without them the last one to come
would take the first one's queue for part of the path (LEDBAT's latecomer's advantage).

**The unit** is what the link carries in `UNIT_TIME`, so that a demand read which comes
while one is being sent waits no longer than that; never under `UNIT_LEAST`, where the
cost of a request would show.

Sources: RFC 6817 (LEDBAT) and draft-irtf-iccrg-ledbat-plus-plus (slowdowns); Jin, Wei
and Low, "FAST TCP" (2004); Brakmo and Peterson, "TCP Vegas" (1995); Cardwell et al.,
"BBR" (2016) and draft-cardwell-iccrg-bbr-congestion-control (delivery rate samples,
rounds); Ha and Rhee, "HyStart" (2011); Nichols and Jacobson, "CoDel" (2012).
``docs/streaming.md`` shows it at work.
"""

import math
import random
from typing import NamedTuple

from nbdstream.backing.measures import Jitter, Lowest, RateMeter

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
# Nor less than so many times the path's own jitter: where replies take 20 ms or 200 at
# random (spinning disks, object stores), the least of a few says nothing of any queue, and
# to shrink W only makes it fewer.
TARGET_JITTERS = 2.0
# While a guest is missing, a shorter queue will do: this part of it, for so many seconds
# after each demand read.
YIELD_PART = 0.45
YIELD_JITTERS = 1.0
YIELD_TIME = 1.0
# Steady state: how far to go to where the law points, each round.
GAIN = 0.5
# The rate is measured at its best, which is a little more than it is.
PIPE_PART = 0.8
# Start-up: how much larger W becomes each round trip, as long as what is sent keeps up with it.
START_GAIN = 3
# Start-up ends after so many spans in which the rate grew by less than a quarter.
FLAT_SPANS = 3
FLAT_GROWTH = 1.25
# Start-up again after so many rounds with more units under way than in the one before and
# still next to no queue.
EMPTY_ROUNDS = 4
EMPTY_PART = 0.25
# While no guest is missing, W is tried this much larger for two rounds; if so much more is
# delivered then, it stays there, and the next try is soon. Failure doubles the interval.
PROBE_GROWTH = 1.25
PROBE_SUCCESS = 1.15
PROBE_FIRST = 0.25
PROBE_MOST = 4.0
PROBE_ROUNDS = 100
# Drain when the queue was this many targets deep for this many rounds, or by the clock.
DEEP_ROUNDS = 8
DEEP_TARGETS = 3
DRAIN_INTERVAL = 10.0
DRAIN_PART = 0.75
# A base that changes by more than this calls for another drain, soon.
MOVED_PART = 0.1
MOVED_INTERVAL = 1.0
# The rate is measured over spans of a round trip, and no less than this. The second figure
# is for start-up, which must not wait for the rate to be told before it goes on.
RATE_SPAN = 0.05
START_SPAN = 0.01
RATE_FELL = 0.75
# Whatever the delays say, W is no more than so many times what the rate calls for: servers
# that answer out of order hide their queue.
MOST_STARTING = 4.0
MOST_STEADY = 1.5
# Replies that a verdict on the queue is based on, at the least.
SAMPLES_LEAST = 3
# Start-up looks for a standing queue over one round trip, and no less than this.
START_LEAST = 0.03


class Sent(NamedTuple):
    """What to remember of a request until its reply comes (see `Window.sent`)."""

    time: float
    length: int
    in_flight: int


class Probe(NamedTuple):
    """What was before a probe; ``entered``: its first round is over."""

    size: int
    rate: float
    entered: bool = False


class Window:
    """The controller of one backing's background reads.

    Attributes:
        size: bytes that may be in flight.
        unit: bytes that one background read should ask for, at the most.
        rate: bytes per second delivered, lately, at best.
        base_rtt: seconds from request to reply of one unit, without any queue; 0 until
            known.
        queue_delay: the standing queue seen in the last round, in seconds.
    """

    def __init__(self, *, unit_least: int = UNIT_LEAST, rng: random.Random | None = None) -> None:
        """``unit_least``: a power of two, where requests are so dear that less is waste."""
        self._rng = rng or random.Random()
        self.size = WINDOW_FIRST
        self.unit = self._unit_least = unit_least
        self.base_rtt = 0.0
        self.queue_delay = 0.0
        self._now = 0.0
        self._demand_time = self._background_time = -math.inf
        self._in_flight = 0
        self._delivered = 0
        self._idle_since = 0.0
        self._meter = RateMeter(0.0, RATE_SPAN)
        self._jitter = Jitter()
        self._round_start = -math.inf
        self._round_delivered = 0
        self._round: list[float] = []
        self._round_limited = False
        self._empty_rounds = 0
        self._empty_units = 0
        self._deep_rounds = 0
        self._drain_at = -math.inf
        self._drain_start: float | None = None
        self._probe: Probe | None = None
        self._probe_at = -math.inf
        self._probe_interval = PROBE_FIRST
        self._undrained_size = 0
        self._undrained_base = 0.0
        self._start()

    @property
    def rate(self) -> float:
        return self._meter.rate

    def set_unit_least(self, length: int) -> None:
        """From now on no request is smaller than ``length`` bytes."""
        self._unit_least = max(self._unit_least, 1 << (length - 1).bit_length())
        self.unit = max(self.unit, self._unit_least)

    # -- what happened -----------------------------------------------------------------

    def sent(self, now: float, length: int) -> Sent:
        """A request of any priority went out; hand the result to `delivered` or `lost`."""
        self._now = now
        if self._in_flight == 0:
            self._meter.idled(now - self._idle_since)
        self._in_flight += length
        return Sent(now, length, self._in_flight)

    def lost(self, request: Sent) -> None:
        """It will not be answered, or its reply says nothing about the link."""
        self._land(request, self._now)

    def delivered(
        self, request: Sent, now: float, *, background: bool = True, limited: bool = True
    ) -> None:
        """Its reply is complete. ``limited``: more would have been sent had W allowed it."""
        self._now = now
        self._land(request, now)
        self._delivered += request.length
        self._measure_rate(now, request.length)
        sample = self._as_unit(now - request.time, request.length)
        if self.base_rtt == 0 or sample < self.base_rtt:
            self.base_rtt = sample
        if not background:
            if now - self._background_time < YIELD_TIME:  # else it waited for nobody
                self._demand_time = now
            return
        self._background_time = now
        if self.rate:
            self._jitter.add(sample)
        if self._drain_start is not None and not self._is_drained(request):
            return
        self._round.append(sample)
        self._round_limited = self._round_limited or limited
        if self._starting and START_GAIN * request.in_flight >= self.size:
            self._recent.add(now, sample, now - max(self.base_rtt, START_LEAST))
            self._grow(now, request)
        if request.time >= self._round_start and len(self._round) >= SAMPLES_LEAST:
            self._end_round(now)

    def _land(self, request: Sent, now: float) -> None:
        self._in_flight -= request.length
        if self._in_flight == 0:
            self._idle_since = now

    # -- what it means -----------------------------------------------------------------

    def _measure_rate(self, now: float, length: int) -> None:
        before = self.rate
        if not self._meter.add(now, length, self.base_rtt):
            return
        if self.rate < RATE_FELL * before:
            # On a slower link a unit itself takes longer, which is no queue. Should it be our
            # own restraint that shows here, the next reply lowers the base again.
            self.base_rtt += self.unit / self.rate - self.unit / before
        if self._starting:
            self._judge_growth(now)

    def _as_unit(self, rtt: float, length: int) -> float:
        """The round trip, had the request been one unit long."""
        if self.rate == 0:
            return rtt
        return max(rtt + (self.unit - length) / self.rate, 1e-6)

    @property
    def target(self) -> float:
        """The queueing delay wanted, in seconds."""
        by_rate = TARGET_TIME * math.sqrt(TARGET_RATE / self.rate) if self.rate else TARGET_MOST
        wanted = max(by_rate, TARGET_LEAST)
        jitters = TARGET_JITTERS
        if self._yielding:
            wanted *= YIELD_PART
            jitters = YIELD_JITTERS
        wanted = min(max(wanted, TARGET_PART * self.base_rtt), TARGET_MOST)
        return max(wanted, jitters * self._jitter.mean)

    @property
    def _yielding(self) -> bool:
        """A guest is missing, or was a moment ago."""
        return self._now - self._demand_time < YIELD_TIME

    # -- start-up ----------------------------------------------------------------------

    def _start(self) -> None:
        self._starting = True
        self._recent = Lowest()
        self._flat_spans, self._flat_rate = 0, self.rate
        self._start_meter = RateMeter(self._now, START_SPAN)

    def _grow(self, now: float, request: Sent) -> None:
        self._start_meter.add(now, request.length, self.base_rtt)
        most = MOST_STARTING * self._fitting_size(self._start_meter.rate)
        self._resize(max(min(self.size + (START_GAIN - 1) * request.length, most), self.size))
        # A standing queue is what every reply of the last round trip waited in. Growth sends
        # in bursts, and most replies wait behind the rest of their own. The first span
        # has the time in it until anything came at all, so its rate is too low to go by.
        if self._meter.spans > 1 and self._recent.least - self.base_rtt > self._start_limit():
            # The measured rate lags behind; what one request saw does not, nor is it too much.
            self._settle(now, request.in_flight / (now - request.time))

    def _start_limit(self) -> float:
        """The queue at which start-up has found the link's rate."""
        return max(2 * self.target, self.base_rtt / 8)

    def _settle(self, now: float, rate: float = 0.0) -> None:
        """End of start-up: go to what has been measured, or to ``rate`` if that is more."""
        self._starting = False
        self._empty_rounds = self._empty_units = 0
        self.size = self._fitting_size(rate)
        self._begin_round(now)
        if self._drain_at == -math.inf:
            self._plan_drain(now, DRAIN_INTERVAL)

    def _begin_round(self, now: float) -> None:
        """A round ends with the first reply to a request that was sent within it."""
        self._round.clear()
        self._round_limited = False
        self._round_start = now
        self._round_delivered = self._delivered

    def _judge_growth(self, now: float) -> None:
        """The rate was measured anew: did it still grow?"""
        if self.rate >= self._flat_rate * FLAT_GROWTH:
            self._flat_rate, self._flat_spans = self.rate, 0
        elif self._round_limited:
            self._flat_spans += 1
            if self._flat_spans >= FLAT_SPANS:
                self._settle(now)

    # -- steady ------------------------------------------------------------------------

    def _end_round(self, now: float) -> None:
        """A round trip's worth of background replies is in."""
        best = min(self._round)
        self.queue_delay = max(best - self.base_rtt, 0.0)
        rate = (self._delivered - self._round_delivered) / max(now - self._round_start, 1e-6)
        if self._drain_start is not None:
            self._end_drain(now, best)
        elif self._probe is not None:
            self._go_on_probing(now, self._probe, rate)
        elif not self._starting:
            self._follow(self.queue_delay)
            if now >= self._drain_at or self._deep_rounds >= DEEP_ROUNDS:
                self._drain(now)
            elif now >= self._probe_at and self._round_limited and not self._yielding:
                self._probe = Probe(self.size, rate)
                self._resize(max(PROBE_GROWTH * self.size, self.size + self.unit))
        self._choose_unit()
        self._begin_round(now)

    def _follow(self, queue: float) -> None:
        """One step of the steady law."""
        wanted = self.size * self.base_rtt / (self.base_rtt + queue) + self.rate * self.target
        wanted = max(wanted, min(self._whole_units(), self.size))
        wanted = min(wanted, MOST_STEADY * self._fitting_size())
        if self._round_limited or wanted < self.size:
            self._resize(self.size + GAIN * (wanted - self.size))
        units = self.size // self.unit
        if queue > EMPTY_PART * self.target or units < self._empty_units:
            self._empty_rounds, self._empty_units = 0, units
        elif self._round_limited and units > self._empty_units:
            self._empty_rounds, self._empty_units = self._empty_rounds + 1, units
        if self._empty_rounds >= EMPTY_ROUNDS:
            self._start()
        deep = queue > DEEP_TARGETS * self.target + self.unit / self.rate
        self._deep_rounds = self._deep_rounds + 1 if deep else 0

    def _choose_unit(self) -> None:
        """The unit is a power of two, so that it does not change with every breath."""
        # Not of W alone: where requests are what costs the time, W is never used up, and
        # larger ones are what it takes.
        room = max(self.size, self.rate * (self.base_rtt + self.target))
        wanted = min(self.rate * UNIT_TIME, room / UNITS_LEAST, UNIT_MOST)
        unit = max(self._unit_least, 1 << max(int(wanted), 1).bit_length() - 1)
        if unit != self.unit and self.rate > 0:
            # What is longer by so much takes longer by so much. Too high a guess is put
            # right by the next replies; too low a one, by the next drain.
            guess = self.base_rtt + (unit - self.unit) / self.rate
            scaled = self.base_rtt * unit / self.unit
            self.base_rtt = min(guess, scaled) if unit > self.unit else max(guess, scaled)
        self.unit = unit

    def _fitting_size(self, rate: float = 0.0) -> int:
        """The window that the measurements call for, or ``rate`` if that is more."""
        rate = max(rate, self.rate)
        return _bounded(max(rate * (self.base_rtt + self.target), self._whole_units()))

    def _whole_units(self) -> int:
        """What fills the pipe, in units that go out whole: on slow links each is long."""
        return math.ceil(PIPE_PART * self.rate * self.base_rtt / self.unit) * self.unit

    def _resize(self, size: float) -> None:
        self.size = _bounded(size)

    # -- probe -------------------------------------------------------------------------

    def _go_on_probing(self, now: float, probe: Probe, rate: float) -> None:
        """A round of a probe is over; the second one's requests all went out within it."""
        if not probe.entered:
            self._probe = probe._replace(entered=True)
            return
        self._probe = None
        if rate >= PROBE_SUCCESS * probe.rate:
            interval = self._probe_interval = PROBE_FIRST
        else:
            self.size = probe.size
            self._probe_interval = min(2 * self._probe_interval, PROBE_MOST)
            interval = max(self._probe_interval, PROBE_ROUNDS * self.base_rtt)
        self._probe_at = now + interval * self._rng.uniform(0.8, 1.2)

    # -- drain -------------------------------------------------------------------------

    def _drain(self, now: float) -> None:
        """Let our own queue run empty, to see the base."""
        self._drain_start = now
        self._undrained_size, self._undrained_base = self.size, self.base_rtt
        self._resize(DRAIN_PART * min(self.size, self.rate * self.base_rtt))

    def _is_drained(self, request: Sent) -> bool:
        """Whether the request was sent when there was no queue of ours."""
        return (
            self._drain_start is not None
            and request.time >= self._drain_start
            and request.in_flight <= max(self.size, request.length)
        )

    def _end_drain(self, now: float, best: float) -> None:
        moved = abs(best - self._undrained_base) > MOVED_PART * self._undrained_base
        self.base_rtt = best
        self.queue_delay = 0.0
        self.size = (
            min(self._undrained_size, self._fitting_size()) if moved else self._undrained_size
        )
        self._drain_start = None
        # The path has changed, and some of what we see of it may still be our own queue.
        self._plan_drain(now, MOVED_INTERVAL if moved else DRAIN_INTERVAL)

    def _plan_drain(self, now: float, interval: float) -> None:
        self._deep_rounds = 0
        self._drain_at = now + interval * self._rng.uniform(0.8, 1.2)


def _bounded(size: float) -> int:
    return int(min(max(size, WINDOW_LEAST), WINDOW_MOST))
