# SPDX-License-Identifier: Apache-2.0
"""Writeback: streams that stay behind the disk, and a kernel that holds up writers."""

import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from nbdstream.backing.base import Priority
from nbdstream.disk import StreamedDisk, open_disk, writeback
from nbdstream.export import Hit
from tests.doubles import GatedBacking, MemoryLeaf

SIZE = 256 * 1024
CONTENT = bytes(1 + i * 7 % 251 for i in range(SIZE))


class SlowDisk:
    """Stands for sync_file_range on a disk that is told when to be done."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.calls = 0

    def write_out(self, fd: int) -> None:
        self.calls += 1
        assert self.done.wait(10)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk = SlowDisk()
    monkeypatch.setattr(writeback, "write_out", disk.write_out)
    monkeypatch.setattr(writeback, "PUSH", 16384)
    monkeypatch.setattr(writeback, "UNWRITTEN_MOST", 32768)
    yield disk
    disk.done.set()


@asynccontextmanager
async def disk_over(backing: GatedBacking) -> AsyncIterator[tuple[StreamedDisk, MemoryLeaf]]:
    leaf = MemoryLeaf(SIZE)
    async with open_disk(leaf, backing) as disk:
        yield disk, leaf
    leaf.close()


async def until_calls(disk: SlowDisk, calls: int) -> None:
    with trio.fail_after(10):
        while disk.calls < calls:  # noqa: ASYNC110 - a thread counts
            await trio.sleep(0.001)


async def test_a_stream_asks_for_no_more_than_the_disk_takes(slow_disk: SlowDisk) -> None:
    backing = GatedBacking(CONTENT)
    async with disk_over(backing) as (disk, _leaf), trio.open_nursery() as nursery:
        nursery.start_soon(disk.populate, 0, SIZE, Priority.STREAM)
        await until_calls(slow_disk, 1)
        await trio.testing.wait_all_tasks_blocked()
        asked = sum(read.length for read in backing.reads)
        # What was on its way when the bound was met still arrives.
        assert 32768 <= asked <= 32768 + backing.room
        # A guest that misses waits for nothing of that.
        data = bytearray(100)
        with trio.fail_after(5):
            await disk.read(memoryview(data), SIZE - 100)
        assert data == CONTENT[-100:]
        slow_disk.done.set()
    assert sum(read.length for read in backing.reads) == SIZE


async def test_a_write_that_was_held_up_sends_the_next_ones_to_a_worker(
    slow_disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writeback, "CONGESTED_TIME", 60.0)
    async with disk_over(GatedBacking(CONTENT)) as (disk, leaf):
        page = memoryview(b"w" * 4096)

        def throttled() -> None:
            time.sleep(writeback.SLOW * 1.2)

        leaf.signal = throttled
        assert disk.write_nowait(page, 0) is Hit.DONE
        leaf.signal = lambda: None
        assert disk.write_nowait(page, 4096) is Hit.MISS
        async with trio.open_nursery() as nursery:
            for offset in range(4096, 40960, 4096):
                nursery.start_soon(trio.to_thread.run_sync, lambda: None)  # workers are free
                nursery.start_soon(lambda at: disk.write(page, at, fua=False), offset)
            await until_calls(slow_disk, 1)
            # The loop is free meanwhile: a hit is answered at once.
            assert disk.read_nowait(memoryview(bytearray(4096)), 0) is Hit.DONE
            assert leaf.stores == [("write", 0, 4096)]
            slow_disk.done.set()
        assert len(leaf.stores) == 10
        assert slow_disk.calls <= 3  # one call serves all that wait


async def test_writing_out_leaves_errors_for_the_leaf_s_own_sync() -> None:
    """It works on a file description of its own: see the module's docstring."""
    async with disk_over(GatedBacking(CONTENT)) as (disk, leaf):
        assert disk.writeback._fd != leaf.fd
        with trio.fail_after(10):
            await disk.writeback.wait_written()
