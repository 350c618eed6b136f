# SPDX-License-Identifier: Apache-2.0
"""Readahead and the widening of misses, in virtual time over a link with a round trip."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from nbdstream.backing.base import Grant, Priority
from nbdstream.disk import StreamedDisk, open_disk, readahead
from nbdstream.disk.fetch import PARK_TIME
from nbdstream.disk.readahead import STREAMS, WIDEN_PART, WINDOW_FIRST, WINDOW_MOST_LEAST
from nbdstream.errors import BackingReadError
from nbdstream.export import Hit
from nbdstream.leaf.base import State
from tests.doubles import MemoryLeaf
from tests.far_backing import FarBacking

KIB = 1024
MIB = 1024 * KIB
SIZE = 32 * MIB
CONTENT = random.Random(1).randbytes(SIZE)
REQUEST = 128 * KIB
# 100 Mbit/s, 100 ms.
RATE = 12.5e6
RTT = 0.1


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests here look at single clusters: what surrounds a miss is kept small for them."""
    monkeypatch.setattr(readahead, "WIDEN_PART", 0.05)


@asynccontextmanager
async def far_disk(
    *, cluster_size: int = 64 * KIB, rate: float = RATE, rtt: float = RTT, copy_on_read: bool = True
) -> AsyncIterator[tuple[StreamedDisk, MemoryLeaf, FarBacking]]:
    leaf = MemoryLeaf(SIZE, block_size=4 * KIB, cluster_size=cluster_size)
    backing = FarBacking(CONTENT, rate=rate, rtt=rtt)
    async with open_disk(leaf, backing, copy_on_read=copy_on_read) as disk:
        yield disk, leaf, backing
    leaf.close()


async def read(disk: StreamedDisk, offset: int, length: int = REQUEST) -> Hit:
    """Read as the server does, check the content; say what the first try gave."""
    data = bytearray(length)
    hit = disk.read_nowait(memoryview(data), offset)
    if hit is Hit.MISS:
        await disk.read(memoryview(data), offset)
    assert data == CONTENT[offset : offset + length]
    return hit


def ahead(backing: FarBacking) -> list[tuple[int, int]]:
    """What was asked for as readahead."""
    return [(r.offset, r.length) for r in backing.reads if r.priority is Priority.READAHEAD]


async def settled() -> None:
    """Everything that is on its way has arrived."""
    await trio.sleep(5 * RTT)
    await trio.testing.wait_all_tasks_blocked()


async def test_a_sequential_reader_gets_the_link_s_rate(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, _leaf, backing):
        start = trio.current_time()
        for offset in range(0, SIZE, REQUEST):
            await read(disk, offset)
        elapsed = trio.current_time() - start
        # Request by request it would be a round trip each, over 25 seconds.
        assert elapsed < 1.2 * SIZE / RATE + 10 * RTT
        assert backing.fetched_twice() == []


async def test_a_slow_sequential_reader_never_waits_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, _leaf, backing):
        waited = []
        for offset in range(0, SIZE, REQUEST):
            start = trio.current_time()
            await read(disk, offset)
            waited.append(trio.current_time() - start)
            await trio.sleep(REQUEST / (RATE / 3))
        # The first two misses are what it takes to notice; the first windows are small.
        assert sum(wait > 0 for wait in waited) <= 8
        assert max(waited[16:]) == 0
        assert backing.fetched_twice() == []


