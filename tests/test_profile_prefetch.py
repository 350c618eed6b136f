# SPDX-License-Identifier: Apache-2.0
"""Prefetching what a profile names: order, pieces, priorities, and trouble."""

import errno
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.backing.base import Priority
from nbdstream.disk import StreamedDisk, open_disk
from nbdstream.errors import BackingMismatchError, BackingReadError
from nbdstream.export import Hit
from nbdstream.leaf.base import BackingReference, State
from nbdstream.streamer.job import StreamJob
from nbdstream.streamer.prefetch import LOOK_AHEAD, MERGE_MOST, Prefetcher, merged
from nbdstream.streamer.profile import Profile, Range
from tests.doubles import MemoryLeaf
from tests.far_backing import FarBacking

KIB = 1024
MIB = 1024 * KIB
CLUSTER = 64 * KIB
SIZE = 32 * MIB + 512
CONTENT = random.Random(5).randbytes(SIZE)
RATE = 12.5e6
RTT = 0.1
IDENTITY = "s1:abc"

# What a boot touches, in its order: single clusters here and there.
ORDER = random.Random(6).sample(range(SIZE // CLUSTER), 150)


def profile(*ranges: tuple[int, int], identity: str = IDENTITY, size: int = SIZE) -> Profile:
    return Profile(size, identity, CLUSTER, 1.0, True, tuple(Range(*one) for one in ranges))


BOOT = profile(*((unit * CLUSTER, CLUSTER) for unit in ORDER))


@asynccontextmanager
async def far_disk() -> AsyncIterator[tuple[StreamedDisk, MemoryLeaf, FarBacking]]:
    leaf = MemoryLeaf(SIZE, block_size=4 * KIB, cluster_size=CLUSTER)
    leaf.backing = BackingReference("memory:", "raw", SIZE, IDENTITY)
    backing = FarBacking(CONTENT, rate=RATE, rtt=RTT)
    backing.room = MIB
    backing.window += MIB
    async with open_disk(leaf, backing) as disk:
        yield disk, leaf, backing
    leaf.close()


async def boot(disk: StreamedDisk, *, think: float = 0.004) -> float:
    """A guest that reads in the profile's order; how long it takes."""
    start = trio.current_time()
    for unit in ORDER:
        data = bytearray(4 * KIB)
        if disk.read_nowait(memoryview(data), unit * CLUSTER) is Hit.MISS:
            await disk.read(memoryview(data), unit * CLUSTER)
        assert data == CONTENT[unit * CLUSTER :][: 4 * KIB]
        await trio.sleep(think)
    return trio.current_time() - start


async def test_everything_that_is_named_becomes_local_and_nothing_else(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, leaf, backing):
        prefetcher = Prefetcher(disk, BOOT)
        assert (prefetcher.length, prefetcher.done) == (BOOT.bytes, 0)
        await prefetcher.run()
        assert prefetcher.done == BOOT.bytes
        assert leaf.states.count(State.DATA) * 4 * KIB == BOOT.bytes
        assert all(leaf.data_between(u * CLUSTER, (u + 1) * CLUSTER) for u in ORDER)
        assert {read.priority for read in backing.reads} == {Priority.PREFETCH}
        assert backing.fetched_twice() == []


async def test_a_boot_with_its_profile_is_nearly_as_fast_as_the_link_can_be(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, _leaf, _backing):
        without = await boot(disk)
    async with far_disk() as (disk, _leaf, backing), trio.open_nursery() as nursery:
        nursery.start_soon(Prefetcher(disk, BOOT).run)
        with_profile = await boot(disk)
        assert backing.fetched_twice() == []
    assert without > 0.8 * len(ORDER) * RTT
    assert with_profile < 1.25 * BOOT.bytes / RATE + 4 * RTT


async def test_first_come_first_and_in_large_pieces(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, _leaf, backing):
        far_apart = profile((8 * MIB, CLUSTER), (0, CLUSTER), (4 * MIB, CLUSTER))
        await Prefetcher(disk, far_apart).run()
        assert [read.offset for read in backing.reads] == [8 * MIB, 0, 4 * MIB]
        backing.reads.clear()
        # Neighbours in a mixed order; one request, and the rest after it.
        mixed = profile(
            (16 * MIB, CLUSTER),
            (24 * MIB, CLUSTER),
            (16 * MIB + CLUSTER, CLUSTER),
            (16 * MIB - CLUSTER, CLUSTER),
        )
        await Prefetcher(disk, mixed).run()
        assert [(read.offset, read.length) for read in backing.reads] == [
            (16 * MIB - CLUSTER, 3 * CLUSTER),
            (24 * MIB, CLUSTER),
        ]


async def test_pieces_fit_the_room_and_the_clusters(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, _leaf, backing):
        backing.room = 3 * CLUSTER + 100
        await Prefetcher(disk, profile((CLUSTER // 2, 10 * CLUSTER), (9 * MIB, 512))).run()
        assert sum(read.length for read in backing.reads) == 12 * CLUSTER
        assert max(read.length for read in backing.reads) == 3 * CLUSTER
        assert all(read.offset % CLUSTER == 0 for read in backing.reads)
        backing.room = 1
        backing.reads.clear()
        await Prefetcher(disk, profile((16 * MIB, 4 * CLUSTER))).run()
        assert [read.length for read in backing.reads] == [CLUSTER] * 4


async def test_what_is_local_is_passed_over(autojump_clock: trio.testing.MockClock) -> None:
    async with far_disk() as (disk, _leaf, backing):
        await disk.populate(MIB, MIB, Priority.STREAM)
        await disk.trim(3 * MIB, CLUSTER, fua=False)
        backing.reads.clear()
        backing.window = 0  # there is no room to be had, and no need of any
        prefetcher = Prefetcher(disk, profile((MIB, MIB), (3 * MIB, CLUSTER)))
        await prefetcher.run()
        assert backing.reads == []
        assert prefetcher.done == prefetcher.length


async def test_a_profile_serves_leaves_with_other_clusters(
    autojump_clock: trio.testing.MockClock,
) -> None:
    leaf = MemoryLeaf(SIZE, block_size=4 * KIB, cluster_size=4 * KIB)
    leaf.backing = BackingReference("memory:", "raw", SIZE, IDENTITY)
    async with open_disk(leaf, FarBacking(CONTENT, rate=RATE, rtt=RTT)) as disk:
        await Prefetcher(disk, BOOT).run()
        assert all(leaf.data_between(u * CLUSTER, (u + 1) * CLUSTER) for u in ORDER)
    leaf.close()


async def test_the_stream_job_and_the_prefetcher_fetch_nothing_twice(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, leaf, backing), trio.open_nursery() as nursery:
        job = StreamJob(disk, job_id="stream")
        job.start()
        nursery.start_soon(job.run)
        prefetcher = Prefetcher(disk, BOOT)
        nursery.start_soon(prefetcher.run)
        await boot(disk)
        await job.completed.wait()
        assert backing.fetched_twice() == []
        assert leaf.backing is None
    assert prefetcher.done == prefetcher.length


async def test_a_foreign_profile_costs_a_warning_and_is_used_within_bounds(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with far_disk() as (disk, leaf, _backing):
        foreign = profile(
            (MIB, CLUSTER), (SIZE - 512, MIB), (2 * SIZE, MIB), identity="s1:else", size=4 * SIZE
        )
        prefetcher = Prefetcher(disk, foreign)
        assert len(caplog.records) == 1 and "another backing" in caplog.text
        assert prefetcher.length == CLUSTER + 512
        await prefetcher.run()
        assert leaf.data_between(MIB, MIB + CLUSTER)
        assert leaf.data_between(SIZE - 512, SIZE)
        caplog.clear()
        Prefetcher(disk, profile((0, CLUSTER), identity=""))
        assert caplog.records == []  # it is not known that it is another one


async def test_a_lost_backing_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    async with far_disk() as (disk, leaf, backing), trio.open_nursery() as nursery:
        backing.error = BackingReadError("gone")
        prefetcher = Prefetcher(disk, BOOT)
        nursery.start_soon(prefetcher.run)
        await trio.sleep(30)
        assert prefetcher.done == 0 and State.DATA not in leaf.states
        backing.error = None
        await trio.sleep(30)
        assert prefetcher.done == prefetcher.length
        assert leaf.states.count(State.DATA) * 4 * KIB == BOOT.bytes


async def test_what_cannot_be_mended_by_waiting_ends_it_with_one_warning(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with far_disk() as (disk, leaf, _backing):
        leaf.store_error = OSError(errno.ENOSPC, "no space left")
        await Prefetcher(disk, BOOT).run()
        warnings = [r for r in caplog.records if "boot profile" in r.message]
        assert len(warnings) == 1 and "no space left" in warnings[0].message
    async with far_disk() as (disk, _leaf, backing):
        backing.error = BackingMismatchError("another image")  # type: ignore[assignment]
        await Prefetcher(disk, BOOT).run()
        assert "another image" in caplog.text
        assert len(backing.reads) < 100


# -- merging ---------------------------------------------------------------------------


def as_ranges(units: list[int]) -> list[Range]:
    return [Range(unit * CLUSTER, CLUSTER) for unit in units]


@given(st.lists(st.integers(0, 200), unique=True))
def test_merging_keeps_every_byte_once(units: list[int]) -> None:
    result = list(merged(as_ranges(units)))
    assert sorted(
        unit for r in result for unit in range(r.offset // CLUSTER, r.end // CLUSTER)
    ) == sorted(units)


@given(st.permutations(range(300)))
def test_merging_delays_nothing_by_more_than_the_look_ahead(units: list[int]) -> None:
    before = 0
    place = {unit: index * CLUSTER for index, unit in enumerate(units)}
    for found in merged(as_ranges(units)):
        assert found.length <= MERGE_MOST
        first = min(place[unit] for unit in range(found.offset // CLUSTER, found.end // CLUSTER))
        assert before <= first + LOOK_AHEAD
        before += found.length


def test_large_ranges_stay_as_they_are() -> None:
    large = [Range(0, 3 * LOOK_AHEAD), Range(3 * LOOK_AHEAD, CLUSTER)]
    assert list(merged(large)) == large
