# SPDX-License-Identifier: Apache-2.0
"""Who may send when: priorities, the window, the speed cap, and what is known of extents."""

import random
from itertools import pairwise

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdstream.backing import extentmap
from nbdstream.backing.base import Grant, Priority
from nbdstream.backing.connection import Timing
from nbdstream.backing.extentmap import ExtentMap
from nbdstream.backing.identity import sample_ranges
from nbdstream.backing.pacer import Pacer
from nbdstream.backing.scheduler import Flight, Sample, Scheduler
from nbdstream.backing.window import UNIT_LEAST, WINDOW_FIRST
from nbdstream.extents import BackingExtent

KIB = 1024


def begin(scheduler: Scheduler, length: int, priority: Priority, offset: int = 0) -> Flight:
    flight = scheduler.begin(offset, length, priority)
    scheduler.send(flight)
    return flight


def spend(scheduler: Scheduler, grant: Grant) -> Flight:
    flight = scheduler.begin(0, grant.length, grant.priority, grant)
    scheduler.send(flight)
    return flight


def land(scheduler: Scheduler, flight: Flight) -> None:
    now = trio.current_time()
    scheduler.end(flight, Timing(flight.began, now))


# --- the scheduler ----------------------------------------------------------------------


async def test_room_ends_with_the_window(autojump_clock: trio.testing.MockClock) -> None:
    scheduler = Scheduler(UNIT_LEAST)
    flights = []
    for _ in range(WINDOW_FIRST // UNIT_LEAST):
        with trio.fail_after(0.001):
            grant = await scheduler.wait_for_room(Priority.STREAM)
        flights.append(spend(scheduler, grant))
    with trio.move_on_after(10) as scope:
        await scheduler.wait_for_room(Priority.STREAM)
    assert scope.cancelled_caught
    land(scheduler, flights[0])
    with trio.fail_after(0.001):
        await scheduler.wait_for_room(Priority.STREAM)


async def test_demand_takes_the_place_of_background_reads(
    autojump_clock: trio.testing.MockClock,
) -> None:
    scheduler = Scheduler(UNIT_LEAST)
    one = begin(scheduler, UNIT_LEAST, Priority.STREAM)
    guest = begin(scheduler, WINDOW_FIRST, Priority.DEMAND)
    with trio.move_on_after(10) as scope:
        await scheduler.wait_for_room(Priority.STREAM)
    assert scope.cancelled_caught
    with trio.fail_after(0.001):
        await scheduler.wait_for_room(Priority.DEMAND)
    land(scheduler, guest)
    with trio.fail_after(0.001):
        await scheduler.wait_for_room(Priority.STREAM)
    land(scheduler, one)


async def test_however_busy_the_guest_one_unit_is_under_way(
    autojump_clock: trio.testing.MockClock,
) -> None:
    scheduler = Scheduler(UNIT_LEAST)
    begin(scheduler, 100 * WINDOW_FIRST, Priority.DEMAND)
    with trio.fail_after(0.001):
        grant = await scheduler.wait_for_room(Priority.STREAM)
    spend(scheduler, grant)
    with trio.move_on_after(10) as scope:
        await scheduler.wait_for_room(Priority.STREAM)
    assert scope.cancelled_caught


async def test_room_goes_by_priority_then_by_turn(autojump_clock: trio.testing.MockClock) -> None:
    scheduler = Scheduler(UNIT_LEAST)
    full = begin(scheduler, WINDOW_FIRST, Priority.STREAM)
    order: list[str] = []

    async def wait(name: str, priority: Priority) -> None:
        grant = await scheduler.wait_for_room(priority)
        order.append(name)
        spend(scheduler, grant)

    async with trio.open_nursery() as nursery:
        for name, priority in (
            ("stream", Priority.STREAM),
            ("prefetch", Priority.PREFETCH),
            ("readahead", Priority.READAHEAD),
            ("prefetch too", Priority.PREFETCH),
        ):
            nursery.start_soon(wait, name, priority)
            await trio.testing.wait_all_tasks_blocked()
        assert not order
        land(scheduler, full)
    assert order == ["readahead", "prefetch", "prefetch too", "stream"]


async def test_room_that_is_given_back_is_free_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    scheduler = Scheduler(UNIT_LEAST)
    grants = [
        await scheduler.wait_for_room(Priority.STREAM) for _ in range(WINDOW_FIRST // UNIT_LEAST)
    ]
    with trio.move_on_after(10) as scope:
        await scheduler.wait_for_room(Priority.STREAM)
    assert scope.cancelled_caught
    with grants[0]:
        pass
    grants[0].give_back()  # a second time changes nothing
    with trio.fail_after(0.001):
        await scheduler.wait_for_room(Priority.STREAM)
    with trio.move_on_after(10) as scope:
        await scheduler.wait_for_room(Priority.STREAM)
    assert scope.cancelled_caught


async def test_room_is_spent_by_the_class_that_holds_it_alone() -> None:
    scheduler = Scheduler(UNIT_LEAST)
    grant = await scheduler.wait_for_room(Priority.READAHEAD)
    with pytest.raises(ValueError, match="room for READAHEAD cannot carry STREAM"):
        grant.use(Priority.STREAM)
    # A read without a grant takes nothing from those that wait for theirs to begin.
    begin(scheduler, 1000, Priority.STREAM)
    assert scheduler._reserved == grant.length
    spend(scheduler, grant)
    assert scheduler._reserved == 0


async def test_a_cancelled_wait_holds_up_no_other(autojump_clock: trio.testing.MockClock) -> None:
    scheduler = Scheduler(UNIT_LEAST)
    full = begin(scheduler, WINDOW_FIRST, Priority.STREAM)
    with trio.move_on_after(1):
        await scheduler.wait_for_room(Priority.READAHEAD)
    land(scheduler, full)
    with trio.fail_after(0.001):
        await scheduler.wait_for_room(Priority.STREAM)


async def test_promotion_counts_as_demand() -> None:
    scheduler = Scheduler(UNIT_LEAST)
    first = begin(scheduler, 1000, Priority.STREAM, offset=0)
    second = begin(scheduler, 1000, Priority.STREAM, offset=1000)
    scheduler.promote(999, 1)
    land(scheduler, first)
    land(scheduler, second)
    assert scheduler.bytes[Priority.DEMAND] == 1000
    assert scheduler.bytes[Priority.STREAM] == 1000
    assert scheduler.in_flight == 0


async def test_a_trace_has_every_answered_read() -> None:
    scheduler = Scheduler(UNIT_LEAST)
    samples: list[Sample] = []
    scheduler.trace = samples.append
    land(scheduler, begin(scheduler, 5000, Priority.DEMAND))
    scheduler.end(begin(scheduler, 5000, Priority.STREAM), None)
    assert [(sample.priority, sample.length) for sample in samples] == [(Priority.DEMAND, 5000)]


async def test_the_speed_cap_holds_and_is_met(autojump_clock: trio.testing.MockClock) -> None:
    scheduler = Scheduler(UNIT_LEAST)
    speed = 3_000_000
    scheduler.set_speed(speed)
    sent: list[tuple[float, int]] = []
    async with trio.open_nursery() as nursery:

        async def answer(flight: Flight) -> None:
            await trio.sleep(0.01)
            land(scheduler, flight)

        while trio.current_time() < 20 or not sent:
            grant = await scheduler.wait_for_room(Priority.STREAM)
            sent.append((trio.current_time(), grant.length))
            nursery.start_soon(answer, spend(scheduler, grant))
            if len(sent) > 2000:
                break
    start, end = sent[0][0], sent[-1][0]
    assert sum(length for _, length in sent) >= 0.95 * speed * (end - start)
    for time, _ in sent:
        assert sum(length for other, length in sent if time <= other < time + 1) <= speed


async def test_lifting_the_cap_is_felt_at_once(autojump_clock: trio.testing.MockClock) -> None:
    scheduler = Scheduler(UNIT_LEAST)
    scheduler.set_speed(1000)
    begin(scheduler, 100_000, Priority.STREAM)  # a hundred seconds' worth

    async def lift() -> None:
        await trio.sleep(1)
        scheduler.set_speed(0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lift)
        with trio.fail_after(1.5):
            await scheduler.wait_for_room(Priority.STREAM)


# --- the pacer --------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(100_000, 10_000_000),
    st.lists(st.tuples(st.floats(0, 0.5), st.floats(0.001, 0.5)), min_size=1, max_size=60),
)
def test_no_second_carries_more_than_the_cap(speed: int, reads: list[tuple[float, float]]) -> None:
    pacer = Pacer()
    pacer.set_speed(speed)
    now, sent = 0.0, list[tuple[float, int]]()
    for pause, part in reads:
        length = int(part * speed)
        now = pacer.ready_at(now + pause, length)
        assert pacer.ready_at(now, length) == now
        pacer.spend(now, length)
        sent.append((now, length))
    for time, _ in sent:
        assert sum(length for other, length in sent if time <= other < time + 1) <= speed


def test_a_read_larger_than_the_cap_goes_out_alone_and_pays() -> None:
    pacer = Pacer()
    pacer.set_speed(1000)
    assert pacer.ready_at(0, 5000) == 0
    pacer.spend(0, 5000)
    assert pacer.ready_at(0.1, 5000) == pytest.approx(5)


# --- extents ----------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 60), st.booleans()), max_size=30),
    st.integers(0, 250),
    st.integers(1, 60),
)
def test_extents_are_remembered_as_a_plain_list_would(
    added: list[tuple[int, int, bool]], offset: int, length: int
) -> None:
    known, scale = ExtentMap(), 16 << 20  # some of them cross regions
    model: dict[int, bool] = {}
    for start, count, zero in added:
        known.add([BackingExtent(start * scale, count * scale, zero)])
        model.update(dict.fromkeys(range(start, start + count), zero))
    wanted = range(offset, offset + length)
    assert known.is_zero(offset * scale, length * scale) == all(
        model.get(one) is True for one in wanted
    )
    found = known.find(offset * scale, length * scale)
    flat = [
        (one, extent.zero)
        for extent in found
        for one in range(extent.offset // scale, extent.end // scale)
    ]
    expected = []
    for one in wanted:
        if one not in model:
            break
        expected.append((one, model[one]))
    assert flat == expected


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 20_000
    monkeypatch.setattr(extentmap, "LIMIT", limit)
    known = ExtentMap()
    for number in range(3 * limit):
        known.add([BackingExtent(number * 65536, 65536, bool(number % 2))])
    assert known._count <= limit
    assert known._count == sum(len(starts) for starts, _ in known._regions.values())
    last = (3 * limit - 1) * 65536
    assert known.is_zero(last, 65536) == bool((3 * limit - 1) % 2)


# --- identity ---------------------------------------------------------------------------


@given(st.integers(1, 1 << 50))
def test_samples_lie_within_the_image_and_apart(size: int) -> None:
    ranges = sample_ranges(size)
    assert ranges[0][0] == 0
    assert sum(ranges[-1]) == size
    for (offset, length), (following, _) in pairwise(ranges):
        assert length > 0
        assert offset + length <= following
    assert sum(length for _, length in ranges) <= 256 * KIB


def test_samples_depend_on_the_size_alone() -> None:
    random.seed(1)
    first = sample_ranges(10 << 30)
    random.seed(2)
    assert sample_ranges(10 << 30) == first
    assert len(first) == 18
