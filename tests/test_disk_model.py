# SPDX-License-Identifier: Apache-2.0
"""The streamed disk against a byte model: concurrent requests, fetches that are held
back, reordered or fail, signals from the leaf at every call, full disks, reopens.

The disk is cut into cells, smaller than a block, so that requests cover blocks in part.
Every write fills its cells with a value of its own. For each cell the model knows which
values it may hold: those of the writes under way, and what was there before them; a
write that has completed leaves only its own, unless another one overlapped it in time.
A read may return, for each cell, any value that was possible at some time while it ran.
"""

import errno
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdstream.backing.base import Priority
from nbdstream.disk import DetectZeroes, StreamedDisk, open_disk
from nbdstream.errors import BackingError
from nbdstream.export import Hit
from tests.doubles import GatedBacking, MemoryLeaf, poison_buffers

CELL = 128
BLOCK = 512
CLUSTER = 2048
SIZE = 16 * 1024 + 3 * CELL  # the last block and the last cluster are short
CELLS = SIZE // CELL

poisoned = pytest.fixture(poison_buffers, scope="module", autouse=True)


def backing_value(cell: int) -> int:
    """What the backing holds: never a value that a write uses; zero here and there."""
    return 0 if cell % 11 in (3, 4, 5, 6, 7) else 200 + cell % 50


CONTENT = b"".join(bytes([backing_value(cell)]) * CELL for cell in range(CELLS))


@dataclass
class Change:
    """A write, zero or trim under way."""

    cells: range
    value: int
    overlapped: set[int] = field(default_factory=set)


class Model:
    """Which values each cell may hold."""

    def __init__(self) -> None:
        self.possible = [{backing_value(cell)} for cell in range(CELLS)]
        self.changes: list[Change] = []
        self.reads: list[tuple[range, list[set[int]]]] = []

    @contextmanager
    def changing(self, cells: range, value: int) -> Iterator[None]:
        """A change of these cells is under way; leaving with an exception means that it
        failed, so that old and new values stay possible."""
        change = Change(cells, value)
        for other in self.changes:
            common = set(other.cells) & set(cells)
            other.overlapped |= common
            change.overlapped |= common
        self.changes.append(change)
        for cell in cells:
            self.possible[cell] = self.possible[cell] | {value}
        for read_cells, seen in self.reads:
            for cell in set(read_cells) & set(cells):
                seen[cell - read_cells.start].add(value)
        try:
            yield
        except (OSError, BackingError):
            self.changes.remove(change)
            for other in self.changes:
                other.overlapped |= set(other.cells) & set(cells)
            return
        self.changes.remove(change)
        for cell in set(cells) - change.overlapped:
            self.possible[cell] = {value}

    @contextmanager
    def reading(self, cells: range) -> Iterator[list[set[int]]]:
        """Collects, for each cell, the values that were possible during the read."""
        entry = (cells, [set(self.possible[cell]) for cell in cells])
        self.reads.append(entry)
        try:
            yield entry[1]
        finally:
            self.reads.remove(entry)


