# SPDX-License-Identifier: Apache-2.0
"""A streamed disk: what is fetched, kept, unpacked, zeroed and told of."""

import errno

import pytest
import trio
import trio.testing

from nbdstream.backing.base import Priority
from nbdstream.disk import DetectZeroes, open_disk, round_off, rounding
from nbdstream.errors import BackingReadError
from nbdstream.export import Hit
from nbdstream.leaf.base import State
from tests.doubles import GatedBacking, MemoryLeaf, poison_buffers
from tests.small_disk import CONTENT, SIZE, gated_disk, read

poisoned = pytest.fixture(poison_buffers, scope="module", autouse=True)


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


async def test_partial_write_beside_zeroes_does_not_resurrect_the_backing() -> None:
    async with gated_disk() as (disk, _leaf, backing):
        await disk.trim(0, 4096, fua=False)
        await disk.write(memoryview(b"n" * 700), 100, fua=False)
        assert await read(disk, 0, 4096) == bytes(100) + b"n" * 700 + bytes(4096 - 800)
        assert backing.reads == []


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


async def test_making_clusters_whole_starts_few_tasks_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounding, "AT_ONCE", 2)
    async with gated_disk() as (disk, leaf, backing), trio.open_nursery() as nursery:
        leaf.whole_clusters = True
        for cluster in range(30):
            disk.write_nowait(memoryview(b"w" * 512), cluster * 2048 + 512)
        before = trio.lowlevel.current_statistics().tasks_living
        nursery.start_soon(round_off, disk)
        await trio.testing.wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().tasks_living - before < 10
        assert len(backing.reads) == 2
        nursery.cancel_scope.cancel()


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
