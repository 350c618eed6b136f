# SPDX-License-Identifier: Apache-2.0
"""The link emulator's model, exactly, on a clock of the test's own."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.link.model import SLAB_SIZE, Direction, Lane, LinkClock, Shape, Slab

MEGABIT = 1e6


def send(direction: Direction, lane: Lane, now: float, data: bytes) -> None:
    """`data` arrives from a socket at `now`, in one piece if the lane has space for it."""
    while data:
        space = lane.space(len(data))
        space[:] = data[: len(space)]
        direction.arrive(now, lane, *lane.received(len(space)))
        data = data[len(space) :]


def dues(lane: Lane) -> list[float]:
    return [chunk.due for chunk in lane.in_flight]


def test_chunks_leave_one_after_the_other_at_the_rate() -> None:
    direction, lane = Direction(Shape(rate=8000, delay=0.5)), Lane([])
    for _ in range(3):
        send(direction, lane, 10.0, bytes(100))
    direction.advance(11.0)
    assert dues(lane) == pytest.approx([10.6, 10.7, 10.8])


def test_an_idle_link_saves_nothing_up() -> None:
    direction, lane = Direction(Shape(rate=8000)), Lane([])
    send(direction, lane, 1.0, bytes(100))
    send(direction, lane, 5.0, bytes(100))
    assert dues(lane) == pytest.approx([1.1, 5.1])


def test_looking_late_changes_no_departure() -> None:
    shape = Shape(rate=8000, delay=0.01)
    often, seldom = Direction(shape), Direction(shape)
    lane_often, lane_seldom = Lane([]), Lane([])
    for size in (100, 7, 300, 1):
        send(often, lane_often, 1.0, bytes(size))
        send(seldom, lane_seldom, 1.0, bytes(size))
    for step in range(100):
        often.advance(1.0 + step / 100)
    seldom.advance(2.0)
    assert dues(lane_often) == pytest.approx(dues(lane_seldom))
    assert len(lane_often.in_flight) == 4


def test_all_connections_share_one_queue() -> None:
    direction, bulk, demand = Direction(Shape(rate=8000)), Lane([]), Lane([])
    for _ in range(10):
        send(direction, bulk, 0.0, bytes(100))
    send(direction, demand, 0.0, bytes(10))
    send(direction, bulk, 0.0, bytes(100))
    direction.advance(2.0)
    assert dues(demand) == pytest.approx([1.01])
    assert dues(bulk)[-1] == pytest.approx(1.11)


def test_a_new_rate_holds_for_what_still_waits() -> None:
    direction, lane = Direction(Shape(rate=8000)), Lane([])
    for _ in range(3):
        send(direction, lane, 0.0, bytes(100))
    direction.shape = Shape(rate=80000)
    direction.advance(1.0)
    assert dues(lane) == pytest.approx([0.1, 0.11, 0.12])


def test_jitter_delays_but_never_reorders() -> None:
    direction, lane = Direction(Shape(delay=0.1, jitter=0.05)), Lane([])
    sent = [index / 40 for index in range(200)]  # closer together than the jitter
    for now in sent:
        send(direction, lane, now, b"x")
    assert dues(lane) == sorted(dues(lane))
    late = [due - now for due, now in zip(dues(lane), sent, strict=True)]
    assert min(late) >= 0.1
    assert max(late) < 0.15
    assert max(late) - min(late) > 0.02


def test_queue_counts_what_waits_for_the_transmitter() -> None:
    direction, lane = Direction(Shape(rate=8000, queue=250)), Lane([])
    for _ in range(3):
        assert direction.has_room
        send(direction, lane, 0.0, bytes(125))  # the first is under transmission at once
    assert not direction.has_room
    assert direction.next_turn() == pytest.approx(0.125)
    direction.advance(0.126)
    assert direction.has_room
    assert direction.max_queued == 250


@given(
    st.lists(st.tuples(st.integers(1, SLAB_SIZE // 3), st.integers(0, SLAB_SIZE)), max_size=30),
    st.randoms(use_true_random=False),
)
def test_buffers_are_reused_and_lose_nothing(steps: list[tuple[int, int]], numbers: object) -> None:
    direction = Direction(Shape())
    spare: list[Slab] = []
    lanes = [Lane(spare), Lane(spare)]
    sent, got = [bytearray(), bytearray()], [bytearray(), bytearray()]
    assert isinstance(numbers, random.Random)

    def take(which: int, length: int) -> None:
        due = b"".join(bytes(chunk.data or b"") for chunk in lanes[which].in_flight)[:length]
        got[which] += due
        lanes[which].delivered(len(due))

    for size, taken in steps:
        which = numbers.randrange(2)
        pattern = numbers.randbytes(16) * (size // 16 + 1)
        sent[which] += pattern[:size]
        send(direction, lanes[which], 0.0, pattern[:size])
        take(numbers.randrange(2), taken)
    for which in (0, 1):
        take(which, len(sent[which]))
        assert got[which] == sent[which]
        assert lanes[which].buffered == 0


def test_the_clock_stands_still_during_a_stall() -> None:
    clock = LinkClock()
    clock.freeze(None)
    first = clock.now()
    time.sleep(0.01)
    assert clock.now() == first
    clock.thaw()
    assert first <= clock.now() < first + 5
    before = clock.now()
    clock.freeze(0.01)
    while clock.frozen:
        time.sleep(0.001)
        clock.now()
    assert before <= clock.now() < before + 5
