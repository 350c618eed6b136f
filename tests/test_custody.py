# SPDX-License-Identifier: Apache-2.0
"""Letting go of a leaf while requests are under way: the race of docs/concurrency.md."""

from collections.abc import Callable

import pytest
import trio
import trio.testing

from nbdstream.disk import open_disk
from nbdstream.errors import UsageError
from nbdstream.handover.custody import DRAIN_SECONDS, Custody
from nbdstream.leaf.base import LeafExtent
from tests.doubles import MemoryLeaf

SIZE = 64 * 1024
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
