# SPDX-License-Identifier: Apache-2.0
"""The races of docs/concurrency.md, each forced step by step."""

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from nbdstream.backing.base import Priority
from nbdstream.disk import fetch
from nbdstream.errors import BackingReadError
from nbdstream.export import Hit
from nbdstream.leaf.base import State
from tests.doubles import MemoryLeaf, poison_buffers
from tests.small_disk import CONTENT, gated_disk, read

poisoned = pytest.fixture(poison_buffers, scope="module", autouse=True)


async def test_a_guest_write_wins_over_a_fetch_that_comes_back_later() -> None:
    async with gated_disk() as (disk, leaf, backing):
        results: list[bytes] = []

        async def reader() -> None:
            results.append(await read(disk, 0, 2048))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
            assert disk.write_nowait(memoryview(b"w" * 512), 512) is Hit.DONE
            backing.reads[0].gate.set()
        expected = CONTENT[:512] + b"w" * 512 + CONTENT[1024:2048]
        assert results == [expected]
        assert await read(disk, 0, 2048) == expected
        assert leaf.states[:4] == [State.DATA] * 4


async def test_a_trim_wins_over_a_fetch_and_fetches_nothing() -> None:
    async with gated_disk() as (disk, leaf, backing), trio.open_nursery() as nursery:
        nursery.start_soon(read, disk, 0, 100)
        await trio.testing.wait_all_tasks_blocked()
        await disk.trim(512, 512, fua=False)
        backing.reads[0].gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert leaf.states[1] is State.ZERO
        assert await read(disk, 512, 512) == bytes(512)
        await disk.trim(32768, 4096, fua=False)
        await disk.zero(40960, 4096, may_trim=False, fast_only=True, fua=False)
        assert len(backing.reads) == 1


async def test_readers_of_one_cluster_share_one_fetch() -> None:
    async with gated_disk() as (disk, _leaf, backing), trio.open_nursery() as nursery:
        for start in (0, 512, 700, 2000):
            nursery.start_soon(read, disk, start, 40)
        await trio.testing.wait_all_tasks_blocked()
        assert len(backing.reads) == 1
        backing.reads[0].gate.set()


async def test_a_guest_that_joins_a_streamed_fetch_promotes_it() -> None:
    async with gated_disk() as (disk, _leaf, backing), trio.open_nursery() as nursery:
        nursery.start_soon(disk.populate, 0, 8192, Priority.STREAM)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(read, disk, 4096, 10)
        await trio.testing.wait_all_tasks_blocked()
        assert len(backing.reads) == 1
        assert backing.promoted == [(0, 8192)]
        backing.reads[0].gate.set()


async def test_a_miss_does_not_hold_up_a_hit_or_a_whole_block_write() -> None:
    async with gated_disk() as (disk, _leaf, backing), trio.open_nursery() as nursery:
        assert disk.write_nowait(memoryview(b"x" * 512), 4096) is Hit.DONE
        nursery.start_soon(read, disk, 0, 2048)
        await trio.testing.wait_all_tasks_blocked()
        assert await read(disk, 4096, 512) == b"x" * 512
        with trio.fail_after(1):
            await disk.write(memoryview(b"y" * 1024), 0, fua=True)
        assert await read(disk, 0, 1024) == b"y" * 1024
        backing.reads[0].gate.set()


async def test_a_failed_fetch_is_an_error_and_leaves_nothing() -> None:
    async with gated_disk() as (disk, leaf, backing):
        errors: list[BaseException] = []

        async def reader() -> None:
            try:
                await read(disk, 0, 512)
            except BackingReadError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
            backing.reads[0].fail = True
            backing.reads[0].gate.set()
        assert len(errors) == 1
        assert leaf.states[:4] == [State.UNALLOCATED] * 4
        backing.gated = False
        assert await read(disk, 0, 512) == CONTENT[:512]


async def test_a_client_that_gives_up_takes_no_data_from_the_others() -> None:
    async with gated_disk() as (disk, leaf, backing), trio.open_nursery() as nursery:
        with trio.CancelScope() as gives_up:
            async with trio.open_nursery() as inner:
                inner.start_soon(read, disk, 0, 512)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(read, disk, 512, 512)
                await trio.testing.wait_all_tasks_blocked()
                gives_up.cancel()
        backing.reads[0].gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert leaf.states[:4] == [State.DATA] * 4
        assert len(backing.reads) == 1


