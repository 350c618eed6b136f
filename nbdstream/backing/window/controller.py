# SPDX-License-Identifier: Apache-2.0
"""The window: counts what is in flight, and hands replies and trials to the state it is in."""

import random

from nbdstream.backing.window.course import Course, State
from nbdstream.backing.window.draining import Draining
from nbdstream.backing.window.path import UNIT_LEAST, WINDOW_FIRST, Path
from nbdstream.backing.window.probing import Probing
from nbdstream.backing.window.starting import Starting
from nbdstream.backing.window.steady import Steady
from nbdstream.backing.window.trial import Sent, Trial

# Whatever was in flight before so long a silence says nothing of now.
SILENCE = 1.0


class Window:
    """The controller of one backing's background reads."""

    def __init__(self, *, unit_least: int = UNIT_LEAST, rng: random.Random | None = None) -> None:
        """``unit_least``: a power of two, where requests are so dear that less is waste."""
        rng = rng or random.Random()
        self._path = Path(unit_least)
        self._course = Course(self._path, WINDOW_FIRST)
        self._probing = Probing(self._course, rng)
        self._draining = Draining(self._course, self._probing, rng)
        self._starting = Starting(self._course, self._draining)
        self._steady = Steady(self._course, self._draining, self._probing)
        self._now = 0.0
        self._in_flight = 0
        self._idle_since = 0.0

    # -- what it says ------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes that may be in flight."""
        return self._course.size

    @property
    def unit(self) -> int:
        """Bytes that one background read should ask for, at the most."""
        return self._path.unit

    @property
    def state(self) -> State:
        """What it is about."""
        return self._course.state

    @property
    def rate(self) -> float:
        """Bytes per second delivered, lately, at best."""
        return self._path.rate

    @property
    def base_rtt(self) -> float:
        """Mean seconds from request to reply without a queue of ours; 0 until known."""
        return self._path.base_rtt

    @property
    def queue_delay(self) -> float:
        """What replies took beyond that in the last trial, in seconds."""
        return self._path.queue_delay

    @property
    def target(self) -> float:
        """The queueing delay wanted, in seconds."""
        return self._path.target

    def set_unit_least(self, length: int) -> None:
        """From now on no request is smaller than ``length`` bytes."""
        self._path.set_unit_least(length)

    # -- what happened -----------------------------------------------------------------

    def sent(self, now: float, length: int, *, background: bool = True) -> Sent:
        """A request of any priority went out; hand the result to `delivered` or `lost`."""
        self._now = now
        course = self._course
        if self._in_flight == 0:
            self._path.meter.idled(now - self._idle_since)
            if now - self._idle_since > SILENCE:
                course.abandon(now)
        self._in_flight += length
        if background:
            course.background += length
            course.trial.sent(now, length)
        return Sent(now, length, self._in_flight, background, course.trial.number)

    def lost(self, request: Sent) -> None:
        """It will not be answered, or its reply says nothing about the path."""
        self._land(request, self._now, answered=False, limited=False)
        self._course.abandon(self._now)

    def delivered(self, request: Sent, now: float, *, limited: bool = True) -> None:
        """Its reply is complete. ``limited``: more would have been sent had the window
        allowed it."""
        self._now = now
        path, course = self._path, self._course
        path.meter.add(now, request.length, path.base_rtt)
        self._land(request, now, answered=True, limited=limited)
        trial = course.trial
        if not request.background:
            transmission = request.length / path.rate if path.rate else 0.0
            course.demand.answered(request.time, now, transmission)
        elif course.state is State.STARTING:
            self._starting.answered(now, request)
        if course.trial is not trial:
            return
        if trial.over:
            self._judge(trial, now)
        elif course.state is State.PROBING:
            self._probing.answered(trial, now)

    def _land(self, request: Sent, now: float, *, answered: bool, limited: bool) -> None:
        self._in_flight -= request.length
        if request.background:
            self._course.background -= request.length
        self._course.trial.landed(request, now, answered=answered, limited=limited)
        if self._in_flight == 0:
            self._idle_since = now

    def _judge(self, trial: Trial, now: float) -> None:
        """A trial is over: what does it say?"""
        self._path.saw_delay(now, trial.delay)
        if self.state is not State.STARTING:
            self._path.saw_spread(trial.spread)
        match self.state:
            case State.STARTING:
                self._starting.judge(trial, now)
            case State.STEADY:
                self._steady.judge(trial, now)
            case State.DRAINING:
                self._draining.judge(trial, now)
            case State.LOWERED:
                self._draining.judge_lowered(trial, now)
            case State.PROBING:
                self._probing.judge(trial, now)
        self._path.choose_unit(self.size)
