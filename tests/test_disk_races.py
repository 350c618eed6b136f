# SPDX-License-Identifier: Apache-2.0
"""The races of docs/concurrency.md, each forced step by step."""

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from nbdstream.backing.base import Priority
from nbdstream.disk import DetectZeroes, StreamedDisk, open_disk, round_off
from nbdstream.errors import BackingReadError
from nbdstream.export import Hit
from nbdstream.leaf.base import State
from tests.doubles import GatedBacking, MemoryLeaf, poison_buffers

SIZE = 64 * 1024 + 300  # the last block is a short one
CONTENT = bytes(1 + i * 7 % 251 for i in range(SIZE))

poisoned = pytest.fixture(poison_buffers, scope="module", autouse=True)


@asynccontextmanager
async def gated_disk(
    *, copy_on_read: bool = True, detect_zeroes: DetectZeroes = DetectZeroes.OFF
) -> AsyncIterator[tuple[StreamedDisk, MemoryLeaf, GatedBacking]]:
    leaf = MemoryLeaf(SIZE)
    backing = GatedBacking(CONTENT, gated=True)
    async with open_disk(
        leaf, backing, copy_on_read=copy_on_read, detect_zeroes=detect_zeroes
    ) as disk:
        yield disk, leaf, backing
    leaf.close()


async def read(disk: StreamedDisk, offset: int, length: int) -> bytes:
    data = bytearray(length)
    view = memoryview(data)
    hit = disk.read_nowait(view, offset)
    if hit is Hit.MISS:
        await disk.read(view, offset)
    return bytes(data)


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


async def test_without_copy_on_read_nothing_is_kept_except_for_partial_writes() -> None:
    async with gated_disk(copy_on_read=False) as (disk, leaf, backing):
        backing.gated = False
        assert await read(disk, 0, 3000) == CONTENT[:3000]
        assert leaf.stores == []
        await disk.write(memoryview(b"z" * 10), 700, fua=False)
        expected = bytearray(CONTENT[:2048])
        expected[700:710] = b"z" * 10
        assert await read(disk, 0, 2048) == expected
        assert leaf.states[1] is State.DATA


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


async def test_partial_write_beside_zeroes_does_not_resurrect_the_backing() -> None:
    async with gated_disk() as (disk, _leaf, backing):
        await disk.trim(0, 4096, fua=False)
        await disk.write(memoryview(b"n" * 700), 100, fua=False)
        assert await read(disk, 0, 4096) == bytes(100) + b"n" * 700 + bytes(4096 - 800)
        assert backing.reads == []


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


async def test_the_short_last_block() -> None:
    async with gated_disk() as (disk, _leaf, backing):
        tail = SIZE - SIZE % 512
        await disk.write(memoryview(b"t" * (SIZE - tail)), tail, fua=True)
        assert backing.reads == []
        await disk.trim(tail - 512, SIZE - tail + 512, fua=False)
        assert await read(disk, tail - 512, SIZE - tail + 512) == bytes(SIZE - tail + 512)
        backing.gated = False
        await disk.populate(0, SIZE, Priority.STREAM)
        await disk.complete(keep_backing=False)
        assert disk.leaf.backing is None


async def test_compressed_clusters_are_read_and_overwritten_in_part() -> None:
    async with gated_disk() as (disk, leaf, backing):
        packed = bytes(5 + i % 13 for i in range(2048))
        leaf.compress(2048, packed)
        assert await read(disk, 2500, 600) == packed[452:1052]
        await disk.write(memoryview(b"c" * 512), 2560, fua=False)
        expected = bytearray(packed)
        expected[512:1024] = b"c" * 512
        assert await read(disk, 2048, 2048) == expected
        leaf.compress(4096, packed)
        await disk.trim(4608, 512, fua=False)
        assert await read(disk, 4096, 2048) == packed[:512] + bytes(512) + packed[1024:]
        leaf.compress(6144, packed)
        assert disk.write_nowait(memoryview(b"c" * 512), 6144) is Hit.MISS
        assert disk.write_nowait(memoryview(b"c" * 2048), 6144) is Hit.DONE
        assert backing.reads == []


async def test_fast_zero_is_refused_only_where_it_would_fetch() -> None:
    async with gated_disk() as (disk, leaf, backing):
        with pytest.raises(OSError, match="fetched first") as caught:
            await disk.zero(100, 1000, may_trim=True, fast_only=True, fua=False)
        assert caught.value.errno == errno.ENOTSUP
        assert leaf.stores == [] and backing.reads == []
        await disk.trim(0, 2048, fua=False)
        await disk.zero(100, 1000, may_trim=True, fast_only=True, fua=False)
        assert backing.reads == []


