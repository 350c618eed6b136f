# SPDX-License-Identifier: Apache-2.0
"""The window against a simulated link: finds it, fills it, shares it, follows it."""

import heapq
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nbdstream.backing.window import UNIT_LEAST, UNIT_MOST, WINDOW_LEAST, WINDOW_MOST, Sent, Window

MIB = 1 << 20
MBIT = 1e6 / 8


@dataclass
class Flow:
    """A client of the link: one window that always has more to send."""

    window: Window
    start: float = 0.0
    in_flight: int = 0
    delivered: list[tuple[float, int]] = field(default_factory=list)
    demand: list[float] = field(default_factory=list)

    def bytes_between(self, first: float, last: float) -> int:
        return sum(length for time, length in self.delivered if first <= time < last)

    def rate(self, first: float, last: float) -> float:
        return self.bytes_between(first, last) / (last - first)


class Link:
    """A FIFO queue in front of a transmitter, then a delay; requests take half of it.

    ``rate`` (bytes per second) and ``delay`` (round trip, seconds) may be changed between
    runs; up to ``jitter`` seconds are added to each reply's time.
    """

    def __init__(self, rate: float, delay: float, *, jitter: float = 0.0, seed: int = 0) -> None:
        self.rate, self.delay, self.jitter = rate, delay, jitter
        self.now = 0.0
        self._free_at = 0.0
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, object]] = []
        self._count = 0
        self.flows: list[Flow] = []

    def add(self, start: float = 0.0) -> Flow:
        flow = Flow(Window(rng=random.Random(len(self.flows) + 1)), start)
        self.flows.append(flow)
        self._at(start, flow)
        return flow

    def _at(self, time: float, what: object) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, what))

    @property
    def queue(self) -> float:
        """Seconds that a request sent now would wait for the transmitter."""
        return max(self._free_at - self.now - self.delay / 2, 0.0)

    def _transmit(self, length: int) -> float:
        """When a reply of ``length``, asked for now, is there in full."""
        start = max(self.now + self.delay / 2, self._free_at)
        self._free_at = start + length / self.rate
        return self._free_at + self.delay / 2 + self._random.random() * self.jitter

    def _fill(self, flow: Flow) -> None:
        window = flow.window
        while flow.in_flight == 0 or flow.in_flight + window.unit <= window.size:
            length = window.unit
            flow.in_flight += length
            sent = window.sent(self.now, length)
            self._at(self._transmit(length), (flow, sent))

    def demand(self, flow: Flow, length: int = 64 << 10) -> None:
        """A guest of this flow reads, now."""
        sent = flow.window.sent(self.now, length, background=False)
        flow.in_flight += length
        self._at(self._transmit(length), (flow, sent, "demand"))

    def demand_only(self, flow: Flow, length: int = 64 << 10) -> None:
        """A guest reads while nothing is streamed."""
        done = self._transmit(length)
        flow.demand.append(done - self.now)

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            if isinstance(what, Flow):
                self._fill(what)
                continue
            assert isinstance(what, tuple)
            flow, sent, *kind = what
            flow.in_flight -= sent.length
            flow.window.delivered(sent, self.now, limited=True)
            if kind:
                flow.demand.append(self.now - sent.time)
            else:
                flow.delivered.append((self.now, sent.length))
            self._fill(flow)
        self.now = until


LINKS = [
    pytest.param(rate, delay, id=f"{rate / MBIT:g}Mbit-{delay * 1000:g}ms")
    for rate in (10 * MBIT, 100 * MBIT, 1000 * MBIT)
    for delay in (0.001, 0.02, 0.2)
]


@pytest.mark.parametrize(("rate", "delay"), LINKS)
def test_fills_the_link_within_seconds_and_keeps_the_queue_short(rate: float, delay: float) -> None:
    link = Link(rate, delay)
    flow = link.add()
    link.run(30)
    assert flow.rate(4, 30) >= 0.85 * rate
    assert flow.rate(0, 4) >= 0.5 * rate
    # What a guest's read would wait: sampled over time, without the read's own length.
    waits: list[float] = []
    for step in range(400):
        link.run(30 + step * 0.0501)
        waits.append(link.queue)
    unit = flow.window.unit / rate
    assert sorted(waits)[int(len(waits) * 0.95)] <= 2 * flow.window.target + 3 * unit


