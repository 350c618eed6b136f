# SPDX-License-Identifier: Apache-2.0
"""The estimate of when a stream job is done: it settles soon, follows, and never lies."""

import random

import pytest

from nbdstream.streamer.progress import RATE_SPAN, SAMPLE_INTERVAL, Progress

MIB = 1 << 20
SIZE = 1000 * MIB
# Within so many seconds, an estimate is to be right; with so much error.
SETTLED = 3.0
ERROR = 0.2


class Link:
    """Units of data that arrive at a rate, one after the other, not quite evenly."""

    def __init__(self, progress: Progress, *, unit: int, seed: int) -> None:
        self.progress = progress
        self.now = 0.0
        self._unit = unit
        self._random = random.Random(seed)
        self._part = 0.0  # of the next unit, that has come already
        self._gap = 1.0  # units' time until it is complete, from its start

    def run(self, seconds: float, rate: float) -> None:
        end = self.now + seconds
        unit_time = self._unit / rate
        while (done := self.now + (self._gap - self._part) * unit_time) <= end:
            self.now = done
            self.progress.got(self._unit, self.now)
            self._part, self._gap = 0.0, self._random.uniform(0.5, 1.5)
        self._part += (end - self.now) / unit_time
        self.now = end

    def eta_is_right(self, rate: float) -> bool:
        """Whether the estimate is what one makes who knows the rate."""
        eta = self.progress.eta(self.now)
        truth = (self.progress.data - self.progress.fetched) / rate
        return eta is not None and abs(eta - truth) <= ERROR * truth


def streaming(*, unit: int = MIB // 4, seed: int = 1) -> Link:
    progress = Progress(SIZE, now=0.0)
    progress.saw(SIZE, data=True)
    return Link(progress, unit=unit, seed=seed)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [2 * MIB, 10 * MIB, 200 * MIB])
def test_it_settles_within_seconds_and_stays(rate: int, seed: int) -> None:
    link = streaming(seed=seed)
    link.run(SETTLED, rate)
    while link.progress.remaining() > rate * 2:
        assert link.eta_is_right(rate)
        link.run(0.3, rate)


def test_a_slow_start_does_not_spoil_it_for_long() -> None:
    link = streaming()
    for second in range(3):  # as the window grows
        link.run(1.0, MIB * 4**second)
    link.run(SETTLED + 2, 16 * MIB)
    assert link.eta_is_right(16 * MIB)


@pytest.mark.parametrize("factor", [0.25, 4])
def test_it_follows_a_link_that_changes(factor: float) -> None:
    link = streaming()
    link.run(20, 8 * MIB)
    link.run(RATE_SPAN + 1, 8 * MIB * factor)
    assert link.eta_is_right(8 * MIB * factor)


def test_large_units_on_a_slow_link() -> None:
    """One unit every second and a half: too few for a good rate, enough for a fair one."""
    link = streaming(unit=MIB)
    link.run(12, 0.7 * MIB)
    for _ in range(60):
        eta = link.progress.eta(link.now)
        truth = link.progress.remaining() / (0.7 * MIB)
        assert eta is not None and 0.6 * truth < eta < 1.6 * truth
        link.run(1, 0.7 * MIB)


def test_a_stall_only_ever_makes_it_later_until_it_is_not_known() -> None:
    link = streaming()
    link.run(10, 8 * MIB)
    last = link.progress.eta(link.now)
    for _ in range(50):
        link.now += 0.1
        eta = link.progress.eta(link.now)
        assert eta is None or (last is not None and eta >= last)
        last = eta
    link.now += 0.5 + SAMPLE_INTERVAL
    assert link.progress.eta(link.now) is None
    assert link.progress.rate(link.now) == 0
    link.run(RATE_SPAN + 1, 8 * MIB)
    assert link.eta_is_right(8 * MIB)


def test_a_pause_is_not_held_against_the_link() -> None:
    link = streaming()
    link.run(10, 8 * MIB)
    link.now += 600
    link.progress.resumed(link.now)
    assert link.progress.eta(link.now) is None
    link.run(SETTLED, 8 * MIB)
    assert link.eta_is_right(8 * MIB)


def test_holes_shorten_it_as_soon_as_they_are_seen() -> None:
    progress = Progress(SIZE, now=0.0)
    for number in range(10):  # a tenth of it looked up, half of that data
        progress.saw(10 * MIB, data=number % 2 == 0)
    assert progress.remaining() == SIZE // 2
    progress.saw(SIZE - 100 * MIB, data=False)
    assert progress.remaining() == 50 * MIB


def test_it_ends_at_zero() -> None:
    link = streaming()
    link.run(SIZE / (8 * MIB) * 1.2, 8 * MIB)
    assert link.progress.fetched >= SIZE
    assert Progress(0, now=0.0).eta(0.0) == 0