async def test_a_write_that_joins_a_read_without_copy_on_read_gets_its_block() -> None:
    async with gated_disk(copy_on_read=False) as (disk, leaf, backing):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, disk, 0, 512)
            await trio.testing.wait_all_tasks_blocked()

            async def write() -> None:
                await disk.write(memoryview(b"q" * 100), 10, fua=False)

            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            backing.reads[0].gate.set()
        assert len(backing.reads) == 1
        assert leaf.states[0] is State.DATA
        assert await read(disk, 0, 200) == CONTENT[:10] + b"q" * 100 + CONTENT[110:200]


async def test_two_partial_writes_to_one_block_both_survive() -> None:
    async with gated_disk() as (disk, _leaf, backing):
        async with trio.open_nursery() as nursery:
            for at, letter in ((10, b"a"), (200, b"b"), (400, b"c")):

                async def write(at: int = at, letter: bytes = letter) -> None:
                    await disk.write(memoryview(letter * 50), at, fua=False)

                nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            assert len(backing.reads) == 1
            backing.reads[0].gate.set()
        expected = bytearray(CONTENT[:512])
        for at, letter in ((10, b"a"), (200, b"b"), (400, b"c")):
            expected[at : at + 50] = letter * 50
        assert await read(disk, 0, 512) == expected


async def test_a_write_that_slips_in_while_a_zero_block_is_filled_survives() -> None:
    async with gated_disk() as (disk, leaf, _backing):
        await disk.trim(0, 512, fua=False)
        calls = 0

        def cold_once_at_the_fill() -> None:
            # Calls: the look for obstacles (edge), the look whether it still holds zeroes,
            # then the fill itself: by then everything has been looked at.
            nonlocal calls
            calls += 1
            if calls == 3:
                assert leaf.states[0] is State.ZERO
                leaf.signal = lambda: None
                trio.lowlevel.spawn_system_task(slip_in)
                raise leaf.cold()

        async def slip_in() -> None:
            assert disk.write_nowait(memoryview(b"s" * 512), 0) is Hit.DONE

        leaf.signal = cold_once_at_the_fill
        await disk.write(memoryview(b"p" * 10), 100, fua=False)
        assert await read(disk, 0, 512) == b"s" * 100 + b"p" * 10 + b"s" * 402


async def test_a_buffer_that_a_guest_looks_at_is_not_used_again() -> None:
    async with gated_disk() as (disk, leaf, backing), trio.open_nursery() as nursery:
        leaf.store_error = OSError(errno.ENOSPC, "no space")
        results: list[bytes] = []

        async def stream() -> None:
            with pytest.raises(OSError, match="no space"):
                await disk.populate(0, 2048, Priority.STREAM)

        async def guest() -> None:
            results.append(await read(disk, 100, 1000))

        nursery.start_soon(stream)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(guest)
        await trio.testing.wait_all_tasks_blocked()
        backing.reads[0].gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert results == [CONTENT[100:1100]]
        assert len(backing.reads) == 1


@contextmanager
def storing_needs_a_flush(leaf: MemoryLeaf) -> Iterator[None]:
    """Within: the leaf takes nothing without a flush, and no flush ends."""
    ended = threading.Event()
    write, begin = leaf.write, leaf.begin_flush

    def full(offset: int, view: memoryview) -> None:
        raise leaf.full()

    def slow_flush() -> Callable[[], None]:
        sync = begin()

        def flush() -> None:
            ended.wait(60)
            sync()

        return flush

    leaf.write, leaf.begin_flush = full, slow_flush  # type: ignore[method-assign]
    try:
        yield
    finally:
        leaf.write, leaf.begin_flush = write, begin  # type: ignore[method-assign]
        ended.set()


async def test_a_reader_does_not_wait_for_the_flush_that_storing_needs() -> None:
    async with gated_disk() as (disk, leaf, backing):
        backing.gated = False
        with storing_needs_a_flush(leaf), trio.fail_after(30):
            assert await read(disk, 0, 2048) == CONTENT[:2048]
            assert await read(disk, 100, 50) == CONTENT[100:150]  # joins the same fetch
        assert leaf.states[0] is State.UNALLOCATED
        # Data that has been shown, and waits to be stored, loses against a write all the same.
        assert disk.write_nowait(memoryview(b"w" * 512), 512) is Hit.DONE
        await disk.populate(0, 2048, Priority.STREAM)
        expected = CONTENT[:512] + b"w" * 512 + CONTENT[1024:2048]
        assert await read(disk, 0, 2048) == expected
        assert len(backing.reads) == 1
        assert leaf.states[:4] == [State.DATA] * 4


