# SPDX-License-Identifier: Apache-2.0
"""The life of a disk in which faults are injected: guests, the stream job, checkpoints,
commands to the job, completion and a clean stop.

It runs on trio's virtual clock, with worker threads' calls made in the event loop between
two yields, and with a fixed order of tasks for each seed: the same point is always the same
moment.
"""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
import trio.testing

from nbdstream.backing.base import Backing
from nbdstream.disk import StreamedDisk, open_disk
from nbdstream.errors import BackingError, NbdstreamError
from nbdstream.export import Hit
from nbdstream.leaf import open_leaf
from nbdstream.leaf.base import SyncError
from nbdstream.streamer.job import JobStatus, StreamJob
from testbed.faults.backing import MemoryBacking
from testbed.faults.oracle import CELL, ZERO, Oracle, backing_cell, written_cell
from testbed.faults.shim import Shim

CELLS = 193
SIZE = CELLS * CELL
CLIENTS = 3
STRIPE = 6
OPERATIONS = 9
CONTENT = b"".join(backing_cell(cell) for cell in range(CELLS))
# A fault of one call may fail the requests that wait for it, and no others.
FAILED_MOST = 2 * CLIENTS
RESUMES = 8


def stripes(number: int, clients: int) -> list[range]:
    """The cells that belong to one of so many clients."""
    starts = range(number * STRIPE, CELLS, clients * STRIPE)
    return [range(start, min(start + STRIPE, CELLS)) for start in starts]


def drawn_request(numbers: random.Random, owned: list[range]) -> tuple[str, range]:
    """A client's next request: its kind, and cells of its own."""
    stripe = numbers.choice(owned)
    first = numbers.randrange(stripe.start, stripe.stop)
    cells = range(first, numbers.randint(first + 1, stripe.stop))
    return numbers.choice(["write", "write", "write", "zero", "trim", "read", "flush"]), cells


@dataclass
class Canceller:
    """Cancels the scope of `victim` at its step `number`; counts steps of all victims."""

    victim: str = ""
    number: int = -1
    counts: dict[str, int] = field(default_factory=dict)
    scopes: dict[str, trio.CancelScope] = field(default_factory=dict)
    tasks: dict[trio.lowlevel.Task, str] = field(default_factory=dict)
    fired: bool = False

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        name = self.tasks.get(task, "")
        for one in (name, "service"):
            if one not in self.scopes:
                continue
            number = self.counts.get(one, 0)
            self.counts[one] = number + 1
            if one == self.victim and number == self.number:
                self.fired = True
                self.scopes[one].cancel()

    @asynccontextmanager
    async def scope(self, name: str) -> AsyncIterator[trio.CancelScope]:
        """What `name` cancels while the block lasts."""
        self.tasks.setdefault(trio.lowlevel.current_task(), name)
        with trio.CancelScope() as scope:
            self.scopes[name] = scope
            try:
                yield scope
            finally:
                self.scopes.pop(name, None)


class _Instrument(trio.abc.Instrument):
    def __init__(self, canceller: Canceller) -> None:
        self._canceller = canceller

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._canceller.after_task_step(task)


@dataclass
class Life:
    """One life of one leaf, and what was seen of it."""

    path: Path
    format: str
    shim: Shim
    canceller: Canceller
    seed: int
    backing: Callable[[], AbstractAsyncContextManager[Backing]] = lambda: nullcontext(
        MemoryBacking(CONTENT)
    )
    oracle: Oracle = field(default_factory=lambda: Oracle.of_backing(CELLS))
    failed: list[str] = field(default_factory=list)
    sync_failed: bool = False
    stopped_clean: bool = False
    ended_by: BaseException | None = None

    def run(self) -> None:
        """Live. An error that ends it is in `ended_by`."""
        run_module: Any = trio._core._run
        before = run_module._ALLOW_DETERMINISTIC_SCHEDULING, trio.to_thread.run_sync
        run_module._ALLOW_DETERMINISTIC_SCHEDULING = True
        run_module._r.seed(self.seed)
        random.seed(self.seed)  # delays before another attempt are jittered
        trio.to_thread.run_sync = _in_the_loop  # type: ignore[assignment]
        try:
            with self.shim.installed():
                trio.run(
                    self._live,
                    clock=trio.testing.MockClock(autojump_threshold=0),
                    instruments=[_Instrument(self.canceller)],
                )
        finally:
            run_module._ALLOW_DETERMINISTIC_SCHEDULING, trio.to_thread.run_sync = before
            self.shim.armed = False

    async def _live(self) -> None:
        self.shim.armed = True
        try:
            leaf = open_leaf(str(self.path), format=self.format)
        except (OSError, NbdstreamError) as error:
            self.ended_by = error  # said, and nothing is served
            return
        try:
            async with self.canceller.scope("service"):
                with trio.fail_after(3600):
                    async with self.backing() as backing, open_disk(leaf, backing) as disk:
                        await self._serve(disk)
        except (OSError, BackingError) as error:
            self.ended_by = error  # the last flush, or the start: the caller is told
        except BaseException as error:
            self.oracle.broken.append(f"ended by {error!r}: {_inner(error)}")
            self.ended_by = error
        try:
            leaf.close()
            self.stopped_clean = self.ended_by is None
        except (OSError, NbdstreamError) as error:
            self.ended_by = error
        except Exception as error:
            self.oracle.broken.append(f"closing the leaf: {error!r}")
            self.ended_by = error

    async def _serve(self, disk: StreamedDisk) -> None:
        job = StreamJob(disk, job_id="job")
        async with trio.open_nursery() as nursery:
            job.start()
            nursery.start_soon(self._run_job, job)
            async with trio.open_nursery() as guests:
                for number in range(CLIENTS):
                    guests.start_soon(_Client(self, disk, number).run)
                guests.start_soon(self._steer, job)
            await self._until_streamed(disk, job)
            for number in range(CLIENTS):  # each guest is served to the end
                await _Client(self, disk, number).read_all()
            nursery.cancel_scope.cancel()

    async def _run_job(self, job: StreamJob) -> None:
        async with self.canceller.scope("job"):
            await job.run()

    async def _steer(self, job: StreamJob) -> None:
        await trio.sleep(0.35)
        for step in (job.pause, job.resume, lambda: job.set_speed(1 << 20)):
            try:
                step()
            except NbdstreamError:
                pass  # the job is not in such a state: also an answer
            await trio.sleep(0.2)

    async def _until_streamed(self, disk: StreamedDisk, job: StreamJob) -> None:
        """Resume a job that a fault has paused, or start another, as its operator would."""
        for _ in range(RESUMES):
            with trio.move_on_after(30):
                await disk.completed.wait()
                return
            if job.status is JobStatus.PAUSED:
                job.resume()
            elif job.status is JobStatus.NULL:
                job.start()
        if not self.sync_failed and not self.canceller.fired and not self._may_stay_remote():
            self.oracle.broken.append(f"the stream never completed: {job.status}")

    def _may_stay_remote(self) -> bool:
        return self.shim.fired and self.shim.call in ("fdatasync", "fsync")