def test_demand_hardly_waits_and_the_link_stays_in_use() -> None:
    rate, delay = 100 * MBIT, 0.02
    link = Link(rate, delay, jitter=0.0005)
    flow = link.add()
    link.run(5)
    random_times = random.Random(3)
    time, count = 5.0, 0
    while time < 65:
        time += random_times.expovariate(20)
        link.run(time)
        link.demand(flow)
        count += 1
    link.run(66)
    used = flow.bytes_between(5, 65) + count * (64 << 10)
    assert used >= 0.94 * rate * 60
    # What the same reads cost on an idle link.
    alone = Link(rate, delay, jitter=0.0005)
    idle = Flow(Window())
    random_times = random.Random(3)
    time = 0.0
    while time < 60:
        time += random_times.expovariate(20)
        alone.run(time)
        alone.demand_only(idle)
    alone.run(61)
    assert percentile(flow.demand, 0.99) <= 1.5 * percentile(idle.demand, 0.99)


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[int(len(values) * part)]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("delay", [0.005, 0.05])
def test_flows_share_fairly_also_those_that_come_late(count: int, delay: float) -> None:
    rate, indexes = 100 * MBIT, []
    for seed in range(5):
        link = Link(rate, delay, jitter=0.0005, seed=seed)
        flows = [link.add(start=10.0 * number) for number in range(count)]
        link.run(180)
        rates = [flow.rate(60, 180) for flow in flows]
        assert sum(rates) >= 0.93 * rate
        # Jain's index: 1 is equal shares, 1 / count is one flow taking all.
        indexes.append(sum(rates) ** 2 / (count * sum(one * one for one in rates)))
    assert sorted(indexes)[2] >= 0.9, indexes


@pytest.mark.parametrize(("before", "after"), [(20, 200), (200, 20)])
def test_follows_a_change_of_rate(before: int, after: int) -> None:
    link = Link(before * MBIT, 0.03)
    flow = link.add()
    link.run(20)
    link.rate = after * MBIT
    link.run(40)
    assert flow.rate(24, 40) >= 0.9 * after * MBIT
    assert link.queue <= 2 * flow.window.target + 2 * flow.window.unit / link.rate


@pytest.mark.parametrize(("before", "after"), [(0.01, 0.1), (0.1, 0.01)])
def test_follows_a_change_of_delay(before: float, after: float) -> None:
    rate = 100 * MBIT
    link = Link(rate, before)
    flow = link.add()
    link.run(20)
    link.delay = after
    link.run(60)
    assert flow.rate(28, 60) >= 0.83 * rate
    assert link.queue <= 2 * flow.window.target + 2 * flow.window.unit / rate
    assert flow.window.base_rtt <= after + 2 * flow.window.unit / rate


def test_a_stall_of_the_link_is_no_reason_to_slow_down_afterwards() -> None:
    rate = 100 * MBIT
    link = Link(rate, 0.02)
    flow = link.add()
    link.run(10)
    link._free_at += 5  # nothing comes for five seconds
    link.run(40)
    assert flow.rate(16, 40) >= 0.93 * rate


def test_jitter_does_not_starve_it() -> None:
    rate = 100 * MBIT
    link = Link(rate, 0.03, jitter=0.02)
    flow = link.add()
    link.run(40)
    assert flow.rate(5, 40) >= 0.9 * rate


@pytest.mark.parametrize("guest", [False, True])
@pytest.mark.parametrize("rate", [100 * MBIT, 1000 * MBIT])
@pytest.mark.parametrize(("delay", "jitter"), [(0.0005, 0.05), (0.02, 0.2), (0.005, 0.2)])
def test_servers_that_answer_at_random_times_do_not_starve_it(
    rate: float, delay: float, jitter: float, guest: bool
) -> None:
    """Spinning disks, object stores: what a reply took says little about any queue."""
    link = Link(rate, delay, jitter=jitter)
    flow = link.add()
    link.run(4)
    for step in range(160 if guest else 0):
        link.run(4 + step * 0.1)
        link.demand(flow)
    link.run(20)
    assert flow.rate(4, 20) >= (0.5 if guest else 0.8) * rate


