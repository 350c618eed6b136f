# SPDX-License-Identifier: Apache-2.0
"""--finish-in: the pace that it takes, and the truth when the link cannot do it."""

import logging
import math
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from nbdstream.disk import open_disk
from nbdstream.errors import BackingReadError
from nbdstream.qmp.protocol import DeviceNotActive, GenericError
from nbdstream.streamer.deadline import MEASURE_TIME, PACE_LEAST, Deadline
from nbdstream.streamer.job import StreamJob
from tests.control_room import DEVICE, ask, control_room
from tests.doubles import MemoryLeaf
from tests.far_backing import PacedBacking

MIB = 1 << 20
SIZE = 32 * MIB
CONTENT = random.Random(7).randbytes(SIZE)
RTT = 0.02


class SteadyJob:
    """A job with this much to do, on a link of this rate, seen at times that a test picks."""

    def __init__(self, remaining: int, link_rate: float) -> None:
        self.running = True
        self.remaining = remaining
        self.link_rate = link_rate
        self.rate = 0.0
        self.speed = 0
        self.pace = -1

    def set_pace(self, pace: int) -> None:
        self.pace = pace

    def work(self, seconds: float) -> None:
        """Go on as fast as the link, the pace and the cap let it."""
        if not self.running:
            return
        limits = [limit for limit in (self.pace, self.speed) if limit > 0]
        self.rate = min([self.link_rate, *limits])
        self.remaining = max(0, self.remaining - int(self.rate * seconds))


def due(*, in_seconds: int, link_rate: float, speed: int = 0) -> tuple[SteadyJob, Deadline]:
    """A job of 1000 MiB with a deadline. ``speed``: the user's cap."""
    job = SteadyJob(1000 * MIB, link_rate)
    job.speed = speed
    deadline = Deadline(job)
    deadline.set(in_seconds)
    return job, deadline


async def follow(job: SteadyJob, deadline: Deadline, seconds: int) -> None:
    for _ in range(seconds):
        job.work(1.0)
        await trio.sleep(1)
        deadline.look()


async def test_the_pace_follows_what_remains(autojump_clock: trio.testing.MockClock) -> None:
    job, deadline = due(in_seconds=1000, link_rate=100.0 * MIB)
    assert job.pace == 0  # the link is being measured
    await follow(job, deadline, math.ceil(MEASURE_TIME))
    assert MIB / 2 < job.pace < 1.06 * MIB
    assert deadline.needed < job.pace <= 1.06 * deadline.needed
    before = job.pace
    job.remaining += 1000 * MIB  # a scout finds more data than was thought
    await follow(job, deadline, 1)
    assert job.pace > 1.9 * before
    job.remaining = 10
    await follow(job, deadline, 1)
    assert job.pace == PACE_LEAST
    assert deadline.late == 0


async def test_it_is_met_and_not_long_before(autojump_clock: trio.testing.MockClock) -> None:
    job, deadline = due(in_seconds=1000, link_rate=100.0 * MIB)
    start = trio.current_time()
    while job.remaining:
        await follow(job, deadline, 1)
    assert 400 < trio.current_time() - start <= 1000
    assert deadline.late == 0


