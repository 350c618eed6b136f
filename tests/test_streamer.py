# SPDX-License-Identifier: Apache-2.0
"""The stream job over a steerable backing and leaf: states, events, errors, progress."""

import errno
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from nbdstream.backing.base import Priority
from nbdstream.disk import StreamedDisk, open_disk
from nbdstream.errors import (
    BackingMismatchError,
    BackingReadError,
    LeafError,
    LeafFormatError,
    VerificationError,
)
from nbdstream.leaf.base import State
from nbdstream.streamer.job import JobStatus, StreamJob
from nbdstream.streamer.progress import Progress
from tests.doubles import GatedBacking, MemoryLeaf
from tests.small_disk import CONTENT, SIZE


class Run:
    """A job that runs over doubles, and the events it has sent."""

    def __init__(self, leaf: MemoryLeaf, backing: GatedBacking, disk: StreamedDisk) -> None:
        self.leaf = leaf
        self.backing = backing
        self.disk = disk
        self.job = StreamJob(disk, job_id="stream")
        self.events: list[tuple[str, Mapping[str, object]]] = []
        self.job.on_event(lambda name, data: self.events.append((name, data)))

    def names(self) -> list[str]:
        """Events in short: status changes by the status, the others by their name."""
        return [
            str(data["status"]) if name == "JOB_STATUS_CHANGE" else name
            for name, data in self.events
        ]


@asynccontextmanager
async def running_job(*, gated: bool = False) -> AsyncIterator[Run]:
    leaf = MemoryLeaf(SIZE)
    backing = GatedBacking(CONTENT, gated=gated)
    async with open_disk(leaf, backing) as disk, trio.open_nursery() as nursery:
        run = Run(leaf, backing, disk)
        nursery.start_soon(run.job.run)
        yield run
        nursery.cancel_scope.cancel()
    leaf.close()


async def content(disk: StreamedDisk) -> bytes:
    data = bytearray(SIZE)
    await disk.read(memoryview(data), 0)
    return bytes(data)


async def test_it_makes_everything_local_and_drops_the_backing() -> None:
    async with running_job() as run:
        run.job.start()
        await run.job.completed.wait()
        assert run.leaf.backing is None and run.disk.backing is None
        assert run.backing.fetched_twice() == []
        assert run.job.offset == run.job.length == SIZE
        assert run.job.remaining == 0
        assert await content(run.disk) == CONTENT
        assert run.names() == [
            "created",
            "running",
            "waiting",
            "pending",
            "BLOCK_JOB_COMPLETED",
            "concluded",
            "null",
        ]
        assert run.events[4][1] == {
            "type": "stream",
            "device": "stream",
            "len": SIZE,
            "offset": SIZE,
            "speed": 0,
        }
        with pytest.raises(ValueError, match="local already"):
            run.job.start()


async def test_units_are_whole_clusters_within_the_room_that_was_granted() -> None:
    async with running_job() as run:
        run.backing.room = 5000
        run.job.start()
        await run.job.completed.wait()
        assert {read.length for read in run.backing.reads[:-1]} <= {4096, SIZE % 2048}
        assert all(read.offset % 2048 == 0 for read in run.backing.reads)
    async with running_job() as run:
        run.backing.room = 1  # never below a cluster
        run.job.start()
        await run.job.completed.wait()
        assert {read.length for read in run.backing.reads} == {2048, SIZE % 2048}


