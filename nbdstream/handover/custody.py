# SPDX-License-Identifier: Apache-2.0
"""Who has the leaf: the disk that clients are served, or another process for now.

Clients are served a `Custody`, which passes their requests on to the disk. When it lets go of
the leaf, the leaf is flushed, closed and unlocked; flushes are still answered (QEMU flushes
the export while it replaces it), and all other requests are held, not failed. Taken back, the
leaf is opened again and the requests go on.

What must hold: the leaf's lock says who has it. It is closed before this says that it was let
go of, and it is taken back only if the lock can be had, and only if it is the same file.

The process that asked for the leaf may die before it has opened it. So after `HOLD_SECONDS` the
leaf is taken back without being asked. While another process has the lock, requests go on being
held, and `StreamedDisk.gate` says so.
"""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from nbdstream.backing import Backing
from nbdstream.disk import StreamedDisk, round_off
from nbdstream.disk.gate import GateState
from nbdstream.errors import LeafError, LeafInUseError, UsageError
from nbdstream.export import StatusExtent
from nbdstream.leaf import open_leaf
from nbdstream.leaf.base import Leaf
from nbdstream.leaf.marks import vouch
from nbdstream.streamer.job import JobStatus, StreamJob
from nbdstream.tasks import in_worker, start_contained

log = logging.getLogger(__name__)

# Why QEMU cannot go on with a leaf of this format as long as it has a backing.
_NOT_OVER_A_BACKING = {
    "raw": "only nbdstream can tell what a raw leaf lacks",
    "qed": "QEMU's driver of QED would show the backing's data where the guest writes zeroes",
}
_REASON = "the leaf was let go of: another process may have it"
# Seconds that requests under way get to end before the leaf is closed.
DRAIN_SECONDS = 5.0
# Seconds for clusters that were local in part when the guest was stopped.
ROUND_OFF_SECONDS = 5.0
# Seconds after which a leaf is taken back unasked, longer than a pivot and its way back take; then
# seconds between attempts.
HOLD_SECONDS = 60.0
RETRY_SECONDS = 5.0


