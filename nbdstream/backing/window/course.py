# SPDX-License-Identifier: Apache-2.0
"""The states of the window, and what they share.

- *Starting* (`starting`): the window grows threefold each round trip, until a whole round
  trip's replies were late or the rate grows no more. Then an experiment decides: if the
  delay does not fall with less in flight, growth goes on.
- *Steady* (`steady`): the window moves towards what fits the path, upwards only. A delay well
  above that is the hint that starts the next experiment; so does the clock, because the
  path may have changed.
- *Draining* (`draining`): less is in flight, for one trial: its delay is the new base.
- *Lowered* (`draining`): the base called for a smaller window, which is on trial: it stays if
  the rate does not suffer, or if the delay falls with it (then others share the queue, and
  this is our part in making it shorter).
- *Probing* (`probing`): a larger window, or other units, are on trial. They stay if they
  deliver more, and if no guest's reads are later with them.
"""

import enum
from typing import NamedTuple

from nbdstream.backing.window.demand import DemandGauge
from nbdstream.backing.window.path import Path, bounded
from nbdstream.backing.window.trial import ACCURACY, Trial

# What is far from what was before is measured less exactly: bold steps, in short trials.
BOLD, BOLD_ACCURACY = 1.4, 0.12


class State(enum.Enum):
    """What the window is about; see the module."""

    STARTING = "starting"
    STEADY = "steady"
    DRAINING = "draining"
    LOWERED = "lowered"
    PROBING = "probing"


EXPERIMENTS = frozenset({State.DRAINING, State.LOWERED, State.PROBING})


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


class Course:
    """Where the window is, and how it came there.

    Attributes:
        state, size: what the window is about; bytes that may be in flight.
        trial: the measurement under way.
        before: how things were when the last experiment began.
        background: bytes of background reads in flight.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.demand = DemandGauge()
        self.state = State.STARTING
        self.size = size
        self.background = 0
        self.trial = Trial(0, size, 0.0, 0)
        self.before = Before(State.STARTING, size, size, 0.0, 0.0, 0.0, 0.0, 0, 0.0)

    def enter(self, state: State, size: float, now: float) -> None:
        """Go on with another window: a new trial begins."""
        self.state = state
        self.size = bounded(size)
        if state is State.PROBING:
            self.demand.try_more(now)
        elif state is State.STEADY:
            self.demand.be_usual()
        bold = state is State.DRAINING or size >= BOLD * self.before.size
        self.new_trial(now, BOLD_ACCURACY if bold else ACCURACY)

    def new_trial(self, now: float, accuracy: float = ACCURACY) -> None:
        """Measure from now on."""
        number = self.trial.number + 1
        self.trial = Trial(number, self.size, now, self.background, accuracy)

    def remember(self, now: float, trial: Trial) -> None:
        """How things are now, for the experiment that begins."""
        self.before = Before(
            self.state,
            self.size,
            trial.size,
            trial.rate,
            trial.background_rate,
            trial.delay,
            trial.error,
            self.path.unit_floor,
            now,
        )

    def abandon(self, now: float) -> None:
        """Forget the trial; after an experiment, all is as before."""
        size = self.size
        if self.state in EXPERIMENTS:
            size, self.path.unit_floor = self.before.size, self.before.unit_floor
        self.enter(State.STARTING if self.state is State.STARTING else State.STEADY, size, now)
