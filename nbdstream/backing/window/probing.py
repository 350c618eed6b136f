# SPDX-License-Identifier: Apache-2.0
"""The experiment with more: a larger window, larger units, or smaller ones again; see `course`.

What a window can carry is its size over the delay of its replies (Little's law): the bytes
that were delivered in so short a time also say how much a guest happened to ask for.

A probe that makes a queue is a cost to a guest. So it ends as soon as it is plain that it will
not stay: when the first replies say so, or when the guest's own reads are late.
"""

import enum
import math
import random

from nbdstream.backing.window.course import Course, State
from nbdstream.backing.window.path import UNIT_MOST, UNITS_LEAST, WINDOW_MOST
from nbdstream.backing.window.trial import Trial

# The window is tried so much larger, less after a failure; after each success, by so much more
# again, up to the last.
PROBE_GROWTH, PROBE_CAREFUL = 1.5, 1.25
GROWTH_MOST = 3
# What a probe brings is compared with these parts of the window's growth: half is enough even
# if there is a queue then, and with less than the second, only what the path can use of it is
# kept.
PROBE_HALF, PROBE_ALL = 0.5, 0.7
UNITS_PART = 0.6
# A probe that failed has found room if this many times the window fits.
FOUND_ROOM = 1.2
# So many replies to what the probe sent can show that it is in vain.
VAIN_REPLIES = 4
# How much later replies may be then: where there may be many flows, otherwise, with larger units.
STRICT_PART, ROSE_PART, ROSE_UNITS = 0.02, 0.05, 0.2
# Seconds between probes: failure doubles them, and they are no less than so many probes; more
# if the probe made a queue.
PROBE_FIRST = 0.25
PROBE_MOST = 16.0
PROBE_TRIALS = 8
PROBE_TRIALS_QUEUED = 40


class Kind(enum.Enum):
    """What a probe tries, and what it has to bring to stay: the rate's growth, as a part of
    the window's for the first, of the rate for the others."""

    WINDOW = 0.25
    LARGER_UNITS = 0.2
    SMALLER_UNITS = -0.06


