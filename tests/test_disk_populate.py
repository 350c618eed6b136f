# SPDX-License-Identifier: Apache-2.0
"""Making ranges local: admission, units, and requests that cover odd ranges."""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdstream.backing.base import Grant, Priority
from nbdstream.disk import StreamedDisk, open_disk
from nbdstream.errors import LeafFormatError
from nbdstream.leaf.base import LeafExtent, State
from tests.doubles import GatedBacking, MemoryLeaf
from tests.small_disk import CONTENT, SIZE

HOLE = (8192, 16384)


class RoomForOne(GatedBacking):
    """Gives room for one read at a time, and none while that read is under way."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.most_at_once = 0
        self._under_way = 0
        self._turn = trio.Semaphore(1)

    async def read(
        self, view: memoryview, offset: int, priority: Priority, grant: Grant | None = None
    ) -> None:
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            await super().read(view, offset, priority, None)
            await trio.sleep(0.01)
        finally:
            self._under_way -= 1
            if grant is not None:
                grant.use(priority)

    async def wait_for_room(self, priority: Priority) -> Grant:
        await self._turn.acquire()
        return Grant(2048, priority, lambda _grant: self._turn.release())


@asynccontextmanager
async def disk_over(
    backing: GatedBacking, *, read_only: bool = False
) -> AsyncIterator[tuple[StreamedDisk, MemoryLeaf]]:
    leaf = MemoryLeaf(len(backing.content))
    leaf.read_only = read_only
    async with open_disk(leaf, backing) as disk:
        yield disk, leaf
    leaf.close()


async def content(disk: StreamedDisk) -> bytes:
    data = bytearray(disk.size)
    await disk.read(memoryview(data), 0)
    return bytes(data)


@settings(deadline=None, max_examples=100)
@given(offset=st.integers(0, SIZE - 1), length=st.integers(1, SIZE), known=st.booleans())
def test_caching_any_range_makes_its_blocks_local_and_ends(
    offset: int, length: int, known: bool
) -> None:
    """NBD_CMD_CACHE of a part of a block in a hole used to spin for ever."""
    length = min(length, SIZE - offset)

    async def cache() -> None:
        backing = GatedBacking(CONTENT[: HOLE[0]] + bytes(HOLE[1]) + CONTENT[sum(HOLE) :])
        backing.holes, backing.known = [HOLE], known
        async with disk_over(backing) as (disk, leaf):
            with trio.fail_after(5):
                await disk.cache(offset, length)
            blocks = leaf.states[offset // 512 : -(-(offset + length) // 512)]
            assert State.UNALLOCATED not in blocks
            assert backing.grants_held == 0
            assert backing.fetched_twice() == []
            assert await content(disk) == backing.content

    trio.run(cache)


async def test_caching_on_a_read_only_leaf_fetches_nothing() -> None:
    backing = GatedBacking(CONTENT)
    async with disk_over(backing, read_only=True) as (disk, _leaf):
        with trio.fail_after(1):
            await disk.cache(0, SIZE)
        assert backing.reads == []
        with pytest.raises(OSError, match="keeps nothing") as caught:
            await disk.populate(0, SIZE, Priority.STREAM)
        assert caught.value.errno == errno.EROFS


async def test_a_large_request_takes_no_more_room_than_the_backing_gives(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """One NBD_CMD_CACHE of 2 GiB used to start 2,048 fetches at once."""
    backing = RoomForOne(CONTENT)
    async with disk_over(backing) as (disk, _leaf):
        assert await disk.populate(0, SIZE, Priority.PREFETCH) == SIZE
        assert backing.most_at_once == 1
        assert await content(disk) == CONTENT


async def test_room_is_given_back_when_nothing_is_left_to_fetch() -> None:
    """A grant that found nothing used to block the stream for 100 ms."""
    backing = GatedBacking(CONTENT)
    async with disk_over(backing) as (disk, _leaf):
        real_wait = backing.wait_for_room

        async def wait_while_the_guest_writes(priority: Priority) -> Grant:
            await disk.write(memoryview(b"w" * 4096), 0, fua=False)
            return await real_wait(priority)

        backing.wait_for_room = wait_while_the_guest_writes  # type: ignore[method-assign]
        unit = await disk.next_unit(0, 4096, Priority.STREAM)
        assert unit is None
        assert backing.grants_held == 0 and backing.reads == []


async def test_what_is_on_its_way_is_joined_without_room() -> None:
    backing = GatedBacking(CONTENT, gated=True)
    async with disk_over(backing) as (disk, _leaf), trio.open_nursery() as nursery:
        view = memoryview(bytearray(10))
        nursery.start_soon(disk.read, view, 0)
        await trio.testing.wait_all_tasks_blocked()
        backing.wait_for_room = None  # type: ignore[method-assign,assignment]
        unit = await disk.next_unit(0, 2048, Priority.STREAM)
        assert unit is not None and (unit.offset, unit.length) == (0, 2048)
        assert len(backing.reads) == 1
        backing.reads[0].gate.set()


async def test_a_damaged_part_of_the_leaf_fails_only_what_touches_it() -> None:
    """LeafError from the metadata used to end the whole server."""
    backing = GatedBacking(CONTENT)
    async with disk_over(backing) as (disk, leaf):
        healthy = leaf.extents

        def damaged(offset: int, length: int) -> "list[LeafExtent]":
            if offset < 4096 and offset + length > 2048:
                raise LeafFormatError("the entry is damaged")
            return list(healthy(offset, length))

        leaf.extents = damaged  # type: ignore[method-assign,assignment]
        for work in (
            disk.read(memoryview(bytearray(100)), 2048),
            disk.cache(0, 4096),
            disk.write(memoryview(b"w"), 2050, fua=False),
            disk.next_unallocated(0),
        ):
            with pytest.raises(LeafFormatError):
                await work
        data = bytearray(100)
        await disk.read(memoryview(data), 8192)
        assert data == CONTENT[8192:8292]
        await disk.write(memoryview(b"w" * 512), 8192, fua=True)
