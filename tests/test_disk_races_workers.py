# SPDX-License-Identifier: Apache-2.0
"""The races of docs/concurrency.md with workers, failures and ends, each forced step by step."""

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from nbdstream.backing.connect import Endpoint
from nbdstream.backing.nbd import NbdBacking
from nbdstream.disk import StreamedDisk, open_disk
from nbdstream.disk.reads import Reader
from nbdstream.errors import BackingGoneError, BackingReadError
from nbdstream.export import Hit
from nbdstream.extents import BackingExtent
from nbdstream.leaf.base import LeafExtent, State
from tests.doubles import GatedBacking, MemoryLeaf

SIZE = 64 * 1024
CLUSTER = 2048
CONTENT = bytes(1 + i * 7 % 251 for i in range(SIZE))


class SlowLeaf(MemoryLeaf):
    """Reads by workers wait until they may begin, or end."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.reading = threading.Event()
        self.go_on = threading.Event()

    def read(self, extent: LeafExtent, view: memoryview) -> None:
        super().read(extent, view)
        self.reading.set()
        assert self.go_on.wait(10)


@asynccontextmanager
async def slow_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[StreamedDisk, SlowLeaf]]:
    """A disk whose local data is never in the page cache."""
    monkeypatch.setattr(Reader, "_read_hot", lambda *_args: False)
    leaf = SlowLeaf()
    async with open_disk(leaf, GatedBacking(CONTENT)) as disk:
        yield disk, leaf
        leaf.go_on.set()
    leaf.close()


async def until(event: threading.Event) -> None:
    with trio.fail_after(10):
        while not event.is_set():  # noqa: ASYNC110 - a thread sets it
            await trio.sleep(0.001)


async def read(disk: StreamedDisk, offset: int, length: int) -> bytes:
    data = bytearray(length)
    await disk.read(memoryview(data), offset)
    return bytes(data)


async def test_a_cold_read_whose_space_is_given_back_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with slow_disk(monkeypatch) as (disk, leaf):
        assert disk.write_nowait(memoryview(b"w" * 512), 0) is Hit.DONE
        results: list[bytes] = []

        async def reader() -> None:
            results.append(await read(disk, 0, 512))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await until(leaf.reading)
            await disk.trim(0, 512, fua=False)
            leaf.go_on.set()
        assert results == [bytes(512)]


async def test_a_compressed_cluster_that_is_overwritten_while_it_is_unpacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with slow_disk(monkeypatch) as (disk, leaf):
        leaf.compress(0, CONTENT[:CLUSTER])
        async with trio.open_nursery() as nursery:

            async def write_a_part() -> None:
                await disk.write(memoryview(b"part"), 100, fua=False)

            nursery.start_soon(write_a_part)
            await until(leaf.reading)
            assert disk.write_nowait(memoryview(b"w" * CLUSTER), 0) is Hit.DONE
            leaf.go_on.set()
        whole = b"w" * 100 + b"part" + b"w" * (CLUSTER - 104)
        assert await read(disk, 0, CLUSTER) == whole


async def failing_fetch_under_a_write(
    work: Callable[[StreamedDisk], object],
) -> None:
    """Start ``work``, which waits for a fetch of the first cluster; write that cluster; have the
    fetch fail."""
    leaf = MemoryLeaf(SIZE)
    backing = GatedBacking(CONTENT, gated=True)
    async with open_disk(leaf, backing) as disk, trio.open_nursery() as nursery:
        nursery.start_soon(work, disk)  # type: ignore[arg-type]
        await trio.testing.wait_all_tasks_blocked()
        assert disk.write_nowait(memoryview(b"w" * CLUSTER), 0) is Hit.DONE
        backing.reads[0].fail = True
        backing.reads[0].gate.set()
    leaf.close()


async def test_a_reader_whose_fetch_fails_takes_what_the_guest_wrote_meanwhile() -> None:
    results: list[bytes] = []

    async def reader(disk: StreamedDisk) -> None:
        results.append(await read(disk, 0, 512))

    await failing_fetch_under_a_write(reader)
    assert results == [b"w" * 512]


async def test_a_partial_write_whose_fetch_fails_goes_over_a_whole_one() -> None:
    async def writer(disk: StreamedDisk) -> None:
        await disk.write(memoryview(b"part"), 100, fua=False)
        assert await read(disk, 96, 12) == b"wwwwpartwwww"

    await failing_fetch_under_a_write(writer)


async def test_the_disk_becomes_complete_while_a_guest_reads() -> None:
    """The backing is closed then: a reader that still waits for it must not be failed."""
    leaf = MemoryLeaf(SIZE)
    backing = GatedBacking(CONTENT, gated=True)
    async with open_disk(leaf, backing) as disk, trio.open_nursery() as nursery:
        results: list[bytes] = []

        async def reader() -> None:
            results.append(await read(disk, 0, 512))

        nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        await disk.write(memoryview(b"w" * SIZE), 0, fua=False)
        await disk.complete(keep_backing=False)
        assert disk.backing is None and disk.completed.is_set()
        backing.error = BackingReadError("the backing was closed")
        backing.reads[0].gate.set()
    assert results == [b"w" * 512]
    leaf.close()


async def test_readers_of_a_disk_that_is_closed_get_an_error_and_no_garbage() -> None:
    leaf = MemoryLeaf(SIZE)
    backing = GatedBacking(CONTENT, gated=True)
    errors: list[Exception] = []
    async with trio.open_nursery() as readers:
        async with open_disk(leaf, backing) as disk:

            async def reader() -> None:
                try:
                    await read(disk, 0, 512)
                except BackingGoneError as error:
                    errors.append(error)

            for _ in range(3):
                readers.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        assert len(errors) == 3
    assert State.DATA not in leaf.states
    leaf.close()


async def test_changes_of_a_read_only_leaf_are_refused_and_end() -> None:
    """They used to ask for flushes for ever, which a read-only leaf does not make."""
    leaf = MemoryLeaf(SIZE)
    leaf.read_only = True
    async with open_disk(leaf, GatedBacking(CONTENT)) as disk:
        leaf.signal = lambda: (_ for _ in ()).throw(leaf.full())
        with trio.fail_after(1), pytest.raises(OSError, match="read-only"):
            await disk.write(memoryview(b"w" * 512), 0, fua=False)
    leaf.close()


async def test_block_status_that_was_under_way_across_a_switch_over_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An old "zero" would hide what the guest has written at the source since."""
    backing = NbdBacking(Endpoint("nbd://localhost", "far"), SIZE, None)
    answers = [[BackingExtent(0, SIZE, zero=True)], [BackingExtent(0, SIZE, zero=False)]]
    gate = trio.Event()

    async def answer(*_args: object) -> list[BackingExtent]:
        await gate.wait()
        return answers.pop(0)

    monkeypatch.setattr(backing, "_until_answered", answer)
    found: list[list[BackingExtent]] = []

    async def ask() -> None:
        found.append(await backing.extents(0, SIZE))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        backing.forget()
        gate.set()
    assert found == [[BackingExtent(0, SIZE, zero=False)]]
    assert not backing.known_zero(0, SIZE)
