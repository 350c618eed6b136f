# SPDX-License-Identifier: Apache-2.0
"""Least delay, mean delay and rate of rows of replies; what a guest's reads take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.backing.window.demand import DemandGauge
from nbdstream.backing.window.measures import RATE_PERIOD, Lowest, RateMeter, Row


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


def test_the_error_of_a_mean_is_small_where_samples_rise_slowly() -> None:
    rising, jumping = Row(), Row()
    for number in range(16):
        rising.add(1 + number / 16)
        jumping.add(1.5 + 0.5 * (-1) ** number)
    assert rising.mean == pytest.approx(1.47, rel=0.01)
    assert jumping.mean == pytest.approx(1.5)
    assert jumping.spread == pytest.approx(1.0)
    assert jumping.error == pytest.approx(0.25)
    assert rising.error < jumping.error / 10


def usual_reads(gauge: DemandGauge) -> None:
    """Reads of 20 ms, one millisecond more or less, and their transmission."""
    for number in range(50):
        gauge.answered(number, number + 0.02 + 0.001 * (-1) ** number + 0.005, 0.005)


def test_reads_that_an_experiment_makes_late_are_hurt() -> None:
    gauge = DemandGauge()
    usual_reads(gauge)
    gauge.try_more(50.0)
    gauge.answered(49.99, 50.05, 0.005)  # sent before
    assert not gauge.is_hurt
    gauge.answered(50.0, 50.025, 0.004)  # as usual
    assert not gauge.is_hurt
    gauge.answered(50.01, 50.055, 0.005)
    assert gauge.is_hurt


def test_large_reads_and_late_ones_of_steady_times_are_not_hurt() -> None:
    gauge = DemandGauge()
    usual_reads(gauge)
    gauge.answered(50.0, 50.06, 0.005)
    gauge.try_more(51.0)
    gauge.answered(51.0, 51.1, 0.08)
    assert not gauge.is_hurt
    gauge.be_usual()
    gauge.answered(52.0, 52.06, 0.005)
    assert gauge.usual > 0.02
