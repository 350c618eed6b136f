# SPDX-License-Identifier: Apache-2.0
"""Letting go of a leaf while requests are under way: the race of docs/concurrency.md."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from nbdstream.disk import open_disk
from nbdstream.errors import UsageError
from nbdstream.export import Hit
from nbdstream.handover.custody import DRAIN_SECONDS, HOLD_SECONDS, RETRY_SECONDS, Custody
from nbdstream.leaf import create_leaf, open_leaf
from nbdstream.leaf.base import LeafExtent
from tests.doubles import MemoryLeaf

SIZE = 64 * 1024
PAGE = b"page" * 1024
PACKED = bytes(5 + i % 13 for i in range(2048))


def before_a_worker_reads(leaf: MemoryLeaf, act: Callable[[], None]) -> None:
    """Run ``act`` once, in the worker that reads the leaf, before it has read anything."""
    real = leaf.read

    def reading(extent: LeafExtent, view: memoryview) -> None:
        leaf.read = real  # type: ignore[method-assign]
        act()
        real(extent, view)

    leaf.read = reading  # type: ignore[method-assign]


async def test_a_leaf_is_let_go_of_after_the_requests_that_are_under_way() -> None:
    leaf = MemoryLeaf(SIZE)
    async with open_disk(leaf, None) as disk, trio.open_nursery() as nursery:
        leaf.compress(2048, PACKED)
        custody = Custody(disk, nursery)
        late: list[str] = []

        async def write_late() -> None:
            await custody.write(memoryview(b"n" * 512), 0, fua=False)
            late.append("written")

        async def let_go_meanwhile() -> None:
            nursery.start_soon(custody.release)
            await trio.testing.wait_all_tasks_blocked()
            assert custody.let_go and not disk.gate.let_go
            nursery.start_soon(write_late)
            await trio.testing.wait_all_tasks_blocked()

        before_a_worker_reads(leaf, lambda: trio.from_thread.run(let_go_meanwhile))
        data = bytearray(2048)
        await custody.read(memoryview(data), 2048)
        assert data == PACKED
        await custody.release()  # waits for the first one
        assert disk.gate.let_go and not late
        nursery.cancel_scope.cancel()


async def test_a_release_that_is_cancelled_or_in_vain_changes_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A tool that hung up while requests were under way used to leave all others held."""
    leaf = MemoryLeaf(SIZE)
    page = memoryview(b"w" * 512)
    async with open_disk(leaf, None) as disk, trio.open_nursery() as nursery:
        custody = Custody(disk, nursery)
        async with custody._request():
            with trio.move_on_after(DRAIN_SECONDS / 2) as hang_up:
                await custody.release()
            assert hang_up.cancelled_caught and not custody.let_go
            await custody.write(page, 0, fua=False)
            with pytest.raises(UsageError, match="requests are under way"):
                await custody.release()
            await custody.write(page, 512, fua=False)
        await custody.release()
        assert custody.let_go and disk.gate.let_go
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def kept(path: Path) -> AsyncIterator[Custody]:
    """A raw leaf that is complete, with a page of data, in custody."""
    create_leaf(str(path), format="raw", size=SIZE, cluster_size=None, backing=None)
    leaf = open_leaf(str(path), format="raw")
    try:
        async with open_disk(leaf, None) as disk, trio.open_nursery() as nursery:
            custody = Custody(disk, nursery)
            await custody.write(memoryview(PAGE), 0, fua=False)
            yield custody
            nursery.cancel_scope.cancel()
    finally:
        leaf.close()


async def test_a_leaf_that_was_taken_back_is_the_same_disk_with_its_hot_path(
    tmp_path: Path,
) -> None:
    """It used to be another disk, which the control socket and open connections did not have."""
    async with kept(tmp_path / "leaf.raw") as custody:
        disk, read, write = custody.disk, custody.read_nowait, custody.write_nowait
        before = disk.statistics()
        for _ in range(2):
            await custody.release()
            assert write(memoryview(PAGE), 0) is Hit.MISS
            with pytest.raises(OSError, match="let go of"):
                await disk.leaf_extents(0, SIZE, 8)
            assert await custody.take_back()
            assert not await custody.take_back()
            view = bytearray(len(PAGE))
            assert custody.disk is disk and not disk.gate.reason
            assert read(memoryview(view), 0) is Hit.DONE and view == PAGE
            assert write(memoryview(PAGE), len(PAGE)) is Hit.DONE
            extents = await disk.leaf_extents(0, SIZE, 8)
            assert sum(extent.length for extent in extents) == SIZE
        await custody.flush()
        assert disk.statistics()["flushes"] > before["flushes"]
    data = (tmp_path / "leaf.raw").read_bytes()
    assert data[: 2 * len(PAGE)] == 2 * PAGE
    open_leaf(str(tmp_path / "leaf.raw"), format="raw").close()  # it is not locked


async def test_a_leaf_that_was_not_taken_over_is_taken_back_unasked(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The tool that asked for it may have died: the guest's requests must not be held for ever."""
    async with kept(tmp_path / "leaf.raw") as custody:
        began = trio.current_time()
        await custody.release()
        view = bytearray(len(PAGE))
        await custody.read(memoryview(view), 0)
        assert view == PAGE and not custody.let_go
        assert trio.current_time() - began >= HOLD_SECONDS


async def test_a_leaf_that_another_process_has_is_held_and_the_status_says_so(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "leaf.raw"
    async with kept(path) as custody, trio.open_nursery() as nursery:
        await custody.release()
        other = open_leaf(str(path), format="raw")
        nursery.start_soon(custody.read, memoryview(bytearray(512)), 0)
        while "requests are held" not in custody.disk.gate.reason:  # noqa: ASYNC110 - virtual time
            await trio.sleep(RETRY_SECONDS)
        assert custody.let_go
        other.close()
        while custody.let_go:  # noqa: ASYNC110
            await trio.sleep(RETRY_SECONDS)
        assert not custody.disk.gate.reason
