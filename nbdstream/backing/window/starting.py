# SPDX-License-Identifier: Apache-2.0
"""Start-up: the window grows until the path gives no more; see `course`."""

from nbdstream.backing.window.course import Before, Course
from nbdstream.backing.window.draining import Draining
from nbdstream.backing.window.measures import Row
from nbdstream.backing.window.path import WINDOW_MOST, bounded
from nbdstream.backing.window.trial import Sent, Trial

# How much larger the window becomes each round trip. It has found the end of the path when
# more than so many replies, and all of a round trip (or of so many seconds), were late, or
# when a trial delivers less than so many times what the one before did.
START_GAIN = 3
START_REPLIES = 6
START_LEAST = 0.03
FLAT_GROWTH = 1.25
# A reply is not late if it differs from the shortest by less than so many times what
# replies differ by from each other, over so many of them.
SPREADS = 2.0
SPREAD_REPLIES = 8
# A reply takes some time, whatever a coarse clock says.
CLOCK_STEP = 1e-6


class Starting:
    """The state `State.STARTING`."""

    def __init__(self, course: Course, draining: Draining) -> None:
        self._course, self._draining = course, draining
        self._late_since = 0.0
        self._be_in_time()
        self._flat_rate = 0.0
        self._spread = self._last_delay = 0.0

    def answered(self, now: float, request: Sent) -> None:
        """The reply of a background read has come: grow by it."""
        course, path = self._course, self._course.path
        delay = now - request.time
        if path.base_rtt == 0 or delay < path.base_rtt:
            path.base_rtt = delay
        self._spread += (abs(delay - self._last_delay) - self._spread) / SPREAD_REPLIES
        self._last_delay = delay
        usual = max(2 * path.target, path.base_rtt / 8, SPREADS * self._spread)
        if delay - path.base_rtt <= usual:
            self._late_since = now
            self._be_in_time()
        else:
            self._late.add(delay)
            self._late_load.add(request.in_flight)
        if START_GAIN * request.in_flight < course.size:
            return  # what is sent does not keep up with the window
        course.size = bounded(course.size + (START_GAIN - 1) * request.length)
        path.start_unit(course.size, request.in_flight / max(delay, CLOCK_STEP))
        # Growth sends in bursts, and most replies wait behind the rest of their own: what
        # all of a round trip had to wait for is a queue that stands.
        late_for = now - self._late_since
        if self._late.count >= START_REPLIES and late_for >= max(path.base_rtt, START_LEAST):
            self._end(now, self._late_load.mean, self._late.mean)
            self._be_in_time()

    def _be_in_time(self) -> None:
        """No reply has been late since."""
        self._late, self._late_load = Row(), Row()

    def judge(self, trial: Trial, now: float) -> None:
        """A trial is over: go on, unless the rate grows no more."""
        course = self._course
        flat = trial.limited and trial.rate < self._flat_rate * FLAT_GROWTH
        self._flat_rate = trial.rate
        if flat or course.size == WINDOW_MOST:
            self._flat_rate = 0.0
            mean = trial.replies.mean
            self._end(now, trial.rate * mean, mean)
        else:
            course.new_trial(now)

    def _end(self, now: float, load: float, delay: float) -> None:
        """The path seems to be full, with ``load`` bytes in flight and replies after ``delay``.

        The trial's own figures lag behind while the window grows: what comes now was asked for
        one delay ago.
        """
        course = self._course
        load, delay = max(load, 1.0), max(delay, CLOCK_STEP)
        rate, floor = load / delay, course.path.unit_floor
        course.before = Before(
            course.state, course.size, int(load), rate, rate, delay, 0.0, floor, now
        )
        self._draining.begin(now)
