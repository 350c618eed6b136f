# SPDX-License-Identifier: Apache-2.0
"""Least delay and rate of rows of replies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.backing.measures import RATE_PERIOD, Lowest, RateMeter


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0, 1)), min_size=1, max_size=50))
def test_lowest_is_the_least_of_the_span(steps: list[tuple[float, float]]) -> None:
    lowest, now, seen = Lowest(), 0.0, list[tuple[float, float]]()
    for pause, sample in steps:
        now += pause
        seen.append((now, sample))
        lowest.add(now, sample, now - 3)
        assert lowest.least == min(value for time, value in seen if time >= now - 3)


def test_rate_is_the_best_of_two_periods_and_forgets() -> None:
    meter, now = RateMeter(0.0, 0.05), 0.0
    for rate, seconds in ((1e6, 2), (5e6, 2), (2e6, 3 * RATE_PERIOD)):
        end = now + seconds
        while now < end:
            now += 0.01
            meter.add(now, int(rate * 0.01), 0.0)
        assert meter.rate == pytest.approx(rate, rel=0.05)


def test_rate_leaves_idle_time_out() -> None:
    meter, now = RateMeter(0.0, 0.05), 0.0
    for _ in range(100):
        now += 0.01
        meter.add(now, 1000, 0.0)
        now += 5
        meter.idled(5)
    assert meter.rate == pytest.approx(100e3, rel=0.05)
    assert meter.spans >= 10


def test_a_burst_shorter_than_the_span_is_no_rate() -> None:
    meter = RateMeter(0.0, 0.05)
    assert not meter.add(0.001, 1 << 20, 0.0)
    assert not meter.add(0.06, 1 << 20, 0.1)  # nor one shorter than a round trip
    assert meter.rate == 0
    assert meter.add(0.1, 0, 0.1)
    assert meter.rate == pytest.approx(20 * (1 << 20))