async def test_data_that_a_guest_has_seen_is_kept_when_the_disk_is_closed() -> None:
    async with gated_disk() as (disk, leaf, backing):
        backing.gated = False
        write, left = leaf.write, iter(range(20))

        def cold(offset: int, view: memoryview) -> None:
            if next(left, None) is not None:
                raise leaf.cold()
            write(offset, view)

        leaf.write = cold  # type: ignore[method-assign]
        assert await read(disk, 0, 2048) == CONTENT[:2048]
        assert leaf.states[0] is State.UNALLOCATED
        # There is no checkpoint before the disk is closed.
    assert leaf.states[:4] == [State.DATA] * 4


async def test_data_that_waits_to_be_stored_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "UNSTORED_MOST", 2048)
    async with gated_disk() as (disk, leaf, backing), trio.open_nursery() as nursery:
        backing.gated = False
        results: list[bytes] = []

        async def reader() -> None:
            results.append(await read(disk, 2048, 2048))

        with storing_needs_a_flush(leaf), trio.fail_after(30):
            await read(disk, 0, 2048)
            nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
            assert not results
        with trio.fail_after(30):
            while not results:
                await trio.testing.wait_all_tasks_blocked()
        assert results == [CONTENT[2048:4096]]


async def test_flushes_in_a_burst_are_shared() -> None:
    async with gated_disk() as (disk, leaf, _backing):
        disk.write_nowait(memoryview(b"x" * 512), 0)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(disk.flush)
        assert 1 <= leaf.syncs <= 2


async def test_a_flush_without_space_for_metadata_can_be_repeated() -> None:
    async with gated_disk() as (disk, leaf, _backing):

        def fail() -> None:
            raise OSError(errno.ENOSPC, "no space")

        begin, leaf.begin_flush = leaf.begin_flush, lambda: fail  # type: ignore[method-assign]
        disk.write_nowait(memoryview(b"x" * 512), 0)
        with pytest.raises(OSError, match="no space"):
            await disk.flush()
        assert leaf.dirty
        leaf.begin_flush = begin  # type: ignore[method-assign]
        await disk.flush()
        assert not leaf.dirty


async def test_standing_by_keeps_nothing_and_believes_nothing() -> None:
    async with gated_disk() as (disk, leaf, backing):
        backing.gated = False
        backing.holes, backing.known = [(0, 8192)], True
        disk.stand_by()
        assert await read(disk, 0, 2048) == CONTENT[:2048]  # the hole was filled meanwhile
        assert disk.write_nowait(memoryview(b"x" * 512), 0) is Hit.MISS
        for change in (
            disk.write(memoryview(b"x" * 512), 0, fua=False),
            disk.zero(0, 512, may_trim=True, fast_only=False, fua=False),
            disk.trim(0, 512, fua=False),
            disk.cache(0, 2048),
        ):
            with pytest.raises(OSError, match="standing by") as caught:
                await change
            assert caught.value.errno == errno.EPERM
        assert leaf.stores == []
        disk.activate()
        assert not backing.known
        assert await read(disk, 0, 2048) == CONTENT[:2048]
        assert leaf.states[0] is State.DATA
        assert disk.write_nowait(memoryview(b"x" * 512), 0) is Hit.DONE


async def test_a_fetch_begun_while_standing_by_is_not_kept() -> None:
    async with gated_disk() as (disk, leaf, backing):
        disk.stand_by()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, disk, 0, 512)
            await trio.testing.wait_all_tasks_blocked()
            disk.activate()
            nursery.start_soon(read, disk, 512, 512)
            await trio.testing.wait_all_tasks_blocked()
            for waiting in backing.reads:
                waiting.gate.set()
            await trio.testing.wait_all_tasks_blocked()
        assert len(backing.reads) == 2
        assert leaf.states[1] is State.DATA


async def test_a_frozen_disk_is_flushed_and_refuses_changes_until_it_thaws() -> None:
    async with gated_disk() as (disk, leaf, _backing):
        disk.write_nowait(memoryview(b"x" * 512), 0)
        await disk.freeze("sealed")
        assert not leaf.dirty
        with pytest.raises(OSError, match="sealed"):
            await disk.write(memoryview(b"y" * 512), 0, fua=False)
        assert await read(disk, 0, 512) == b"x" * 512
        disk.gate.open()
        assert disk.write_nowait(memoryview(b"y" * 512), 0) is Hit.DONE