def _inner(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return repr(error)


async def _in_the_loop(call: Callable[..., Any], *arguments: Any, **_options: Any) -> Any:
    """`trio.to_thread.run_sync` without a thread: others run before and after the call."""
    await trio.lowlevel.checkpoint_if_cancelled()
    await trio.lowlevel.cancel_shielded_checkpoint()
    result = call(*arguments)
    await trio.lowlevel.cancel_shielded_checkpoint()
    return result


class _Client:
    """A guest: changes, reads and flushes cells of its own, one request at a time."""

    def __init__(self, life: Life, disk: StreamedDisk, number: int) -> None:
        self._life, self._disk, self._number = life, disk, number
        self._oracle = life.oracle
        self._random = random.Random(f"{life.seed} {number}")
        self._serial = 0
        self._stripes = stripes(number, CLIENTS)
        self._owned = [cell for stripe in self._stripes for cell in stripe]

    async def run(self) -> None:
        for _ in range(OPERATIONS):
            await self._request(*drawn_request(self._random, self._stripes))
            await trio.sleep(self._random.choice([0, 0.05, 0.12]))
        await self._request("flush", range(0))

    async def _request(self, kind: str, cells: range) -> None:
        """One request; what fails is noted, and the guest goes on."""
        done, needed = False, self._life.shim.flushes_needed
        try:
            async with self._life.canceller.scope(f"client{self._number}"):
                await getattr(self, f"_{kind}")(cells)
                done = True
        except SyncError as error:
            # Final for the leaf: from now on changes fail that need a flush, and flushes.
            self._life.sync_failed = True
            may_fail = kind != "read" and needed < self._life.shim.flushes_needed
            if kind != "flush" and not may_fail:
                self._oracle.broken.append(f"{kind}, which needed no flush: {error}")
        except OSError as error:
            self._note(kind, error)
        except NbdstreamError as error:
            self._note(kind, error)
        if done and kind == "flush":
            self._oracle.flushed(self._owned)

    def _note(self, kind: str, error: Exception) -> None:
        if kind != "flush":
            self._life.failed.append(f"{kind}: {error}")

    async def _write(self, cells: range) -> None:
        self._serial += 1
        content = written_cell(self._number, self._serial)
        view = memoryview(content * len(cells))
        self._oracle.begin(cells, content)
        if self._disk.write_nowait(view, cells.start * CELL) is not Hit.DONE:
            await self._disk.write(view, cells.start * CELL, fua=False)
        self._oracle.acknowledge(cells, content)

    async def _zero(self, cells: range) -> None:
        self._oracle.begin(cells, ZERO)
        unmap = self._random.random() < 0.5
        await self._disk.zero(
            cells.start * CELL, len(cells) * CELL, may_trim=unmap, fast_only=False, fua=False
        )
        self._oracle.acknowledge(cells, ZERO)

    async def _trim(self, cells: range) -> None:
        # A trim may leave what it likes of whole blocks: the old content or zeroes.
        self._oracle.begin(cells, ZERO)
        await self._disk.trim(cells.start * CELL, len(cells) * CELL, fua=False)

    async def _flush(self, _cells: range) -> None:
        await self._disk.flush()

    async def _read(self, cells: range) -> None:
        data = bytearray(len(cells) * CELL)
        view = memoryview(data)
        if self._disk.read_nowait(view, cells.start * CELL) is Hit.MISS:
            zeroes = await self._disk.read(view, cells.start * CELL)
            for offset, length in zeroes:
                start = offset - cells.start * CELL
                data[start : start + length] = bytes(length)
        self._oracle.check(bytes(data), cells.start, "a guest's read")

    async def read_all(self) -> None:
        """Read all that is its own; every request has to succeed now."""
        for stripe in self._stripes:
            before = self._life.shim.fired
            try:
                await self._read(stripe)
            except (OSError, NbdstreamError) as error:
                if before or not self._life.shim.fired:  # else this read has met the fault
                    self._oracle.broken.append(f"a read long after the fault: {error}")
                await self._read(stripe)
