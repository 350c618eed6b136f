# SPDX-License-Identifier: Apache-2.0
"""The experiment with less in flight: is the delay a queue of ours? See `course`.

Nothing else lowers the window. A base that was too long is found here, and so is one that
has grown: if the delay does not fall with the window, there is no queue of ours, and all is as
before.
"""

import math
import random

from nbdstream.backing.window.course import Course, State
from nbdstream.backing.window.probing import Probing
from nbdstream.backing.window.trial import Trial

# An experiment has this part of what fills the path in flight, and no less of the window.
DRAIN_FILL = 0.75
DRAIN_LEAST = 0.5
# The delay fell with the window if it did by this part of what a queue of ours alone would do,
# and beyond the noise. By the second part, there is nothing but a queue.
FELL_PART = 0.08
DEEP_PART = 0.8
# With less than the first part of the window, more than the second part of the rate: the
# window was too large. A lower one has to keep the third, if the delay does not fall with it.
KEPT_SIZE, KEPT_RATE = 0.8, 0.9
KEEP_RATE = 0.85
# The path became longer by this; so much longer that what was known of it is void.
LONGER = 1.3
FORGET = 2.5
# Experiments by the clock, in seconds: the first one soon, for those who came while another's
# queue was there. They take no more than one part in so many of the time; those that a strong
# hint starts, one in the second.
DRAIN_FIRST = 1.0
DRAIN_MOST = 10.0
DRAIN_SHARE = 12
STRONG_SHARE = 3


class Draining:
    """The states `State.DRAINING` and `State.LOWERED`.

    Attributes:
        due_at: when the clock calls for an experiment.
        hinted_at, strong_at: from when on a hint, or a strong one, may start one.
    """

    def __init__(self, course: Course, probing: Probing, rng: random.Random) -> None:
        self._course, self._probing, self._rng = course, probing, rng
        self._interval, self.due_at = DRAIN_FIRST, math.inf
        self._hint_interval, self.hinted_at, self.strong_at = 0.0, 0.0, 0.0

    def begin(self, now: float) -> None:
        """See what the delay is with less in flight than in `Course.before`."""
        course, path, before = self._course, self._course.path, self._course.before
        fill = DRAIN_FILL * min(before.rate * path.base_rtt, before.load)
        size = path.whole(max(fill, DRAIN_LEAST * before.load))
        if size < path.whole(before.load):
            course.enter(State.DRAINING, size, now)
        else:  # one unit at a time has no queue
            path.base_rtt = before.delay
            self._plan(now, fruitful=False)
            course.enter(State.STEADY, min(before.size, 2 * size), now)

    def judge(self, trial: Trial, now: float) -> None:
        """The experiment is over."""
        course, path, before = self._course, self._course.path, self._course.before
        longer = trial.delay > LONGER * path.base_rtt
        if trial.delay < before.delay * 1.1 + trial.error:
            path.base_rtt = trial.delay
        less = trial.limited and trial.size < KEPT_SIZE * before.load
        if less and trial.rate > KEPT_RATE * before.rate:
            # As much with less in flight: the rest only waited. On from here.
            course.state, course.size = State.STEADY, trial.size
            course.remember(now, trial)
            self.begin(now)
            return
        fell = self._fell(trial, FELL_PART)
        self._plan(now, fruitful=fell)
        if self._fell(trial, DEEP_PART):
            self.due_at = now  # all of the delay is a queue: the base lies deeper
        if fell:
            self._lower(trial, now)
        elif before.state is State.STARTING:
            course.enter(State.STARTING, before.size, now)
        else:
            if longer:
                self._probing.expect_more(now)
            path.outgrew(FORGET, trial.delay, now)
            course.enter(State.STEADY, before.size, now)

    def _lower(self, trial: Trial, now: float) -> None:
        """There was a queue of ours: go on without it."""
        course, path, before = self._course, self._course.path, self._course.before
        wanted = path.fitting(max(before.rate, trial.rate))
        if path.crowded(before.delay):
            wanted = min(wanted, max(before.size - path.unit, path.unit))
        if before.state is State.STARTING or wanted >= before.size:
            course.enter(State.STEADY, min(wanted, before.size), now)
        else:
            course.enter(State.LOWERED, max(wanted, path.whole(before.size / 2)), now)

    def judge_lowered(self, trial: Trial, now: float) -> None:
        """A lower window has been on trial: does it stay?"""
        course, path, before = self._course, self._course.path, self._course.before
        kept = trial.background_rate >= KEEP_RATE * before.background_rate
        good = kept or self._fell(trial, FELL_PART)
        if not good:
            path.base_rtt = max(path.base_rtt, min(trial.delay, before.delay))
            self._plan(now, fruitful=False)
        course.enter(State.STEADY, course.size if good else before.size, now)

    def _fell(self, trial: Trial, part: float) -> bool:
        """Whether the delay fell with what is in flight, by ``part`` of what that of a queue
        of ours would do."""
        before = self._course.before
        possible = 1 - trial.size / before.load
        noise = 2 * math.hypot(trial.error, before.error)
        return before.delay - trial.delay > max(part * possible * before.delay, noise)

    def _plan(self, now: float, *, fruitful: bool) -> None:
        """When to experiment next."""
        took = now - self._course.before.time
        wait = min(max(self._interval, DRAIN_SHARE * took), 1.5 * DRAIN_MOST)
        self.due_at = now + wait * self._rng.uniform(0.8, 1.2)
        self._interval = min(2 * self._interval, DRAIN_MOST)
        self._hint_interval = 0.0 if fruitful else min(2 * self._hint_interval + took, DRAIN_MOST)
        self.strong_at = now + STRONG_SHARE * took
        self.hinted_at = now + (took if fruitful else max(DRAIN_SHARE * took, self._hint_interval))
