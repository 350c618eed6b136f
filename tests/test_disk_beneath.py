# SPDX-License-Identifier: Apache-2.0
"""Reads by way of the local copy of a backing, which gets what it lacks by one request: whatever
becomes of the request, a guest reads what is right, and its writes win."""

import enum
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from nbdstream.backing.base import Backing, Priority
from nbdstream.backing.padded import PaddedBacking
from nbdstream.backing.wrapped import WrappedBacking
from nbdstream.disk import StreamedDisk, open_disk
from nbdstream.export import Hit
from nbdstream.leaf.base import FlushNeeded, State
from tests.doubles import GatedBacking, MemoryLeaf

KIB = 1024
BLOCK, CLUSTER = 4 * KIB, 64 * KIB
SIZE = 8 * CLUSTER
CONTENT = random.Random(1).randbytes(SIZE)

pytestmark = pytest.mark.timeout(30)


class Outcome(enum.Enum):
    """What becomes of a request to bring something."""

    BROUGHT = enum.auto()
    REFUSED = enum.auto()
    LOST = enum.auto()  # it says yes, and the copy does not have it


class Copy:
    """A local copy: implements `LocalCopy`."""

    path = "copy"
    hot = 0

    def __init__(self) -> None:
        self.fd = os.memfd_create("copy")
        os.ftruncate(self.fd, SIZE)
        self.complete = trio.Event()
        self.blocks: set[int] = set()

    def has(self, offset: int, length: int) -> bool:
        return self.blocks >= set(range(offset // BLOCK, -(-(offset + length) // BLOCK)))

    async def read(self, view: memoryview, offset: int) -> bool:
        await trio.lowlevel.checkpoint()
        return self.has(offset, len(view)) and os.preadv(self.fd, (view,), offset) == len(view)

    def get(self, offset: int, length: int) -> None:
        os.pwrite(self.fd, CONTENT[offset : offset + length], offset)
        self.blocks.update(range(offset // BLOCK, -(-(offset + length) // BLOCK)))


class StoreBacking(GatedBacking):
    """A backing with a local copy. ``meanwhile`` runs while something is brought."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(CONTENT)
        self.copy = self.local = Copy()
        self.outcome = outcome
        self.brought: list[tuple[int, int]] = []
        self.meanwhile = trio.lowlevel.checkpoint

    async def bring(self, offset: int, length: int) -> bool:
        self.brought.append((offset, length))
        await self.meanwhile()
        if self.outcome is Outcome.BROUGHT:
            self.copy.get(offset, length)
        return self.outcome is not Outcome.REFUSED


@asynccontextmanager
async def opened(
    outcome: Outcome = Outcome.BROUGHT, *, thin: bool = False, longer: int = 0
) -> AsyncIterator[tuple[StreamedDisk, MemoryLeaf, StoreBacking]]:
    """With ``longer``, the leaf has so many bytes more than the backing."""
    size, backing = SIZE + longer, StoreBacking(outcome)
    leaf = MemoryLeaf(size, block_size=BLOCK, cluster_size=CLUSTER)
    fitted = PaddedBacking(backing, size) if longer else backing
    async with open_disk(leaf, fitted, thin=thin) as disk:
        yield disk, leaf, backing
    leaf.close()
    os.close(backing.copy.fd)


async def read(disk: StreamedDisk, offset: int, length: int) -> bytes:
    """As the server does."""
    data = bytearray(length)
    hit = disk.read_nowait(memoryview(data), offset)
    if hit is Hit.MISS:
        for start, size in await disk.read(memoryview(data), offset):
            data[start - offset : start - offset + size] = bytes(size)
    return bytes(data)


def local(leaf: MemoryLeaf) -> set[int]:
    """The blocks that the leaf has."""
    return {n for n, state in enumerate(leaf.states) if state is not State.UNALLOCATED}


@pytest.mark.parametrize("outcome", Outcome)
@pytest.mark.parametrize("thin", [False, True])
async def test_a_miss_is_answered_whatever_becomes_of_the_request(
    outcome: Outcome, thin: bool
) -> None:
    async with opened(outcome, thin=thin) as (disk, leaf, backing):
        for offset, length in ((5 * BLOCK, BLOCK), (CLUSTER + 100, 9000), (2 * CLUSTER, CLUSTER)):
            assert await read(disk, offset, length) == CONTENT[offset : offset + length]
        # The copy of a cluster of which a part of a block was read is another matter.
        demand = [each for each in backing.reads if each.priority is Priority.DEMAND]
        assert (demand == []) is (outcome is Outcome.BROUGHT)
        assert backing.brought[0] == (0, CLUSTER)
        if thin:
            assert local(leaf) == set()


async def test_a_filled_leaf_takes_the_blocks_that_were_read_at_once() -> None:
    async with opened() as (disk, leaf, backing):
        await read(disk, 5 * BLOCK, 2 * BLOCK)
        assert local(leaf) == {5, 6}
        assert await read(disk, 5 * BLOCK, BLOCK) == CONTENT[5 * BLOCK :][:BLOCK]
        assert backing.brought == [(0, CLUSTER)]


async def test_a_leaf_that_needs_a_flush_takes_them_later() -> None:
    async with opened() as (disk, leaf, _backing):
        write, needed = leaf.write, [True]

        def first_flush(offset: int, view: memoryview) -> None:
            if needed.pop() if needed else False:
                raise FlushNeeded
            write(offset, view)

        leaf.write = first_flush  # type: ignore[method-assign]
        assert await read(disk, 5 * BLOCK, BLOCK) == CONTENT[5 * BLOCK :][:BLOCK]
        assert local(leaf) == set()
        while not local(leaf):  # noqa: ASYNC110
            await trio.sleep(0.001)
        assert local(leaf) == set(range(CLUSTER // BLOCK))


@pytest.mark.parametrize("outcome", Outcome)
async def test_a_write_while_it_is_brought_wins(outcome: Outcome) -> None:
    async with opened(outcome) as (disk, _leaf, backing):
        written = b"w" * BLOCK

        async def write() -> None:
            await disk.write(memoryview(written), 5 * BLOCK, fua=False)

        backing.meanwhile = write
        assert await read(disk, 4 * BLOCK, 3 * BLOCK) == (
            CONTENT[4 * BLOCK : 5 * BLOCK] + written + CONTENT[6 * BLOCK : 7 * BLOCK]
        )
        await trio.testing.wait_all_tasks_blocked()
        assert await read(disk, 5 * BLOCK, BLOCK) == written


async def test_only_what_the_leaf_lacks_is_brought() -> None:
    async with opened() as (disk, _leaf, backing):
        await disk.write(memoryview(b"w" * CLUSTER), 0, fua=False)
        await read(disk, CLUSTER - BLOCK, 2 * BLOCK)
        assert backing.brought == [(CLUSTER, CLUSTER)]


@pytest.mark.parametrize("thin", [False, True])
async def test_a_leaf_that_is_longer_than_the_image_has_the_image_brought_as_well(
    thin: bool,
) -> None:
    async with opened(thin=thin, longer=CLUSTER) as (disk, _leaf, backing):
        last = SIZE - BLOCK
        assert await read(disk, last, BLOCK) == CONTENT[last:]
        assert await read(disk, last, 2 * BLOCK) == CONTENT[last:] + bytes(BLOCK)
        assert await read(disk, SIZE, CLUSTER) == bytes(CLUSTER)
        assert backing.brought[0] == (SIZE - CLUSTER, CLUSTER)
        assert all(offset + length <= SIZE for offset, length in backing.brought)


def test_a_wrapped_backing_passes_each_call_on() -> None:
    calls = {name for name, what in vars(Backing).items() if callable(what)}
    assert "bring" in calls
    assert calls <= set(vars(WrappedBacking))