class Custody:
    """Implements `nbdstream.export.Export` over a disk whose leaf may be let go of.

    Attributes:
        disk: the disk over the leaf.
        let_go: whether the leaf is closed, and requests are held.
    """

    def __init__(
        self, disk: StreamedDisk, nursery: trio.Nursery, job: StreamJob | None = None
    ) -> None:
        """``nursery`` runs the task that takes the leaf back unasked; ``job`` works on the disk."""
        self.disk = disk
        self.let_go = False
        self.name = disk.name
        self.description = disk.description
        self.size = disk.size
        self.read_only = disk.read_only
        self.preferred_block_size = disk.preferred_block_size
        # Connections keep these two. While the leaf is let go of, they only say MISS.
        self.read_nowait = disk.read_nowait
        self.write_nowait = disk.write_nowait
        self._nursery = nursery
        self._job = job
        self._stopped: JobStatus | None = None  # what the job was doing when we stopped it
        self._path = disk.leaf.path
        self._identity = _identity(disk.leaf.fd)
        self._turn = trio.Lock()
        self._busy = 0
        self._watch = trio.CancelScope()
        self._changed = trio.lowlevel.ParkingLot()

    # -- requests ------------------------------------------------------------------------

    @asynccontextmanager
    async def _request(self) -> AsyncIterator[StreamedDisk]:
        while self.let_go:
            await self._changed.park()
        self._busy += 1
        try:
            yield self.disk
        finally:
            self._busy -= 1
            if self.let_go and not self._busy:
                self._changed.unpark_all()

    async def read(self, view: memoryview, offset: int) -> list[tuple[int, int]]:
        """See `Export.read`."""
        async with self._request() as disk:
            return await disk.read(view, offset)

    async def write(self, view: memoryview, offset: int, *, fua: bool) -> None:
        """See `Export.write`."""
        async with self._request() as disk:
            await disk.write(view, offset, fua=fua)

    async def zero(
        self, offset: int, length: int, *, may_trim: bool, fast_only: bool, fua: bool
    ) -> None:
        """See `Export.zero`."""
        async with self._request() as disk:
            await disk.zero(offset, length, may_trim=may_trim, fast_only=fast_only, fua=fua)

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """See `Export.trim`."""
        async with self._request() as disk:
            await disk.trim(offset, length, fua=fua)

    async def cache(self, offset: int, length: int) -> None:
        """See `Export.cache`."""
        async with self._request() as disk:
            await disk.cache(offset, length)

    async def block_status(self, offset: int, length: int, limit: int) -> list[StatusExtent]:
        """See `Export.block_status`."""
        async with self._request() as disk:
            return await disk.block_status(offset, length, limit)

    async def flush(self) -> None:
        """See `Export.flush`. Never held: a leaf that was let go of is durable."""
        await self.disk.flush()

    # -- letting go ------------------------------------------------------------------------

    def refusal(self, *, incomplete: bool = False) -> str:
        """Why the leaf may not be let go of now, or "". ``incomplete``: the program that opens it
        reads what it lacks from the backing that it names."""
        disk = self.disk
        if disk.read_only:
            return "the leaf is served read-only"
        if disk.thin and disk.backing is not None:
            return self._refusal_of_thin(disk.backing)
        if disk.backing is None:
            return disk.gate.reason
        if not incomplete:
            return "the leaf is not complete: it still depends on its backing"
        if reason := _NOT_OVER_A_BACKING.get(disk.leaf.format):
            return f"the leaf is not complete, and {reason}"
        return disk.gate.reason

    def _refusal_of_thin(self, backing: Backing) -> str:
        if backing.local is None or not backing.local.complete.is_set():
            return "the leaf is thin, and the store's image below it is not wholly local yet"
        if reason := _NOT_OVER_A_BACKING.get(self.disk.leaf.format):
            return f"the leaf is thin, and {reason}"
        return self.disk.gate.reason

    async def release(self, *, incomplete: bool = False) -> None:
        """Let go of the leaf. Does nothing if that was done before. ``incomplete``: as in
        `refusal`; the job is cancelled then, and begins again when the leaf is taken back.

        Raises:
            UsageError: `refusal` says why not, or requests do not end.
            OSError, LeafError: the leaf could not be flushed and left clean. It was closed, and
                should be taken back.
        """
        async with self._turn:
            if self.let_go:
                return
            if reason := self.refusal(incomplete=incomplete):
                raise UsageError(reason)
            self.let_go = True
            try:  # if that fails or is cancelled, all goes on as before
                await self._stop_job()
                await self._drain()
                await self._settle()
            except BaseException:
                self._go_on()
                raise
            self._watch = trio.CancelScope()
            start_contained(
                self._nursery, "letting go", self.disk.health.report, self._watch_over, self._watch
            )
            with trio.CancelScope(shield=True):
                await self.disk.let_go(_REASON)

    async def _drain(self) -> None:
        """Wait until no request is under way; new ones are held."""
        with trio.move_on_after(DRAIN_SECONDS):
            while self._busy:
                await self._changed.park()
        if self._busy:
            raise UsageError("requests are under way that do not end: try again")

    async def _settle(self) -> None:
        """Leave the leaf as QEMU needs it: a thin one names the image below it; another one has
        no clusters that are local in part."""
        backing = self.disk.backing
        if self.disk.thin and backing is not None and backing.local is not None:
            known = self.disk.leaf.backing
            assert known is not None
            below = replace(known, uri=backing.local.path, format="raw")
            await self.disk.record_backing(below)
            vouch(self.disk.leaf.fd, below)
        elif not await round_off(self.disk, ROUND_OFF_SECONDS):
            raise UsageError("the backing does not deliver what some clusters lack: try again")

    async def take_back(self) -> bool:
        """Open the leaf again and go on with the requests that were held.

        Returns:
            False if the leaf was not let go of; nothing was done then.

        Raises:
            LeafInUseError: another process has it; requests go on being held.
            LeafError, OSError: it is not the leaf any more, or cannot be opened; likewise.
        """
        async with self._turn:
            if not self.let_go:
                return False
            with trio.CancelScope(shield=True):
                leaf = await in_worker(self._open)
            self.disk.take_back(leaf)
            self._watch.cancel()
            self._go_on()
            return True

    async def _watch_over(self, scope: trio.CancelScope) -> None:
        """A task: take the leaf back if it was let go of for too long."""
        with scope:
            await trio.sleep(HOLD_SECONDS)
            while self.let_go:
                try:
                    with trio.CancelScope(shield=True):
                        if await self.take_back():
                            log.warning("%s was not taken over: it is served again", self._path)
                except (LeafError, OSError) as error:
                    self._still_held(error)
                await trio.sleep(RETRY_SECONDS)

    def _still_held(self, error: Exception) -> None:
        taken = isinstance(error, LeafInUseError)
        reason = f"{_REASON}; {'requests are held while one does' if taken else error}"
        if reason != self.disk.gate.reason:
            log.warning("%s: %s", self._path, reason)
            self.disk.gate.close(GateState.LET_GO, reason)

    def _open(self) -> Leaf:
        old = self.disk.leaf
        if _identity_of(old.path) != self._identity:
            raise LeafError(f"{old.path} is another file than the leaf that was let go of")
        leaf = open_leaf(old.path, format=old.format)
        if leaf.size != self.size:
            leaf.close()
            raise LeafError(f"{old.path}: now a disk of {leaf.size} bytes, it had {self.size}")
        return leaf

    async def _stop_job(self) -> None:
        """What it has under way would end in a leaf that is closed."""
        if self._job is not None and self._job.status is not JobStatus.NULL:
            self._stopped = self._job.status
            await self._job.stop()

    def _go_on(self) -> None:
        self.let_go = False
        if self._job is not None and self._stopped is not None:
            if self._job.status is JobStatus.NULL and not self._job.completed.is_set():
                self._job.start(paused=self._stopped is JobStatus.PAUSED)
            self._stopped = None
        self._changed.unpark_all()


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _identity_of(path: str) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_dev, status.st_ino