async def test_most_reads_of_a_sequential_reader_are_hits(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The mark costs a miss for each half of a window, and no more."""
    async with far_disk() as (disk, _leaf, _backing):
        hits = []
        for offset in range(0, SIZE, REQUEST):
            hits.append(await read(disk, offset))
            await trio.sleep(REQUEST / (RATE / 3))
        assert hits.count(Hit.MISS) < 8 + 2 * SIZE // WINDOW_MOST_LEAST


async def test_random_reads_have_nothing_read_ahead(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, _leaf, backing):
        offsets = list(range(0, SIZE, 2 * MIB))
        random.Random(2).shuffle(offsets)
        for offset in offsets:
            await read(disk, offset, 4 * KIB)
        await settled()
        assert ahead(backing) == []


async def test_two_misses_in_a_row_start_it_and_its_window_doubles(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, _leaf, backing):
        await read(disk, 0)
        await settled()
        assert ahead(backing) == []
        await read(disk, REQUEST)
        await settled()
        most = 0
        for window in (WINDOW_FIRST, 2 * WINDOW_FIRST, 4 * WINDOW_FIRST):
            reached = max(offset + length for offset, length in ahead(backing))
            end = most or 2 * REQUEST
            assert reached <= end + window
            assert reached >= end + window // 2
            most = reached
            await read(disk, most)  # passes the whole window, as a fast reader does
            most += REQUEST
            await settled()


async def test_a_stream_that_ends_leaves_no_more_than_a_window(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, _leaf, backing):
        end = 6 * MIB
        for offset in range(0, end, REQUEST):
            await read(disk, offset)
        await trio.sleep(60)
        unneeded = sum(length for offset, length in ahead(backing) if offset >= end)
        assert 0 < unneeded <= 4 * RATE * RTT


async def test_several_streams_at_once_are_told_apart(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, _leaf, backing):
        start = trio.current_time()
        length = SIZE // STREAMS
        for step in range(0, length, REQUEST):
            for stream in range(STREAMS):
                await read(disk, stream * length + step)
        assert trio.current_time() - start < 1.3 * SIZE / RATE + 3 * STREAMS * RTT
        assert backing.fetched_twice() == []


async def test_requests_that_overtake_each_other_are_sequential_all_the_same(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, _leaf, backing):
        for offset in range(0, 4 * MIB, 2 * REQUEST):
            async with trio.open_nursery() as nursery:  # starts them in any order
                nursery.start_soon(read, disk, offset)
                nursery.start_soon(read, disk, offset + REQUEST)
        assert sum(length for _, length in ahead(backing)) > 3 * MIB
        assert backing.fetched_twice() == []


async def test_demand_does_not_wait_for_readahead_that_gets_no_room(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, _leaf, backing):
        backing.window = 0
        for offset in range(0, MIB, REQUEST):
            await read(disk, offset)
        assert ahead(backing) == []
        assert all(r.priority is Priority.DEMAND for r in backing.reads)
        assert backing.fetched_twice() == []


async def test_what_is_local_is_passed_over(autojump_clock: trio.testing.MockClock) -> None:
    async with far_disk() as (disk, leaf, backing):
        await disk.populate(512 * KIB, 256 * KIB, Priority.STREAM)
        for offset in range(0, 2 * MIB, REQUEST):
            await read(disk, offset)
        await settled()
        assert backing.fetched_twice() == []
        assert leaf.states[2 * MIB // leaf.block_size] is State.DATA


async def test_known_holes_are_passed_over(autojump_clock: trio.testing.MockClock) -> None:
    async with far_disk() as (disk, _leaf, backing):
        backing.holes = [(512 * KIB, 512 * KIB)]
        backing.known = True
        for offset in range(0, 512 * KIB, REQUEST):
            await read(disk, offset)
        await settled()
        assert sum(length for _, length in ahead(backing)) > 0
        assert not any(512 * KIB <= offset < MIB for offset, _ in ahead(backing))


async def test_a_guest_write_ahead_of_the_reader_wins(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, _leaf, _backing):
        await read(disk, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, disk, REQUEST)
            await trio.sleep(RTT / 2)
            written = memoryview(b"w" * 4 * KIB)
            offset = 2 * REQUEST + REQUEST // 2 + 4 * KIB
            await disk.write(written, offset, fua=False)
        await trio.sleep(2 * PARK_TIME)
        data = bytearray(4 * KIB)
        await disk.read(memoryview(data), offset)
        assert data == written


async def test_the_mark_is_stored_even_if_no_client_reads_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, leaf, backing):
        await read(disk, 0)
        await read(disk, REQUEST)
        await settled()
        blocks = [leaf.states[offset // leaf.block_size] for offset, _ in ahead(backing)]
        assert blocks.count(State.UNALLOCATED) == 1
        await trio.sleep(PARK_TIME)
        blocks = [leaf.states[offset // leaf.block_size] for offset, _ in ahead(backing)]
        assert State.UNALLOCATED not in blocks


async def test_who_wants_the_mark_gets_it_without_another_fetch(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, leaf, backing):
        await read(disk, 0)
        await read(disk, REQUEST)
        await settled()
        start = trio.current_time()
        await disk.populate(0, 2 * REQUEST + WINDOW_FIRST, Priority.STREAM)
        assert trio.current_time() == start
        assert backing.fetched_twice() == []
        assert State.UNALLOCATED not in leaf.states[: (2 * REQUEST + WINDOW_FIRST) // 4096]


async def test_errors_of_readahead_are_only_the_reader_s_who_meets_them(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with far_disk() as (disk, _leaf, backing):
        failed: list[int] = []
        real_read = backing.read

        async def failing_read(
            view: memoryview, offset: int, priority: Priority, grant: Grant | None = None
        ) -> None:
            if priority is Priority.READAHEAD and len(failed) < 4:
                failed.append(offset)
                raise BackingReadError("gone")
            await real_read(view, offset, priority, grant)

        monkeypatch.setattr(backing, "read", failing_read)
        for offset in range(0, 4 * MIB, REQUEST):
            await read(disk, offset)  # would raise, and checks the content
        assert len(failed) == 4
        assert backing.fetched_twice() == []


async def test_without_copy_on_read_there_is_none(autojump_clock: trio.testing.MockClock) -> None:
    async with far_disk(copy_on_read=False) as (disk, _leaf, backing):
        for offset in range(0, 2 * MIB, REQUEST):
            await read(disk, offset)
        assert ahead(backing) == []
        disk.copy_on_read = True
        for offset in range(2 * MIB, 4 * MIB, REQUEST):
            await read(disk, offset)
        assert ahead(backing) != []


async def test_what_a_profile_brings_anyway_is_no_reason_for_readahead(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk() as (disk, _leaf, backing), trio.open_nursery() as nursery:
        nursery.start_soon(disk.populate, 0, 2 * MIB, Priority.PREFETCH)
        await trio.testing.wait_all_tasks_blocked()
        for offset in range(0, 2 * MIB, REQUEST):
            await read(disk, offset)
        await settled()
        assert ahead(backing) == []


# -- surroundings ----------------------------------------------------------------------


async def test_a_miss_brings_what_is_free_around_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk(cluster_size=4 * KIB) as (disk, leaf, backing):
        start = trio.current_time()
        await read(disk, 5 * MIB + 20 * KIB, 4 * KIB)
        # 5 % of 1.25 MB, down to a power of two; the guest waits no more than that.
        (fetch,) = backing.reads
        assert (fetch.offset, fetch.length) == (5 * MIB, 32 * KIB)
        assert trio.current_time() - start < 1.06 * RTT
        assert await read(disk, 5 * MIB, 4 * KIB) is Hit.DONE
        assert disk.statistics()["demand_bytes"] == 4 * KIB
        assert leaf.states.count(State.DATA) == 8


@pytest.mark.usefixtures("autojump_clock")
@pytest.mark.parametrize(
    ("rtt", "length"), [(0.1, 256 * KIB), (0.05, 128 * KIB), (0.02, 64 * KIB), (0.005, 64 * KIB)]
)
async def test_the_longer_the_link_the_more_a_miss_brings(
    rtt: float, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "WIDEN_PART", WIDEN_PART)
    async with far_disk(rtt=rtt) as (disk, _leaf, backing):
        await read(disk, 5 * MIB + 20 * KIB, 4 * KIB)
        (fetch,) = backing.reads
        assert (fetch.offset, fetch.length) == (5 * MIB, length)


async def test_on_a_short_or_unknown_link_a_miss_brings_its_cluster(
    autojump_clock: trio.testing.MockClock,
) -> None:
    for rtt in (0.0, 0.001):
        async with far_disk(cluster_size=4 * KIB, rtt=rtt) as (disk, _leaf, backing):
            await read(disk, 5 * MIB + 20 * KIB, 4 * KIB)
            assert [(r.offset, r.length) for r in backing.reads] == [(5 * MIB + 20 * KIB, 4096)]


async def test_surroundings_never_cross_local_data_nor_fetch_it_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk(cluster_size=4 * KIB) as (disk, _leaf, backing):
        await disk.write(memoryview(CONTENT[8 * KIB : 12 * KIB]), 8 * KIB, fua=False)
        await disk.populate(24 * KIB, 4 * KIB, Priority.STREAM)
        backing.reads.clear()
        await read(disk, 16 * KIB, 4 * KIB)
        assert [(r.offset, r.length) for r in backing.reads] == [(12 * KIB, 12 * KIB)]


async def test_surroundings_leave_alone_what_is_on_its_way(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk(cluster_size=4 * KIB) as (disk, _leaf, backing):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.populate, 0, 8 * KIB, Priority.STREAM)
            await trio.testing.wait_all_tasks_blocked()
            await read(disk, 16 * KIB, 4 * KIB)
        assert [(r.offset, r.length) for r in backing.reads] == [
            (0, 8 * KIB),
            (8 * KIB, 24 * KIB),
        ]


async def test_many_misses_at_once_share_what_is_free(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with far_disk(cluster_size=4 * KIB) as (disk, _leaf, backing):
        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(read, disk, number * 2 * MIB, 4 * KIB)
        lengths = sorted(r.length for r in backing.reads)
        assert (lengths[0], lengths[-1]) == (4 * KIB, 32 * KIB)
        assert sum(lengths) < 16 * 32 * KIB // 2


async def test_the_disk_ends_where_it_ends(autojump_clock: trio.testing.MockClock) -> None:
    async with far_disk(cluster_size=4 * KIB) as (disk, _leaf, backing):
        await read(disk, SIZE - 4 * KIB, 4 * KIB)
        assert [(r.offset, r.length) for r in backing.reads] == [(SIZE - 32 * KIB, 32 * KIB)]
        for offset in range(SIZE - MIB, SIZE - 32 * KIB, 32 * KIB):
            await read(disk, offset, 32 * KIB)
        await settled()
        assert backing.fetched_twice() == []
