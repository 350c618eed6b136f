# SPDX-License-Identifier: Apache-2.0
"""How many bytes of background reads may be in flight: a controller that experiments.

Pure arithmetic: no I/O, no clock. It is told when requests are sent and answered, and
answers with `Window.size` and `Window.unit`.

**What it wants.** While no guest misses: bytes per second. While one does: that its reads
take hardly longer than they would without background work. Both are measured, in trials
(`nbdstream.backing.trial`): a window is held for about a round trip, and what was
delivered then, and how late, is compared with what another window gave.

**A delay is a hint.** A late reply may mean a queue that this window has made, or
another's queue, a slow disk, an object store's mood. Only an experiment tells: with less in
flight, a queue of ours is shorter, and nothing else is. So delay never lowers the window;
it starts an experiment, and what the experiment costs in rate without a gain in delay is
taken back.

**States** (`State`):

- *Starting*: the window grows threefold each round trip, until a whole round trip's
  replies were late or the rate grows no more. Then an experiment decides: if the delay does
  not fall with less in flight, growth goes on.
- *Steady*: the window moves towards rate * (base + target), up only. The *base* is the
  mean delay that the last experiment saw; the target is a queue of a few milliseconds that
  covers our own jitter. A delay well above that is the hint that starts the next experiment;
  so does the clock, because the path may have changed.
- *Draining*: the experiment. Less is in flight, for one trial: its delay is the new base.
- *Lowered*: the base called for a smaller window, which is on trial: it stays if the rate does
  not suffer, or if the delay falls with it (then others share the queue, and this is our
  part in making it shorter).
- *Probing*: a quarter more is tried. If it delivers more, there was room: start again. Larger
  units are tried in the same way, for servers whose requests are dear.

While a guest misses, the target is less than half.

**Sharing.** Flows that fill one queue see the same delay, and each is at rest where its
target is that delay. The target falls with the flow's own rate (as one over its square
root), so they are all at rest only at equal rates. Experiments at random times let each
see the path without the others' queues.

**The unit** is what the link carries in `UNIT_TIME`, so that a demand read which comes
while one is being sent waits no longer than that.

``docs/streaming.md`` says why it is built so, and from what sources. It is one module, longer than
others: a sixth of it are the constants that all states share, each with its reason, and
the states decide over the same few figures.
"""

import enum
import math
import random
from typing import NamedTuple

from nbdstream.backing.measures import Lowest, RateMeter
from nbdstream.backing.trial import ACCURACY, Sent, Trial

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
# While a guest is missing, a shorter queue will do: this part of it, for so many seconds
# after each demand read.
YIELD_PART = 0.45
YIELD_TIME = 1.0
# Without a guest, a queue may be as long as the server's times differ by, if they differ by
# so much of the base: then a shorter one costs rate. They are smoothed.
SPREAD_PART = 0.25
SPREAD_GAIN = 0.25
# Steady state: how far to go to where the measurements point, after each trial.
GAIN = 0.5
# Start-up: how much larger the window becomes each round trip. It has found the end of the
# path when more than so many replies, and all of a round trip (or of so many seconds), were
# late, or when a trial delivers less than so many times what the one before did.
START_GAIN = 3
START_REPLIES = 6
START_LEAST = 0.03
FLAT_GROWTH = 1.25
# So many targets of delay, in so many trials in a row, start an experiment. So many times the
# base do so at once.
HINT_TARGETS = 1.5
HINT_TRIALS = 2
HINT_STRONG = 2.0
# An experiment has this part of what fills the path in flight, and no less of the window.
DRAIN_FILL = 0.75
DRAIN_LEAST = 0.5
# What is far from what was before is measured less exactly: bold steps, in short trials.
BOLD, BOLD_ACCURACY = 1.4, 0.12
# The delay fell with the window if it did by this part of what a queue of ours alone would do,
# and beyond the noise. By the second part, there is nothing but a queue.
FELL_PART = 0.08
DEEP_PART = 0.8
# With less than the first part of the window, more than the second part of the rate: the
# window was too large. A lower one has to keep the third, if the delay does not fall with it.
KEPT_SIZE, KEPT_RATE = 0.8, 0.9
KEEP_RATE = 0.85
# The path became longer, or shorter, by this; so much longer that what was known of it is void.
LONGER, SHORTER = 1.3, 0.8
FORGET = 2.5
# For how long the shortest delay is remembered.
MEMORY = 30.0
# Experiments by the clock, in seconds: the first one soon, for those who came while another's
# queue was there; more often while a guest is missing. They take no more than one part in so
# many of the time; those that a strong hint starts, one in the second.
DRAIN_FIRST = 1.0
DRAIN_MOST = 10.0
DRAIN_YIELDING = 3.0
DRAIN_SHARE = 12
STRONG_SHARE = 3
# Probes: the window is tried so much larger, less after a failure. What it brings is compared
# with these parts of its growth: half is enough even if there is a queue then, and with less
# than the second, only what the path can use of it is kept.
PROBE_GROWTH, PROBE_CAREFUL = 1.5, 1.25
PROBE_HALF, PROBE_ALL = 0.5, 0.7
UNITS_PART = 0.6
# How much later replies may be then: where there may be many flows, otherwise, with larger units.
STRICT_PART, ROSE_PART, ROSE_UNITS = 0.02, 0.05, 0.2
# Seconds between probes: failure doubles them, and they are no less than so many probes; more
# if the probe made a queue.
PROBE_FIRST = 0.25
PROBE_MOST = 4.0
PROBE_TRIALS = 8
PROBE_TRIALS_QUEUED = 40
# The rate is measured over spans of a round trip, and no less than this.
RATE_SPAN = 0.05
# Whatever was in flight before so long a silence says nothing of now.
SILENCE = 1.0