class Driver:
    """Applies steps to a disk and checks it against the model."""

    def __init__(self, seed: int, *, detect_zeroes: DetectZeroes) -> None:
        self.random = random.Random(seed)
        self.leaf = MemoryLeaf(SIZE, block_size=BLOCK, cluster_size=CLUSTER)
        self.leaf.signal = self.signal
        self.backing = GatedBacking(CONTENT, gated=True)
        self.detect_zeroes = detect_zeroes
        self.model = Model()
        self.nuisance = 0.0
        self.value = 0
        self.disturbed = False

    def signal(self) -> None:
        """Now and then the leaf needs its metadata warmed, or flushed."""
        dice = self.random.random()
        if dice < self.nuisance / 2:
            raise self.leaf.cold()
        if dice < self.nuisance:
            raise self.leaf.full()

    def next_value(self) -> int:
        self.value = self.value % 199 + 1
        return self.value

    async def change(self, disk: StreamedDisk, kind: str, cells: range) -> None:
        offset, length = cells.start * CELL, len(cells) * CELL
        if kind == "trim":
            first = -(-offset // BLOCK) * BLOCK
            end = offset + length
            end = end if end == SIZE else end // BLOCK * BLOCK
            with self.model.changing(range(first // CELL, max(end, first) // CELL), 0):
                await disk.trim(offset, length, fua=self.random.random() < 0.2)
        elif kind == "zero":
            with self.model.changing(cells, 0):
                await disk.zero(
                    offset,
                    length,
                    may_trim=self.random.random() < 0.5,
                    fast_only=False,
                    fua=self.random.random() < 0.2,
                )
        else:
            value = 0 if kind == "write zeroes" else self.next_value()
            view = memoryview(bytes([value]) * length)
            with self.model.changing(cells, value):
                if disk.write_nowait(view, offset) is Hit.MISS:
                    await disk.write(view, offset, fua=self.random.random() < 0.2)

    async def read(self, disk: StreamedDisk, cells: range) -> None:
        data = bytearray(len(cells) * CELL)
        view = memoryview(data)
        offset = cells.start * CELL
        with self.model.reading(cells) as seen:
            try:
                hit = disk.read_nowait(view, offset)
                holes = await disk.read(view, offset) if hit is Hit.MISS else []
            except BackingError:
                return
            for index, allowed in enumerate(seen):
                got = set(data[index * CELL : (index + 1) * CELL])
                assert got <= allowed, f"cell {cells[index]}: {got} not among {allowed}"
            for start, length in holes:
                assert not any(data[start - offset : start - offset + length])

    async def quietly(self, disk: StreamedDisk, kind: str, cells: range) -> None:
        """Requests that change no content."""
        try:
            if kind == "flush":
                await disk.flush()
            elif kind == "cache":
                await disk.cache(cells.start * CELL, len(cells) * CELL)
            elif kind == "stream":
                await disk.populate(cells.start * CELL, len(cells) * CELL, Priority.STREAM)
            else:
                position = cells.start * CELL
                for status in await disk.block_status(position, len(cells) * CELL, 5):
                    assert status.offset == position
                    position += status.length
        except (BackingError, OSError):
            pass  # told to fail; what matters is the content

    async def step(self, disk: StreamedDisk, nursery: trio.Nursery, step: "Step") -> None:
        kind, cells, number = step
        if kind in ("write", "write zeroes", "zero", "trim"):
            nursery.start_soon(self.change, disk, kind, cells)
        elif kind == "read":
            nursery.start_soon(self.read, disk, cells)
        elif kind in ("flush", "cache", "stream", "status"):
            nursery.start_soon(self.quietly, disk, kind, cells)
        elif kind == "answer":
            self.answer(number, fail=False)
        elif kind == "fail":
            self.disturbed = True
            self.answer(number, fail=True)
        elif kind == "settle":
            await trio.testing.wait_all_tasks_blocked()
        elif kind == "nuisance":
            self.nuisance = number / 100 * 0.6
        elif kind == "copy on read":
            disk.copy_on_read = number % 2 == 0
            self.disturbed = self.disturbed or not disk.copy_on_read
        elif kind == "full":
            full = number % 2 == 0
            self.disturbed = self.disturbed or full
            self.leaf.store_error = OSError(errno.ENOSPC, "full") if full else None

    def answer(self, number: int, *, fail: bool) -> None:
        """Let one of the reads that wait go on: in any order."""
        waiting = self.backing.waiting
        if waiting:
            read = waiting[number % len(waiting)]
            read.fail = fail
            read.gate.set()

    async def run(self, steps: list["Step"], *, reopen_every: int) -> None:
        for start in range(0, len(steps), reopen_every):
            self.backing.gated = True
            async with open_disk(self.leaf, self.backing, detect_zeroes=self.detect_zeroes) as disk:
                async with trio.open_nursery() as nursery:
                    for step in steps[start : start + reopen_every]:
                        await self.step(disk, nursery, step)
                    self.open_gates()
                self.leaf.store_error = None
                await self.read(disk, range(CELLS))
            assert not self.leaf.dirty
        await self.finish()

    def open_gates(self) -> None:
        self.backing.gated = False
        for read in self.backing.waiting:
            read.gate.set()

    async def finish(self) -> None:
        """Stream the rest, drop the backing, and look at everything once more."""
        async with open_disk(self.leaf, self.backing) as disk:
            await disk.populate(0, SIZE, Priority.STREAM)
            await disk.complete(keep_backing=False)
            assert self.leaf.backing is None
            reads = len(self.backing.reads)
            await self.read(disk, range(CELLS))
            assert len(self.backing.reads) == reads
        if not self.disturbed:
            assert self.backing.fetched_twice() == []


Step = tuple[str, range, int]


@st.composite
def cell_ranges(draw: st.DrawFn) -> range:
    start = draw(st.integers(0, CELLS - 1))
    return range(start, min(CELLS, start + draw(st.integers(1, 24))))


KINDS = st.sampled_from(
    ["write"] * 4
    + ["read"] * 4
    + ["answer"] * 6
    + ["write zeroes", "zero", "trim", "flush", "cache", "stream", "status"]
    + ["fail", "settle", "settle", "nuisance", "copy on read", "full"]
)
STEPS = st.lists(st.tuples(KINDS, cell_ranges(), st.integers(0, 100)), min_size=5, max_size=80)


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
@given(
    steps=STEPS,
    seed=st.integers(0, 2**32),
    reopen_every=st.integers(10, 80),
    detect_zeroes=st.sampled_from(DetectZeroes),
)
def test_the_disk_shows_what_was_written_and_the_backing_elsewhere(
    steps: list[Step], seed: int, reopen_every: int, detect_zeroes: DetectZeroes
) -> None:
    driver = Driver(seed, detect_zeroes=detect_zeroes)
    try:
        trio.run(lambda: driver.run(steps, reopen_every=reopen_every))
    finally:
        driver.leaf.close()