async def test_a_full_leaf_still_gives_the_guest_its_data() -> None:
    async with gated_disk() as (disk, leaf, backing):
        backing.gated = False
        leaf.store_error = OSError(errno.ENOSPC, "no space")
        assert await read(disk, 100, 3000) == CONTENT[100:3100]
        with pytest.raises(OSError, match="no space"):
            await disk.populate(0, 2048, Priority.STREAM)
        with pytest.raises(OSError, match="no space"):
            await disk.write(memoryview(b"x" * 10), 5000, fua=False)
        leaf.store_error = None
        assert await disk.populate(0, 2048, Priority.STREAM) == 2048


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


async def test_holes_of_the_backing_are_zeroes_without_any_transfer() -> None:
    async with gated_disk() as (disk, leaf, backing):
        backing.holes = [(4096, 8192)]
        backing.known = True
        content = await read(disk, 4096, 8192)
        assert content == bytes(8192)
        await disk.write(memoryview(b"h" * 100), 5000, fua=False)
        assert await read(disk, 4608, 1024) == bytes(392) + b"h" * 100 + bytes(532)
        await disk.populate(4096, 8192, Priority.STREAM)
        assert backing.reads == []
        assert State.UNALLOCATED not in leaf.states[8:24]


async def test_zero_detection_is_per_write_and_optional() -> None:
    for mode, expected in (
        (DetectZeroes.OFF, "write"),
        (DetectZeroes.ON, "zero"),
        (DetectZeroes.UNMAP, "zero"),
    ):
        async with gated_disk(detect_zeroes=mode) as (disk, leaf, _backing):
            view = memoryview(bytes(1024))
            if disk.write_nowait(view, 1024) is Hit.MISS:
                await disk.write(view, 1024, fua=False)
            assert leaf.stores == [(expected, 1024, 1024)]
            await disk.write(memoryview(bytes(1023) + b"\1"), 4096, fua=False)
            assert leaf.stores[-1] == ("write", 4096, 1024)


async def test_zeroes_that_were_transferred_are_stored_as_zeroes() -> None:
    leaf = MemoryLeaf(16384)
    content = CONTENT[:4096] + bytes(8192) + CONTENT[:4096]
    backing = GatedBacking(content)
    async with open_disk(leaf, backing) as disk:
        backing.room = 16384
        await disk.populate(0, 16384, Priority.STREAM)
        assert leaf.stores == [("write", 0, 4096), ("zero", 4096, 8192), ("write", 12288, 4096)]
        assert await read(disk, 0, 16384) == content
    leaf.close()


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


async def test_block_status_tells_local_remote_and_holes_apart() -> None:
    async with gated_disk() as (disk, _leaf, backing):
        backing.holes = [(8192, 4096)]
        disk.write_nowait(memoryview(b"x" * 1024), 0)
        await disk.trim(1024, 1024, fua=False)
        status = await disk.block_status(0, 16384, 100)
        assert [(s.length, s.local, s.zero, s.depth) for s in status] == [
            (1024, True, False, 1),
            (1024, True, True, 1),
            (6144, False, False, 2),
            (4096, False, True, 0),
            (4096, False, False, 2),
        ]
        assert len(await disk.block_status(0, 16384, 2)) == 2


async def test_clusters_that_are_local_in_part_are_made_whole_for_others() -> None:
    async with gated_disk() as (disk, leaf, backing):
        backing.gated = False
        leaf.whole_clusters = True
        disk.write_nowait(memoryview(b"w" * 512), 2560)  # within cluster 1
        disk.write_nowait(memoryview(b"w" * 4096), 8192)  # clusters 4 and 5, whole
        await disk.trim(14336 + 512, 2048, fua=False)  # parts of clusters 7 and 8
        await round_off(disk)
        assert sorted((read.offset, read.length) for read in backing.reads) == [
            (2048, 2048),
            (14336, 2048),
            (16384, 2048),
        ]
        assert await read(disk, 2048, 2048) == CONTENT[2048:2560] + b"w" * 512 + CONTENT[3072:4096]
        backing.reads.clear()
        await round_off(disk)
        assert backing.reads == []


async def test_making_clusters_whole_gives_up_when_the_backing_is_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with gated_disk() as (disk, leaf, backing):
        backing.gated = False
        backing.error = BackingReadError("gone")
        leaf.whole_clusters = True
        disk.write_nowait(memoryview(b"w" * 512), 2560)
        await round_off(disk)
        assert "local only in part" in caplog.text
        assert leaf.states[4] is State.UNALLOCATED


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