class Probing:
    """The state `State.PROBING`.

    Attributes:
        due_at: when the next probe may begin.
    """

    def __init__(self, course: Course, rng: random.Random) -> None:
        self._course, self._rng = course, rng
        self._interval, self.due_at = PROBE_FIRST, 0.0
        self._kind, self._failures = Kind.WINDOW, 0
        self._growth = PROBE_GROWTH

    def expect_more(self, now: float) -> None:
        """There may be room: look for it at once, and first in the window."""
        self._failures = 0
        self._interval, self.due_at = PROBE_FIRST, now

    def begin(self, now: float) -> None:
        """Try the next of the things that may bring more than `Course.before`."""
        self._kind = self._next_kind()
        self._growth = PROBE_GROWTH if self._failures == 0 else PROBE_CAREFUL
        self._try_more(now)

    def _next_kind(self) -> Kind:
        path = self._course.path
        kinds = [Kind.WINDOW]
        if path.unit < UNIT_MOST:
            kinds.append(Kind.LARGER_UNITS)
        if path.unit_floor > path.ruled_unit(self._course.size):
            kinds.append(Kind.SMALLER_UNITS)
        return kinds[self._failures % len(kinds)]

    def _try_more(self, now: float) -> None:
        course, path = self._course, self._course.path
        size = float(course.size)
        if self._kind is Kind.LARGER_UNITS:
            path.unit_floor = 2 * path.unit
            size = max(size, min(2 * size, UNITS_LEAST * path.unit_floor))
        elif self._kind is Kind.SMALLER_UNITS:
            path.unit_floor //= 2
        else:
            size = max(path.whole(self._growth * size), size + path.unit)
        path.choose_unit(course.size)
        course.enter(State.PROBING, size, now)

    # -- what it brought ---------------------------------------------------------------

    def judge(self, trial: Trial, now: float) -> None:
        """The probe is over."""
        course, path = self._course, self._course.path
        if course.demand.is_hurt or not self._is_worth_it(trial):
            self._fail(trial, trial.delay + trial.error, now)
            return
        self.expect_more(now)
        size = trial.size
        if self._gain(trial, trial.delay) < PROBE_ALL * self._grown(trial):
            fitting = path.fitting(trial.rate, 2 * trial.error)
            size = min(max(fitting, course.before.size), size)
        more = path.unit < UNIT_MOST if self._kind is Kind.LARGER_UNITS else size < WINDOW_MOST
        if self._kind is not Kind.SMALLER_UNITS and size == trial.size and more:
            # No queue as yet: go on, from here, in larger steps.
            self._growth = min(self._growth + PROBE_GROWTH - 1, GROWTH_MOST)
            course.state = State.STEADY
            course.remember(now, trial)
            self._try_more(now)
        else:
            course.enter(State.STEADY, size, now)

    def answered(self, trial: Trial, now: float) -> None:
        """A reply has come: end the probe if it is plain that it will not stay."""
        if self._course.demand.is_hurt or self._is_in_vain(trial):
            self._fail(trial, trial.own.mean + 2 * trial.own.error, now)
            self._course.path.choose_unit(self._course.size)

    def _is_in_vain(self, trial: Trial) -> bool:
        if trial.own.count < VAIN_REPLIES:
            return False
        return self._gain(trial, trial.own.mean - 2 * trial.own.error) <= self._least(trial)

    def _grown(self, trial: Trial) -> float:
        return trial.size / self._course.before.size - 1

    def _gain(self, trial: Trial, delay: float) -> float:
        """By what part more can be carried, if replies take ``delay`` now."""
        before = self._course.before
        if delay <= 0 or before.delay <= 0:
            return 0.0 if delay > 0 else math.inf
        return (trial.size / delay) / (before.size / before.delay) - 1

    def _least(self, trial: Trial) -> float:
        """What the gain has to be."""
        least = self._kind.value
        if self._kind is Kind.WINDOW:
            return least * self._grown(trial)
        if self._kind is Kind.LARGER_UNITS:
            return max(least, UNITS_PART * self._grown(trial))
        return least

    def _is_worth_it(self, trial: Trial) -> bool:
        """Whether what was tried stays: it brings enough, and no queue that others feel."""
        path, before = self._course.path, self._course.before
        gain = self._gain(trial, trial.delay)
        if gain <= self._least(trial):
            return False
        noise = math.hypot(trial.error, before.error)
        rise = trial.delay - before.delay
        if path.crowded(trial.delay):
            return rise <= noise + STRICT_PART * before.delay
        part = ROSE_UNITS if self._kind is Kind.LARGER_UNITS else ROSE_PART
        return (
            gain >= PROBE_HALF * self._grown(trial)
            or rise <= 2 * noise + part * before.delay
            or path.queue_delay <= path.target + path.unit_time + 2 * noise
        )

    def _fail(self, trial: Trial, delay: float, now: float) -> None:
        """All is as before, but for what the path can use of a larger window. ``delay``: what
        replies took, at the most."""
        course, before = self._course, self._course.before
        course.path.unit_floor = before.unit_floor
        room = self._found_room(trial, delay)
        if room > FOUND_ROOM * before.size:
            self.expect_more(now)
            course.enter(State.STEADY, room, now)
            return
        self._failures += 1
        self._interval = min(2 * self._interval, PROBE_MOST)
        queued = course.demand.is_hurt or delay > before.delay * (1 + self._grown(trial) / 2)
        trials = PROBE_TRIALS_QUEUED if queued else PROBE_TRIALS
        wait = max(self._interval, trials * (now - before.time))
        if self._failures > 1 or course.path.unit >= UNIT_MOST:  # else larger units are next
            self.due_at = now + wait * self._rng.uniform(0.8, 1.2)
        course.enter(State.STEADY, before.size, now)

    def _found_room(self, trial: Trial, delay: float) -> float:
        """What the path can use of the window that was tried, in bytes."""
        path = self._course.path
        if self._kind is not Kind.WINDOW or delay <= 0 or self._course.demand.is_hurt:
            return 0.0
        if path.crowded(self._course.before.delay):
            return 0.0
        return min(path.wanted(trial.size / delay), trial.size)
