# SPDX-License-Identifier: Apache-2.0
"""The steady state: follows what was measured, and decides when to experiment; see `course`."""

from nbdstream.backing.window.course import Course, State
from nbdstream.backing.window.draining import Draining
from nbdstream.backing.window.probing import Probing
from nbdstream.backing.window.trial import Trial

# How far to go to where the measurements point, after each trial.
GAIN = 0.5
# So many targets of delay, in so many trials in a row, start an experiment. So many times the
# base do so at once.
HINT_TARGETS = 2.0
HINT_TRIALS = 2
HINT_STRONG = 2.0
# The path became shorter by this.
SHORTER = 0.8


class Steady:
    """The state `State.STEADY`."""

    def __init__(self, course: Course, draining: Draining, probing: Probing) -> None:
        self._course, self._draining, self._probing = course, draining, probing
        self._hints = 0

    def judge(self, trial: Trial, now: float) -> None:
        """A trial is over: adjust the window, or begin an experiment."""
        course, path = self._course, self._course.path
        if trial.limited and trial.delay + 2 * trial.error < SHORTER * path.base_rtt:
            self._probing.expect_more(now)
        path.base_rtt = min(path.base_rtt, trial.delay + 2 * trial.error)
        if self._is_hinted(trial, now):
            self._hints = 0
            course.remember(now, trial)
            self._draining.begin(now)
        elif trial.limited and now >= self._probing.due_at:
            course.remember(now, trial)
            self._probing.begin(now)
        else:
            size = float(course.size)
            wanted = path.fitting(trial.rate)
            if trial.limited and wanted > size:
                size += GAIN * (wanted - size)
            course.enter(State.STEADY, size, now)

    def _is_hinted(self, trial: Trial, now: float) -> bool:
        """Whether delays, or the clock, call for an experiment with less in flight."""
        path, draining = self._course.path, self._draining
        late = path.queue_delay > HINT_TARGETS * path.target + 2 * trial.error
        self._hints = self._hints + 1 if late and trial.limited else 0
        strong = self._hints > 0 and trial.delay > HINT_STRONG * path.base_rtt
        hinted = self._hints >= HINT_TRIALS and now >= draining.hinted_at
        return hinted or (strong and now >= draining.strong_at) or now >= draining.due_at