class State(enum.Enum):
    """What the window is about; see the module."""

    STARTING = "starting"
    STEADY = "steady"
    DRAINING = "draining"
    LOWERED = "lowered"
    PROBING = "probing"


class Kind(enum.Enum):
    """What a probe tries, and what it has to bring to stay: the rate's growth, as a part of
    the window's for the first, of the rate for the others."""

    WINDOW = 0.25
    LARGER_UNITS = 0.2
    SMALLER_UNITS = -0.06


class Before(NamedTuple):
    """How things were before an experiment: ``rate`` and ``delay`` with ``load`` in flight."""

    state: State
    size: int
    load: int
    rate: float
    background_rate: float
    delay: float
    error: float
    unit_floor: int
    time: float


class Window:
    """The controller of one backing's background reads.

    Attributes:
        state: what it is about.
        size: bytes that may be in flight.
        unit: bytes that one background read should ask for, at the most.
        base_rtt: mean seconds from request to reply without a queue of ours; 0 until known.
        queue_delay: what replies took beyond that in the last trial, in seconds.
    """

    def __init__(self, *, unit_least: int = UNIT_LEAST, rng: random.Random | None = None) -> None:
        """``unit_least``: a power of two, where requests are so dear that less is waste."""
        self._rng = rng or random.Random()
        self.state = State.STARTING
        self.size = WINDOW_FIRST
        self.unit = self._unit_least = unit_least
        self.base_rtt = 0.0
        self.queue_delay = 0.0
        self._now = 0.0
        self._demand_time = self._background_time = -math.inf
        self._in_flight = self._background = 0
        self._idle_since = 0.0
        self._meter = RateMeter(0.0, RATE_SPAN)
        self._late_replies, self._late_since = 0, 0.0
        self._shortest = Lowest()
        self._trial = Trial(self.size, 0.0, 0)
        self._before = Before(State.STARTING, self.size, self.size, 0.0, 0.0, 0.0, 0.0, 0, 0.0)
        self._flat_rate = 0.0
        self._hints = 0
        self._drain_interval, self._drain_at = DRAIN_FIRST, math.inf
        self._hint_interval, self._hint_at, self._strong_at = 0.0, 0.0, 0.0
        self._probe_interval, self._probe_at = PROBE_FIRST, 0.0
        self._spread = 0.0
        self._kind, self._failures = Kind.WINDOW, 0
        self._growth = PROBE_GROWTH
        # No smaller than this, because it was found to bring more.
        self._unit_floor = 0

    @property
    def rate(self) -> float:
        """Bytes per second delivered, lately, at best."""
        return self._meter.rate

    @property
    def target(self) -> float:
        """The queueing delay wanted, in seconds."""
        by_rate = TARGET_TIME * math.sqrt(TARGET_RATE / self.rate) if self.rate else TARGET_MOST
        wanted = max(by_rate, TARGET_LEAST) * (YIELD_PART if self.yielding else 1)
        wanted = min(max(wanted, TARGET_PART * self.base_rtt), TARGET_MOST)
        if not self.yielding and self._spread > SPREAD_PART * self.base_rtt:
            wanted += self._spread
        return wanted

    @property
    def yielding(self) -> bool:
        """A guest is missing, or was a moment ago."""
        return self._now - self._demand_time < YIELD_TIME

    def set_unit_least(self, length: int) -> None:
        """From now on no request is smaller than ``length`` bytes."""
        self._unit_least = max(self._unit_least, 1 << (length - 1).bit_length())
        self.unit = max(self.unit, self._unit_least)

    # -- what happened -----------------------------------------------------------------

    def sent(self, now: float, length: int, *, background: bool = True) -> Sent:
        """A request of any priority went out; hand the result to `delivered` or `lost`."""
        self._now = now
        if self._in_flight == 0:
            self._meter.idled(now - self._idle_since)
            if now - self._idle_since > SILENCE:
                self._abandon(now)
        self._in_flight += length
        if background:
            self._background += length
            self._trial.sent(now, length)
        return Sent(now, length, self._in_flight, background)

    def lost(self, request: Sent) -> None:
        """It will not be answered, or its reply says nothing about the path."""
        self._land(request, self._now, answered=False, limited=False)
        self._abandon(self._now)

    def delivered(self, request: Sent, now: float, *, limited: bool = True) -> None:
        """Its reply is complete. ``limited``: more would have been sent had the window
        allowed it."""
        self._now = now
        self._meter.add(now, request.length, self.base_rtt)
        self._land(request, now, answered=True, limited=limited)
        trial = self._trial
        if request.background:
            self._background_time = now
            if self.state is State.STARTING:
                self._grow(now, request)
        elif now - self._background_time < YIELD_TIME:  # else it waited for nobody
            self._demand_time = now
        if self._trial is trial and trial.over:
            self._judge(trial, now)

    def _land(self, request: Sent, now: float, *, answered: bool, limited: bool) -> None:
        self._in_flight -= request.length
        if request.background:
            self._background -= request.length
        self._trial.landed(request, now, answered=answered, limited=limited)
        if self._in_flight == 0:
            self._idle_since = now

    # -- trials ------------------------------------------------------------------------

    def _judge(self, trial: Trial, now: float) -> None:
        """A trial is over: what does it say?"""
        self.queue_delay = max(trial.delay - self.base_rtt, 0.0)
        self._shortest.add(now, trial.delay, now - MEMORY)
        if self.state is not State.STARTING:
            self._spread += SPREAD_GAIN * (trial.spread - self._spread)
        match self.state:
            case State.STARTING:
                self._judge_start(trial, now)
            case State.STEADY:
                self._judge_steady(trial, now)
            case State.DRAINING:
                self._judge_drain(trial, now)
            case State.LOWERED:
                self._judge_lowered(trial, now)
            case State.PROBING:
                self._judge_probe(trial, now)
        self._choose_unit()

    def _enter(self, state: State, size: float, now: float) -> None:
        """Go on with another window: a new trial begins."""
        self.state = state
        self.size = _bounded(size)
        bold = state is State.DRAINING or size >= BOLD * self._before.size
        accuracy = BOLD_ACCURACY if bold else ACCURACY
        self._trial = Trial(self.size, now, self._background, accuracy)

    def _remember(self, now: float, trial: Trial) -> None:
        """How things are now, for the experiment that begins."""
        self._before = Before(
            self.state,
            self.size,
            trial.size,
            trial.rate,
            trial.background_rate,
            trial.delay,
            trial.error,
            self._unit_floor,
            now,
        )

    def _abandon(self, now: float) -> None:
        """Forget the trial; after an experiment, all is as before."""
        size = self.size
        if self.state in (State.DRAINING, State.LOWERED, State.PROBING):
            size, self._unit_floor = self._before.size, self._before.unit_floor
        self._enter(State.STARTING if self.state is State.STARTING else State.STEADY, size, now)

    # -- start-up ----------------------------------------------------------------------

    def _grow(self, now: float, request: Sent) -> None:
        delay = now - request.time
        if self.base_rtt == 0 or delay < self.base_rtt:
            self.base_rtt = delay
        if delay - self.base_rtt <= max(2 * self.target, self.base_rtt / 8):
            self._late_replies, self._late_since = 0, now
        self._late_replies += 1
        if START_GAIN * request.in_flight < self.size:
            return  # what is sent does not keep up with the window
        self.size = _bounded(self.size + (START_GAIN - 1) * request.length)
        # Growth sends in bursts, and most replies wait behind the rest of their own: what
        # all of a round trip had to wait for is a queue that stands.
        late_for = now - self._late_since
        if self._late_replies > START_REPLIES and late_for >= max(self.base_rtt, START_LEAST):
            self._late_replies = 0
            # What was in flight one delay ago is what comes now: Little's law, while it grows.
            rate = self._trial.rate or request.in_flight / delay
            load = request.in_flight
            self._before = Before(
                self.state, self.size, load, rate, rate, load / rate, 0.0, self._unit_floor, now
            )
            self._drain(now)

    def _judge_start(self, trial: Trial, now: float) -> None:
        flat = trial.limited and trial.rate < self._flat_rate * FLAT_GROWTH
        self._flat_rate = trial.rate
        if flat or self.size == WINDOW_MOST:
            self._flat_rate = 0.0
            self._remember(now, trial)
            self._drain(now)
        else:
            self._trial = Trial(self.size, now, self._background)

    # -- steady ------------------------------------------------------------------------

    def _judge_steady(self, trial: Trial, now: float) -> None:
        if trial.limited and trial.delay + 2 * trial.error < SHORTER * self.base_rtt:
            self._expect_more(now)
        self.base_rtt = min(self.base_rtt, trial.delay + 2 * trial.error)
        target = self.target
        wanted = self._fitting(trial.rate)
        size = float(self.size)
        if trial.limited and wanted > size:
            size += GAIN * (wanted - size)
        late = self.queue_delay > HINT_TARGETS * target + 2 * trial.error
        self._hints = self._hints + 1 if late and trial.limited else 0
        strong = self._hints > 0 and trial.delay > HINT_STRONG * self.base_rtt
        hinted = self._hints >= HINT_TRIALS and now >= self._hint_at
        if hinted or (strong and now >= self._strong_at) or now >= self._drain_at:
            self._remember(now, trial)
            self._drain(now)
        elif trial.limited and now >= self._probe_at:
            self._remember(now, trial)
            self._probe(now)
        else:
            self._enter(State.STEADY, size, now)

    # -- the experiment ----------------------------------------------------------------

    def _drain(self, now: float) -> None:
        """See what the delay is with less in flight."""
        before = self._before
        fill = DRAIN_FILL * min(before.rate * self.base_rtt, before.load)
        size = self._whole(max(fill, DRAIN_LEAST * before.load))
        self._hints = 0
        if size < self._whole(before.load):
            self._enter(State.DRAINING, size, now)
        else:  # one unit at a time has no queue
            self.base_rtt = before.delay
            self._plan(now, fruitful=False)
            self._enter(State.STEADY, min(before.size, 2 * size), now)

    def _judge_drain(self, trial: Trial, now: float) -> None:
        before = self._before
        longer = trial.delay > LONGER * self.base_rtt
        if trial.delay < before.delay * 1.1 + trial.error:
            self.base_rtt = trial.delay
        less = trial.limited and trial.size < KEPT_SIZE * before.load
        if less and trial.rate > KEPT_RATE * before.rate:
            # As much with less in flight: the rest only waited. On from here.
            self.state, self.size = State.STEADY, trial.size
            self._remember(now, trial)
            self._drain(now)
            return
        rate = max(before.rate, trial.rate)
        wanted = self._fitting(rate)
        if self._crowded(before.delay):
            wanted = min(wanted, max(before.size - self.unit, self.unit))
        fell = self._fell(trial, FELL_PART)
        self._plan(now, fruitful=fell)
        if self._fell(trial, DEEP_PART):
            self._drain_at = now  # all of the delay is a queue: the base lies deeper
        if not fell and before.state is State.STARTING:
            self._enter(State.STARTING, before.size, now)
        elif not fell:
            if longer:
                self._expect_more(now)
            if trial.delay > FORGET * self._shortest.least:
                self._shortest = Lowest()
                self._shortest.add(now, trial.delay, now)
            self._enter(State.STEADY, before.size, now)
        elif before.state is State.STARTING or wanted >= before.size:
            self._enter(State.STEADY, min(wanted, before.size), now)
        else:
            self._enter(State.LOWERED, max(wanted, self._whole(before.size / 2)), now)

    def _fell(self, trial: Trial, part: float) -> bool:
        """Whether the delay fell with what is in flight, by ``part`` of what that of a queue
        of ours would do."""
        before = self._before
        possible = 1 - trial.size / before.load
        noise = 2 * math.hypot(trial.error, before.error)
        return before.delay - trial.delay > max(part * possible * before.delay, noise)

    def _crowded(self, delay: float) -> bool:
        """Whether there may be more of a queue than all flows of a link are to have."""
        slack = TARGET_MOST + self._spread + self._unit_time
        return delay > self._shortest.least + slack

    @property
    def _unit_time(self) -> float:
        """What one unit takes on the path, at the rate that was seen."""
        return self.unit / self.rate if self.rate else 0.0

    def _judge_lowered(self, trial: Trial, now: float) -> None:
        before = self._before
        kept = trial.background_rate >= KEEP_RATE * before.background_rate
        good = kept or self._fell(trial, FELL_PART)
        if not good:
            self.base_rtt = max(self.base_rtt, min(trial.delay, before.delay))
            self._plan(now, fruitful=False)
        self._enter(State.STEADY, self.size if good else before.size, now)

    def _plan(self, now: float, *, fruitful: bool) -> None:
        """When to experiment next."""
        took = now - self._before.time
        interval = self._drain_interval
        if self.yielding:
            interval = min(interval, DRAIN_YIELDING)
        wait = min(max(interval, DRAIN_SHARE * took), 1.5 * DRAIN_MOST)
        self._drain_at = now + wait * self._rng.uniform(0.8, 1.2)
        self._drain_interval = min(2 * self._drain_interval, DRAIN_MOST)
        self._hint_interval = 0.0 if fruitful else min(2 * self._hint_interval + took, DRAIN_MOST)
        self._strong_at = now + STRONG_SHARE * took
        self._hint_at = now + (took if fruitful else max(DRAIN_SHARE * took, self._hint_interval))

    # -- the probe ---------------------------------------------------------------------

    def _probe(self, now: float) -> None:
        """Try the next of the things that may bring more."""
        self._kind = self._next_kind()
        self._growth = PROBE_GROWTH if self._failures == 0 else PROBE_CAREFUL
        self._try_more(now)

    def _next_kind(self) -> Kind:
        kinds = [Kind.WINDOW]
        if self.unit < UNIT_MOST:
            kinds.append(Kind.LARGER_UNITS)
        if self._unit_floor > self._ruled_unit():
            kinds.append(Kind.SMALLER_UNITS)
        return kinds[self._failures % len(kinds)]

    def _try_more(self, now: float) -> None:
        size = float(self.size)
        if self._kind is Kind.LARGER_UNITS:
            self._unit_floor = 2 * self.unit
            size = max(size, min(2 * size, UNITS_LEAST * self._unit_floor))
        elif self._kind is Kind.SMALLER_UNITS:
            self._unit_floor //= 2
        else:
            size = max(self._whole(self._growth * size), size + self.unit)
        self._choose_unit()
        self._enter(State.PROBING, size, now)

    def _expect_more(self, now: float) -> None:
        """There may be room: look for it at once, and first in the window."""
        self._failures = 0
        self._probe_interval, self._probe_at = PROBE_FIRST, now

    def _judge_probe(self, trial: Trial, now: float) -> None:
        before = self._before
        gain = trial.background_rate / max(before.background_rate, 1.0) - 1
        grown = trial.size / before.size - 1
        if not self._is_worth_it(trial, gain, grown):
            self._fail_probe(trial, grown, now)
            return
        self._expect_more(now)
        size = trial.size
        if gain < PROBE_ALL * grown:
            size = min(max(self._fitting(trial.rate, 2 * trial.error), before.size), size)
        more = self.unit < UNIT_MOST if self._kind is Kind.LARGER_UNITS else size < WINDOW_MOST
        if self._kind is not Kind.SMALLER_UNITS and size == trial.size and more:
            # No queue as yet: go on, from here, in larger steps.
            self._growth = min(self._growth + PROBE_GROWTH - 1, START_GAIN)
            self.state = State.STEADY
            self._remember(now, trial)
            self._try_more(now)
        else:
            self._enter(State.STEADY, size, now)

    def _is_worth_it(self, trial: Trial, gain: float, grown: float) -> bool:
        """Whether what was tried stays: it brings enough, and no queue that others feel."""
        before = self._before
        least = self._kind.value
        if self._kind is Kind.WINDOW:
            least *= grown
        elif self._kind is Kind.LARGER_UNITS:
            least = max(least, UNITS_PART * grown)
        if gain <= least:
            return False
        noise = math.hypot(trial.error, before.error)
        rise = trial.delay - before.delay
        if self._crowded(trial.delay):
            return rise <= noise + STRICT_PART * before.delay
        part = ROSE_UNITS if self._kind is Kind.LARGER_UNITS else ROSE_PART
        return (
            gain >= PROBE_HALF * grown
            or rise <= 2 * noise + part * before.delay
            or self.queue_delay <= self.target + self._unit_time + 2 * noise
        )

    def _fail_probe(self, trial: Trial, grown: float, now: float) -> None:
        """All is as before; when to try the next thing."""
        before = self._before
        self._unit_floor = before.unit_floor
        self._failures += 1
        self._probe_interval = min(2 * self._probe_interval, PROBE_MOST)
        queued = trial.delay > before.delay * (1 + grown / 2)
        trials = PROBE_TRIALS_QUEUED if queued else PROBE_TRIALS
        wait = max(self._probe_interval, trials * (now - before.time))
        if self._failures > 1 or self.unit >= UNIT_MOST:  # else larger units are next, at once
            self._probe_at = now + wait * self._rng.uniform(0.8, 1.2)
        self._enter(State.STEADY, before.size, now)

    # -- the unit ----------------------------------------------------------------------

    def _choose_unit(self) -> None:
        self.unit = max(self._ruled_unit(), self._unit_floor)

    def _ruled_unit(self) -> int:
        """The unit is a power of two, so that it does not change with every breath."""
        # Not of the window alone: where requests are what costs the time, it is never used
        # up, and larger ones are what it takes.
        room = max(self.size, self.rate * (self.base_rtt + self.target))
        wanted = min(self.rate * UNIT_TIME, room / UNITS_LEAST, UNIT_MOST)
        return max(self._unit_least, 1 << max(int(wanted), 1).bit_length() - 1)

    def _fitting(self, rate: float, slack: float = 0.0) -> int:
        """The window for a rate: in whole units, because on slow links each is long."""
        wanted = rate * (self.base_rtt + self.target + slack)
        return _bounded(self._whole(wanted))

    def _whole(self, size: float) -> int:
        """The nearest number of whole units, of one at the least."""
        return max(round(size / self.unit), 1) * self.unit


def _bounded(size: float) -> int:
    return int(min(max(size, WINDOW_LEAST), WINDOW_MOST))
