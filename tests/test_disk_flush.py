# SPDX-License-Identifier: Apache-2.0
"""A flush is never lost: neither to a cancellation, nor to busy threads, nor to an error."""

import os
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from unittest import mock

import pytest
import trio

from nbdstream.disk.flush import Flusher
from nbdstream.leaf.base import Leaf, SyncError
from tests.journal import Journal, recording
from tests.leaf_support import ImageKind, ours, pattern, read, write
from tests.powercut import Disk

KINDS = [ours("raw"), ours("qed"), ours("qcow2")]
SIZE = 1 << 20
DEADLINE = 30  # seconds


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> ImageKind:
    chosen: ImageKind = request.param
    return chosen


@asynccontextmanager
async def busy_threads() -> AsyncIterator[None]:
    """All of trio's default workers are busy, as with reads of a slow disk."""
    limiter = trio.to_thread.current_default_thread_limiter()
    done = threading.Event()

    async def occupy() -> None:
        await trio.to_thread.run_sync(done.wait)

    async with trio.open_nursery() as nursery:
        for _ in range(int(limiter.total_tokens)):
            nursery.start_soon(occupy)
        while limiter.available_tokens:
            await trio.lowlevel.checkpoint()
        try:
            yield
        finally:
            done.set()


class CancelAt(trio.abc.Instrument):
    """Cancels a scope before the ``number``-th step of a task: at another checkpoint each time."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.task: trio.lowlevel.Task | None = None
        self.scope = trio.CancelScope()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            if self.left == 0:
                self.scope.cancel()
            self.left -= 1

    async def run(self, call: Callable[[], object]) -> None:
        """Run an asynchronous call, to be cancelled."""
        self.task = trio.lowlevel.current_task()
        if self.left == 0:
            self.scope.cancel()
        with self.scope:
            await call()  # type: ignore[misc]


def after_a_cut(journal: Journal, kind: ImageKind, path: Path) -> Leaf:
    """The leaf as it is if the power goes now, and all that is not durable is lost."""
    disk = Disk(journal)
    for operation in journal.operations:
        disk.advance(operation)
    path.mkdir(exist_ok=True)
    for name, content in disk.durable().items():
        (path / name).write_bytes(content)
    return kind.open(path / "disk")


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_a_cancelled_flush_loses_nothing(kind: ImageKind, busy: bool, tmp_path: Path) -> None:
    """Cancelled at each of its checkpoints in turn; then the next flush covers it all."""
    number, ended = 0, False
    while not ended:
        ended = await _cancel_at(number, kind, busy, tmp_path / str(number))
        number += 1
    assert number > 3


async def _cancel_at(number: int, kind: ImageKind, busy: bool, directory: Path) -> bool:
    """One life; whether the flush had ended before the cancellation could come."""
    home = directory / "home"
    home.mkdir(parents=True)
    path = home / "disk"
    leaf = kind.new(path, SIZE)
    block = leaf.block_size
    data = pattern(0, block, 1), pattern(0, block, 2)
    write(leaf, 0, data[0])
    cancel = CancelAt(number)
    with recording(home) as journal, trio.fail_after(DEADLINE):
        # Recorded from here on, so what came before has to be durable.
        flusher = Flusher(leaf)
        await flusher.flush()
        write(leaf, block, data[1])
        async with trio.open_nursery() as nursery:
            trio.lowlevel.add_instrument(cancel)
            if busy:
                async with busy_threads():
                    await cancel.run(flusher.flush)
            else:
                await cancel.run(flusher.flush)
            trio.lowlevel.remove_instrument(cancel)
            nursery.cancel_scope.cancel()
        await flusher.flush()
    survivor = after_a_cut(journal, kind, directory / "cut")
    assert read(survivor, 0, 2 * block, b"") == data[0] + data[1]
    survivor.close()
    leaf.close()
    return cancel.left > 0


async def test_busy_threads_do_not_delay_a_flush(kind: ImageKind, tmp_path: Path) -> None:
    leaf = kind.new(tmp_path / "disk", SIZE)
    write(leaf, 0, pattern(0, leaf.block_size, 1))
    with trio.fail_after(DEADLINE):
        async with busy_threads():
            await Flusher(leaf).flush()
    assert not leaf.dirty
    leaf.close()


async def written_by_the_next_flush(
    flusher: Flusher, leaf: Leaf, kind: ImageKind, path: Path
) -> None:
    """A flush has failed; the next one makes durable what it should have."""
    await flusher.flush()
    assert not leaf.dirty
    leaf.close()
    again = kind.open(path)
    block = again.block_size
    assert read(again, 0, block, b"") == pattern(0, block, 1)
    again.close()


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("fdatasync", MemoryError()),
        ("pwrite", MemoryError()),
        ("fdatasync", KeyError("a mistake")),
        ("thread", RuntimeError("can't start new thread")),
    ],
    ids=["memory-sync", "memory-write", "mistake", "thread"],
)
async def test_any_error_ends_the_flush(
    target: str, error: Exception, kind: ImageKind, tmp_path: Path
) -> None:
    """What was in its snapshot is dirty again, and the next flush has it."""
    path = tmp_path / "disk"
    leaf = kind.new(path, SIZE)
    flusher = Flusher(leaf)
    write(leaf, 0, pattern(0, leaf.block_size, 1))
    where = (trio.to_thread, "run_sync") if target == "thread" else (os, target)
    expected = KeyError if isinstance(error, KeyError) else OSError
    with mock.patch.object(*where, side_effect=error), pytest.raises(expected):
        await flusher.flush()
    assert leaf.dirty
    await written_by_the_next_flush(flusher, leaf, kind, path)


@pytest.mark.parametrize("point", range(6))
async def test_memory_runs_out_while_a_snapshot_is_taken(
    point: int, kind: ImageKind, tmp_path: Path
) -> None:
    """Wherever `Leaf.begin_flush` is interrupted, nothing is forgotten."""
    path = tmp_path / "disk"
    leaf = kind.new(path, SIZE)
    flusher = Flusher(leaf)
    write(leaf, 0, pattern(0, leaf.block_size, 1))
    calls = 0

    def trace(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        if event == "return" and "nbdstream/leaf/" in frame.f_code.co_filename:  # type: ignore[attr-defined]
            calls += 1
            if calls == point + 1:
                raise MemoryError

    real = leaf.begin_flush

    def begin() -> object:
        sys.setprofile(trace)
        try:
            return real()
        finally:
            sys.setprofile(None)

    with mock.patch.object(leaf, "begin_flush", begin):
        try:
            await flusher.flush()
        except OSError:
            assert leaf.dirty
    await written_by_the_next_flush(flusher, leaf, kind, path)


async def test_a_failed_sync_is_final_for_all_who_flush(kind: ImageKind, tmp_path: Path) -> None:
    leaf = kind.new(tmp_path / "disk", SIZE)
    flusher = Flusher(leaf)
    write(leaf, 0, pattern(0, leaf.block_size, 1))
    broken = mock.patch.object(os, "fdatasync", side_effect=OSError(5, "broken"))
    with broken, pytest.raises(SyncError, match="broken"):
        await flusher.flush()
    with pytest.raises(SyncError, match="an earlier sync failed"):
        await flusher.flush()
    with pytest.raises(SyncError, match="an earlier sync failed"):
        await flusher.flush_then(leaf.drop_backing)
    assert flusher.flushes == 0
    with pytest.raises(SyncError, match="an earlier sync failed"):
        leaf.close()