async def test_holes_become_zeroes_without_any_transfer() -> None:
    async with running_job() as run:
        run.backing.content = CONTENT[:5000] + bytes(20000) + CONTENT[25000:]
        run.backing.holes = [(5000, 20000)]
        run.job.start()
        await run.job.completed.wait()
        assert all(r.offset + r.length <= 6144 or r.offset >= 24576 for r in run.backing.reads)
        assert run.leaf.states[5632 // 512] is State.ZERO
        assert await content(run.disk) == run.backing.content


async def test_holes_smaller_than_a_block_are_just_data() -> None:
    async with running_job() as run:
        run.backing.content = bytes(100) + CONTENT[100:600] + bytes(50) + CONTENT[650:]
        run.backing.holes = [(0, 100), (600, 50)]
        run.job.start()
        await run.job.completed.wait()
        assert await content(run.disk) == run.backing.content


async def test_what_is_local_is_not_fetched_again() -> None:
    async with running_job() as run:
        await run.disk.populate(0, 16384, Priority.DEMAND)
        await run.disk.trim(20480, 4096, fua=False)
        run.backing.reads.clear()
        run.job.start()
        await run.job.completed.wait()
        assert all(
            read.offset >= 16384 and not 20480 <= read.offset < 24576 for read in run.backing.reads
        )


async def test_pause_lets_what_is_under_way_arrive_and_sends_nothing_more() -> None:
    async with running_job(gated=True) as run:
        run.backing.room = 2048
        run.job.start()
        await trio.testing.wait_all_tasks_blocked()
        run.job.pause()
        sent = len(run.backing.reads)
        for read in run.backing.reads:
            read.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert len(run.backing.reads) == sent
        assert run.job.status is JobStatus.PAUSED
        run.backing.gated = False
        run.job.resume()
        await run.job.completed.wait()


async def test_cancel_keeps_what_is_local_and_the_job_can_be_started_again() -> None:
    async with running_job() as run:
        await run.disk.populate(0, 4096, Priority.DEMAND)
        run.backing.gated = True
        run.job.start()
        await trio.testing.wait_all_tasks_blocked()
        run.job.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert run.names()[2:] == ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
        assert run.leaf.backing is not None
        assert run.leaf.states[0] is State.DATA
        run.backing.gated = False
        for read in run.backing.waiting:
            read.gate.set()
        run.job.start()
        await run.job.completed.wait()


async def test_a_full_disk_pauses_the_job_until_it_is_resumed() -> None:
    async with running_job() as run:
        run.leaf.store_error = OSError(errno.ENOSPC, "no space left")
        run.job.start()
        await trio.testing.wait_all_tasks_blocked()
        assert run.job.status is JobStatus.PAUSED
        assert run.job.io_status == "nospace"
        assert "no space left" in run.job.error
        assert run.names().count("BLOCK_JOB_ERROR") == 1
        run.leaf.store_error = None
        run.job.resume()
        assert run.job.io_status == "ok"
        await run.job.completed.wait()
        assert await content(run.disk) == CONTENT


async def test_a_lost_backing_is_waited_for(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_job() as run:
        run.backing.error = BackingReadError("gone")
        run.job.start()
        await trio.sleep(30)
        assert run.job.status is JobStatus.RUNNING
        assert run.job.offset == 0
        run.backing.error = None
        await run.job.completed.wait()
        assert await content(run.disk) == CONTENT
    assert caplog.text.count("retrying") == 1  # not for each unit, nor each attempt


@pytest.mark.parametrize(
    "error", [BackingMismatchError("another image"), VerificationError("a changed block")]
)
async def test_another_backing_stops_the_job(
    error: BackingMismatchError, autojump_clock: trio.testing.MockClock
) -> None:
    async with running_job() as run:
        run.backing.error = error  # type: ignore[assignment]
        run.job.start()
        await trio.sleep(30)
        assert run.job.status is JobStatus.PAUSED
        assert run.job.io_status == "failed"
        assert State.DATA not in run.leaf.states


@pytest.mark.parametrize(
    "error",
    [
        LeafFormatError("entry 7 of the L2 table is damaged"),
        OSError(errno.EIO, "input/output error"),
        RuntimeError("can't start new thread"),
    ],
    ids=["damaged", "EIO", "bug"],
)
@pytest.mark.parametrize("where", ["next_unallocated", "next_unit", "fill_zero"])
async def test_trouble_with_the_leaf_pauses_the_job_and_ends_nothing_else(
    error: Exception, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LeafError used to leave the scout, and with it the nursery of the whole server."""
    async with running_job() as run:
        run.backing.holes = [(2048, 2048)]
        healthy = getattr(run.disk, where)
        broken = True

        async def fail(*args: object) -> object:
            await trio.lowlevel.checkpoint()
            if broken:
                raise error
            return await healthy(*args)

        monkeypatch.setattr(run.disk, where, fail)
        run.job.start()
        await trio.testing.wait_all_tasks_blocked()
        assert run.job.status is JobStatus.PAUSED
        assert run.job.io_status == "failed"
        assert str(error) in run.job.error
        assert run.names().count("BLOCK_JOB_ERROR") == 1
        await run.disk.write(memoryview(b"w" * 512), 0, fua=True)  # guests go on
        broken = False
        run.job.resume()
        with trio.fail_after(5):
            await run.job.completed.wait()


async def test_a_job_that_is_paused_by_trouble_can_be_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_job() as run:

        async def fail(*_args: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(run.disk, "next_unallocated", fail)
        run.job.start()
        await trio.testing.wait_all_tasks_blocked()
        assert run.job.status is JobStatus.PAUSED
        run.job.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert run.names()[-1] == "null"


async def test_a_disk_that_cannot_complete_ends_the_job_with_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_job() as run:

        def refuse() -> None:
            raise LeafError("not all of it is allocated")

        ended = trio.Event()

        def note_the_end(_name: str, data: Mapping[str, object]) -> None:
            if data.get("status") == JobStatus.NULL.value:
                ended.set()

        monkeypatch.setattr(run.leaf, "drop_backing", refuse)
        run.job.on_event(note_the_end)
        run.job.start()
        with trio.fail_after(10):
            await ended.wait()
        assert "not all of it" in run.job.error
        assert not run.job.completed.is_set() and run.disk.backing is not None


async def test_one_step_by_hand() -> None:
    async with running_job() as run:
        assert await run.job.step(700, 1) == 2048
        assert await run.job.step(700, 1) == 0
        assert await run.job.step(SIZE - 1, 1) == SIZE % 2048
        assert [(r.offset, r.length) for r in run.backing.reads] == [
            (0, 2048),
            (SIZE - SIZE % 2048, SIZE % 2048),
        ]


async def test_the_speed_cap_reaches_the_backing() -> None:
    async with running_job() as run:
        run.job.set_speed(1 << 20)
        assert run.backing.speed == 1 << 20
        assert run.job.speed == 1 << 20


def test_progress_estimates_from_what_crosses_the_link() -> None:
    progress = Progress(1000, now=0.0)
    assert progress.eta(0.0) is None
    progress.saw(500, data=False)
    progress.saw(400, data=True)
    assert progress.settled == 500
    progress.got(100, 1.0)
    assert progress.rate(2.0) == pytest.approx(50)
    # 300 known to come, and of the 100 unseen as large a part as so far.
    assert progress.remaining() == 300 + 100 * 400 // 900
    assert progress.eta(2.0) == pytest.approx((300 + 44) / 50)


def test_progress_shows_a_stall() -> None:
    progress = Progress(1000, now=0.0)
    progress.saw(1000, data=True)
    for second in range(5):
        progress.got(100, float(second))
    assert progress.eta(5.0) is not None
    assert progress.rate(20.0) == 0
    assert progress.eta(20.0) is None
    progress.got(500, 21.0)
    assert progress.eta(21.0) == 0