def test_does_not_grow_on_the_strength_of_what_is_not_used() -> None:
    window = Window(rng=random.Random(1))
    now = 0.0
    for _ in range(1000):
        sent = window.sent(now, window.unit)
        now += 0.01
        window.delivered(sent, now, limited=False)
    assert window.size <= 4 * UNIT_LEAST


def test_replies_that_take_no_time_at_all_do_no_harm() -> None:
    """A coarse clock may say so."""
    window, now = Window(rng=random.Random(1)), 0.0
    for _ in range(2000):
        window.delivered(window.sent(now, window.unit), now, limited=True)
        now += 0.001
    assert window.size >= WINDOW_LEAST


def test_replies_that_are_noticed_late_hold_no_trial_up() -> None:
    """A busy event loop sends before it notices replies that came earlier. What is in flight when
    a trial begins may then have been sent after the time at which it begins."""
    window = Window(rng=random.Random(1))
    late, step = 0.002, 0.0002
    in_flight: list[Sent] = []
    now = 1.0
    for _ in range(10_000):
        now += step
        while len(in_flight) < 4:
            in_flight.append(window.sent(now, window.unit))
        window.delivered(in_flight.pop(0), now - late, limited=False)
    assert window.unit >= 8 * UNIT_LEAST


def test_one_read_at_a_time_has_a_rate_too() -> None:
    window = Window(rng=random.Random(1))
    now = 0.0
    for _ in range(5000):
        sent = window.sent(now, UNIT_LEAST)
        now += 0.0002
        window.delivered(sent, now, limited=False)
        now += 0.1  # idle time is not counted
    assert window.rate == pytest.approx(UNIT_LEAST / 0.0002, rel=0.01)


def test_a_link_without_rate_or_delay_is_given_large_units() -> None:
    link = Link(1e9, 0.0001)
    flow = link.add()
    link.run(5)
    assert flow.rate(1, 5) >= 0.95e9
    assert flow.window.unit >= UNIT_MOST // 2


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(1 * MBIT, 8000 * MBIT),
    delay=st.floats(0.00005, 0.3),
    jitter=st.floats(0, 0.2),
)
@example(rate=1 * MBIT, delay=0.25, jitter=0.0)
@example(rate=5600 * MBIT, delay=0.19, jitter=0.0)
def test_uses_any_link(rate: float, delay: float, jitter: float) -> None:
    link = Link(rate, delay, jitter=jitter)
    flow = link.add()
    link.run(12)
    # What the largest window can use of it.
    possible = min(rate, WINDOW_MOST / (delay + jitter / 2))
    assert flow.rate(6, 12) >= 0.65 * possible


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 3, allow_nan=False),
            st.sampled_from(["send", "deliver", "lose"]),
            st.integers(1, 4 * MIB),
            st.booleans(),
            st.booleans(),
        ),
        max_size=200,
    )
)
def test_whatever_happens_the_window_stays_sane(
    events: list[tuple[float, str, int, bool, bool]],
) -> None:
    window = Window(rng=random.Random(1))
    now, out = 0.0, list[Sent]()
    for pause, what, number, background, limited in events:
        now += pause
        if what == "send":
            out.append(window.sent(now, number, background=background))
        elif out:
            sent = out.pop(number % len(out))
            if what == "lose":
                window.lost(sent)
            else:
                window.delivered(sent, now, limited=limited)
        assert WINDOW_LEAST <= window.size <= WINDOW_MOST
        assert UNIT_LEAST <= window.unit <= UNIT_MOST
        assert window.unit & (window.unit - 1) == 0
        assert 0 <= window.rate < float("inf")
        assert 0 <= window.base_rtt < float("inf")
        assert 0 <= window.queue_delay < float("inf")
