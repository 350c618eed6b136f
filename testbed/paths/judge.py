# SPDX-License-Identifier: Apache-2.0
"""What a controller has to reach on a scenario, and whether it does.

The oracle is the best fixed window and unit, found by search over powers of two. Without a
guest it is the one that delivers most. With one, it is the one that delivers most of those
with which the guest's reads are as fast as they have to be; if there is none, the one
with which they are fastest, and a controller may be a fifth slower than that.
"""

from dataclasses import dataclass

from nbdstream.backing.window import UNIT_LEAST, UNIT_MOST, WINDOW_LEAST, WINDOW_MOST
from testbed.paths.client import STEP, Controller, FixedWindow
from testbed.paths.scenario import Run, Scenario, idle_run, percentile

# Rate, as a part of the oracle's.
ALONE_LEAST, GUEST_LEAST = 0.9, 0.75
# Demand latency: so many times idle, and one unit's time.
LATENCY_MOST = 1.5
LATENCY_SLACK = 1.2
LATENCY_FLOOR = 0.001
# No stretch of so many seconds with less than this part of the oracle's in the same time.
STRETCH, STRETCH_LEAST = 2.0, 0.25
# Start-up is judged by its own tests: no stretch begins before the first, and rates and
# latencies count from the second on.
STARTED, SETTLED = 1.0, 2.0
QUANTILE = 0.95
# Fewer reads than this have no 95th percentile to speak of.
READS_LEAST = 20

SIZES = [1 << n for n in range(WINDOW_LEAST.bit_length() - 1, WINDOW_MOST.bit_length())]
UNITS = [UNIT_LEAST, 4 * UNIT_LEAST, UNIT_MOST]


@dataclass(frozen=True)
class Oracle:
    """The best fixed window. ``latency``: what the guest's reads may take, at the 95th
    percentile, without a unit's time."""

    run: Run
    rate: float
    latency: float | None


@dataclass(frozen=True)
class Verdict:
    """How a controller did: figures as parts of what they have to be, 1 or more is good."""

    rate: float
    stretch: float
    latency: float

    @property
    def worst(self) -> float:
        return min(self.rate, self.stretch, self.latency)


def rate_of(run: Run, scenario: Scenario) -> float:
    """Bytes per second once it has settled."""
    delivered = run.client.bytes_between(SETTLED, scenario.seconds)
    return delivered / (scenario.seconds - SETTLED)


def unit_time(run: Run, scenario: Scenario) -> float:
    """What one unit of the background takes on the link, at its slowest."""
    rate = min([scenario.rate] + [rate for _, rate, _ in scenario.changes])
    return run.client.largest_unit / rate


def latency_of(run: Run) -> float | None:
    """The 95th percentile of the guest's reads, if there were enough."""
    latencies = run.latencies(SETTLED)
    return percentile(latencies, QUANTILE) if len(latencies) >= READS_LEAST else None


def find_oracle(scenario: Scenario) -> Oracle:
    """Search for the best fixed window."""
    idle = latency_of(idle_run(scenario)) if scenario.guest else None
    if idle is None:
        runs = [Run(scenario, FixedWindow(WINDOW_MOST, unit)) for unit in UNITS]
        best = max(runs, key=lambda run: rate_of(run, scenario))
        return Oracle(best, rate_of(best, scenario), None)
    limit = LATENCY_MOST * idle + LATENCY_FLOOR
    good: list[Run] = []
    bad: list[tuple[float, Run]] = []
    for unit in UNITS:
        low, high = 0, len(SIZES)  # the largest size that is good lies below ``high``
        while low < high:
            middle = (low + high) // 2
            run = Run(scenario, FixedWindow(SIZES[middle], unit))
            latency = latency_of(run)
            if latency is not None and latency <= limit + unit_time(run, scenario):
                good.append(run)
                low = middle + 1
            else:
                bad.append((latency or float("inf"), run))
                high = middle
    if good:
        best = max(good, key=lambda run: rate_of(run, scenario))
        return Oracle(best, rate_of(best, scenario), limit)
    latency, best = min(bad, key=lambda pair: pair[0])
    return Oracle(best, rate_of(best, scenario), LATENCY_SLACK * latency)


def judge(scenario: Scenario, oracle: Oracle, window: Controller) -> tuple[Verdict, Run]:
    """Run a controller on the scenario and compare it with the oracle."""
    run = Run(scenario, window)
    least = GUEST_LEAST if scenario.guest else ALONE_LEAST
    rate = rate_of(run, scenario) / max(least * oracle.rate, 1)
    latency = 1.0
    seen = latency_of(run)
    if oracle.latency is not None and seen is not None:
        latency = (oracle.latency + unit_time(run, scenario)) / seen
    return Verdict(rate, _worst_stretch(run, oracle.run, scenario), latency), run


def _worst_stretch(run: Run, other: Run, scenario: Scenario) -> float:
    """The least of what was delivered in any stretch, as a part of what has to be."""
    worst, count = 10.0, round(STRETCH / STEP)
    steps = round(scenario.seconds / STEP)
    for first in range(round(STARTED / STEP), steps - count + 1):
        begin, end = first * STEP, (first + count) * STEP
        if any(begin < last and start < end for start, last in scenario.disturbed):
            continue
        given = other.client.bytes_between(begin, end)
        got = run.client.bytes_between(begin, end)
        # A unit more or less is no stretch.
        worst = min(worst, (got + UNIT_MOST / 4) / max(STRETCH_LEAST * given, 1))
    return worst