async def test_a_link_that_is_too_slow_is_known_within_seconds(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    job, deadline = due(in_seconds=1000, link_rate=0.9 * MIB)
    await follow(job, deadline, math.ceil(MEASURE_TIME) + 1)
    assert deadline.late == pytest.approx(1000 / 0.9 - 1000, rel=0.02)
    await follow(job, deadline, 100)
    assert len(caplog.records) == 1
    assert "cannot finish in 16m3" in caplog.text
    assert "that takes 1.0 MiB/s, there is 921.6 KiB/s: it will take 18m" in caplog.text


async def test_a_cap_that_is_too_low_is_named(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    job, deadline = due(in_seconds=1000, link_rate=100.0 * MIB, speed=MIB // 2)
    await follow(job, deadline, 5)
    assert deadline.late > 900
    assert "capped by --speed" in caplog.text
    with caplog.at_level(logging.INFO):
        job.speed = 0
        await follow(job, deadline, 2)
    assert deadline.late == 0
    assert "can be met again" in caplog.text


async def test_a_stall_is_late_without_a_number(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    job, deadline = due(in_seconds=1000, link_rate=10.0 * MIB)
    await follow(job, deadline, 20)
    assert deadline.late == 0
    job.link_rate = 0.0
    await follow(job, deadline, 10)
    assert deadline.late == math.inf
    assert "nothing comes" in caplog.text
    job.link_rate = 10.0 * MIB
    await follow(job, deadline, 2)
    assert deadline.late == 0


async def test_behind_the_deadline_it_goes_as_fast_as_it_can(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    job, deadline = due(in_seconds=50, link_rate=10.0 * MIB)
    await follow(job, deadline, 60)
    assert job.pace == 0
    assert deadline.left is not None and deadline.left < 0
    assert deadline.late == pytest.approx(50, abs=2)
    assert len(caplog.records) == 1
    # A deadline that is 0 seconds away cannot be met.
    caplog.clear()
    other = Deadline(job)
    other.set(0)
    await follow(job, other, 5)
    assert "missed its deadline" in caplog.text


async def test_a_paused_job_is_not_paced_and_not_judged(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    job, deadline = due(in_seconds=1000, link_rate=10.0 * MIB)
    await follow(job, deadline, 10)
    job.running = False
    await follow(job, deadline, 100)
    assert job.pace == 0 and caplog.records == []
    job.running = True
    await follow(job, deadline, 10)
    assert job.pace == pytest.approx(1.05 * job.remaining / 880, rel=0.02)
    deadline.set(None)
    assert job.pace == 0 and deadline.left is None and deadline.needed == 0


# -- with a real job ---------------------------------------------------------------------


@asynccontextmanager
async def streaming(rate: float) -> AsyncIterator[tuple[StreamJob, PacedBacking]]:
    leaf = MemoryLeaf(SIZE, block_size=64 << 10, cluster_size=64 << 10)
    backing = PacedBacking(CONTENT, rate=rate, rtt=RTT)
    async with open_disk(leaf, backing) as disk, trio.open_nursery() as nursery:
        job = StreamJob(disk, job_id="stream")
        nursery.start_soon(job.run)
        nursery.start_soon(job.deadline.run)
        yield job, backing
        await job.completed.wait()
        nursery.cancel_scope.cancel()
    leaf.close()


async def all_fetched(job: StreamJob) -> float:
    """The time when the last byte is there. What follows is a flush, in a worker thread: while
    that runs, nothing holds virtual time back."""
    while job.remaining:  # noqa: ASYNC110
        await trio.sleep(0.1)
    return trio.current_time()


async def test_a_job_takes_the_time_that_it_may(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with streaming(rate=4.0 * MIB) as (job, _backing):
        start = trio.current_time()
        job.start()
        job.deadline.set(60)
        assert 45 < await all_fetched(job) - start <= 60
        assert caplog.records == []


async def test_a_job_says_at_once_that_the_link_is_too_slow(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with streaming(rate=float(MIB)) as (job, _backing):
        start = trio.current_time()
        job.start()
        job.deadline.set(20)
        await trio.sleep(MEASURE_TIME + 1.5)
        assert len(caplog.records) == 1 and "cannot finish in" in caplog.text
        assert job.deadline.late == pytest.approx(12, abs=2)
        assert 32 <= await all_fetched(job) - start < 34


async def test_the_cap_of_the_user_stays_a_cap(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with streaming(rate=10.0 * MIB) as (job, backing):
        job.set_speed(MIB)
        job.start()
        job.deadline.set(10)
        await trio.sleep(5)
        assert backing.speed == MIB and job.speed == MIB
        job.deadline.set(1000)
        await trio.sleep(5)
        assert PACE_LEAST <= backing.speed < MIB and job.speed == MIB
        job.deadline.set(None)
        assert backing.speed == MIB
        job.set_speed(0)
        assert backing.speed == 0


async def test_a_backing_that_is_lost_and_comes_back(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with streaming(rate=4.0 * MIB) as (job, backing):
        job.start()
        job.deadline.set(60)
        await trio.sleep(20)
        backing.error = BackingReadError("gone")
        await trio.sleep(12)
        assert job.deadline.late == math.inf
        assert "cannot finish" in caplog.text
        backing.error = None
        start = trio.current_time()
        assert await all_fetched(job) - start <= 29
        assert job.deadline.late == 0


# -- on the control socket ---------------------------------------------------------------


async def test_a_deadline_is_set_by_command_and_told_in_the_statistics(tmp_path: Path) -> None:
    async with control_room(tmp_path, gated=True) as room:
        with pytest.raises(DeviceNotActive):
            await ask(room, "x-nbdstream-finish-in", device=DEVICE, seconds=60)
        await ask(room, "block-stream", device=DEVICE)
        assert "finish-in" not in (await ask(room, "x-nbdstream-stats"))["job"]
        with pytest.raises(GenericError, match="non-negative"):
            await ask(room, "x-nbdstream-finish-in", device=DEVICE, seconds=-1)
        await ask(room, "x-nbdstream-finish-in", device=DEVICE, seconds=60)
        told = (await ask(room, "x-nbdstream-stats"))["job"]["finish-in"]
        assert 50 < told["left"] <= 60
        assert told["speed"] == pytest.approx(room.stream.remaining / told["left"], rel=0.05)
        assert told["on-time"] is True and "late" not in told
        room.stream.deadline.late = 12.5
        told = (await ask(room, "x-nbdstream-stats"))["job"]["finish-in"]
        assert told["on-time"] is False and told["late"] == 12.5
        room.stream.deadline.late = math.inf  # JSON has no word for it
        told = (await ask(room, "x-nbdstream-stats"))["job"]["finish-in"]
        assert told["on-time"] is False and "late" not in told
        await ask(room, "x-nbdstream-finish-by", device=DEVICE, seconds=30)  # the old name
        told = (await ask(room, "x-nbdstream-stats"))["job"]
        assert 20 < told["finish-by"]["left"] <= 30 and told["finish-by"] == told["finish-in"]
        await ask(room, "x-nbdstream-finish-in", device=DEVICE)
        assert "finish-in" not in (await ask(room, "x-nbdstream-stats"))["job"]
