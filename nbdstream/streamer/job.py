# SPDX-License-Identifier: Apache-2.0
"""The stream job: makes everything local in the background, then lets go of the backing.

It knows no format and no protocol: it asks the disk what is unallocated and has it
made allocated, which is what any reader with copy on read does. Two tasks: the
*scout* walks ahead and looks up extents, so that holes become zeroes without any
transfer and no read ever waits for a status query; the *puller* has the ranges of data
fetched, in units that the backing's window grants. What is fetched first can be
changed (``prefetch``); how much is under way at a time is the window's business, in
``nbdstream.backing``.

The job ends by completing, by being cancelled, and by nothing else: a full disk, damaged
metadata or a bug pauses it until it is resumed, and a lost backing makes it wait. States,
error reports and events are those of QEMU's jobs (qapi/job.json, qapi/block-core.json).
"""

import enum
import errno
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import trio

from nbdstream.backing.base import Backing, Priority
from nbdstream.disk import StreamedDisk, Unit
from nbdstream.errors import (
    TROUBLE,
    BackingError,
    BackingMismatchError,
    LeafError,
    sole_error,
)
from nbdstream.extents import align_down, align_up
from nbdstream.streamer.deadline import Deadline
from nbdstream.streamer.progress import Progress
from nbdstream.tasks import log_failure

log = logging.getLogger(__name__)

T = TypeVar("T")
EventListener = Callable[[str, Mapping[str, object]], None]

# Ranges that the scout may be ahead of the puller: enough to know the rest of a disk
# well before it is fetched, in little memory.
SCOUT_AHEAD = 4096
# How much one status query asks about: servers may walk file systems to answer.
SCOUT_PIECE = 1 << 30
RETRY_INTERVAL = 1.0


class JobStatus(enum.Enum):
    """QEMU's JobStatus, as far as a stream job passes through it."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


ACTIVE = frozenset({JobStatus.RUNNING, JobStatus.PAUSED})


class StreamJob:
    """The one stream job of a disk; it can be started again after it was cancelled.

    Attributes:
        id: the job's name, by which the control socket addresses it.
        io_status: "ok", "nospace" or "failed", as QEMU's BlockDeviceIoStatus.
        error: the message that goes with it, or "".
        completed: set when everything is local.
        deadline: when it is to be done by, if at all; its `Deadline.run` is a task of its own.
    """

    def __init__(self, disk: StreamedDisk, *, job_id: str, keep_backing: bool = False) -> None:
        self.id = job_id
        self.io_status = "ok"
        self.error = ""
        self.completed = trio.Event()
        self._disk = disk
        self._keep_backing = keep_backing
        self._status = JobStatus.NULL
        self._speed = 0
        self._pace = 0
        self._retrying = False
        self.deadline = Deadline(self)
        self._progress = Progress(disk.size, 0.0)
        self._listeners: list[EventListener] = []
        self._changed = trio.lowlevel.ParkingLot()
        self._scope: trio.CancelScope | None = None

    # -- steering (plain calls, any time) ----------------------------------------------

    @property
    def status(self) -> JobStatus:
        """Where the job is in its life; NULL when there is none."""
        return self._status

    @property
    def length(self) -> int:
        """Bytes in all: the disk's size."""
        return self._progress.length

    @property
    def offset(self) -> int:
        """Bytes that are settled: local, whether fetched, found local, or zero."""
        return self._progress.settled

    @property
    def speed(self) -> int:
        """The cap in bytes per second; 0 is none."""
        return self._speed

    @property
    def remaining(self) -> int:
        """Bytes that still have to cross the link, as far as is known."""
        return self._progress.remaining()

    @property
    def rate(self) -> float:
        """Bytes fetched per second, lately."""
        return self._progress.rate(trio.current_time())

    @property
    def running(self) -> bool:
        """Whether it is at work: neither paused nor ended."""
        return self._status is JobStatus.RUNNING

    @property
    def link_rate(self) -> float:
        """Bytes per second that the backing has delivered lately, at best, to all readers."""
        backing = self._disk.backing
        return backing.statistics().rate if backing is not None else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds to go, or None while that is unknown or nothing moves."""
        return self._progress.eta(trio.current_time())

    def on_event(self, listener: EventListener) -> None:
        """Have ``listener(name, data)`` called for each of QEMU's job events."""
        self._listeners.append(listener)

    def start(self, *, paused: bool = False) -> None:
        """Begin (again). Raises ValueError if it runs already or nothing is left to do."""
        if self._status is not JobStatus.NULL:
            raise ValueError(f"job '{self.id}' is already active")
        if self.completed.is_set():
            raise ValueError("everything is local already")
        self._enter(JobStatus.CREATED)
        self._enter(JobStatus.PAUSED if paused else JobStatus.RUNNING)

    def pause(self) -> None:
        """Send nothing more; what is under way still arrives."""
        if self._status is JobStatus.RUNNING:
            self._enter(JobStatus.PAUSED)

    def make_way(self, error: OSError) -> None:
        """Pause for guests' writes, which need the rest of the space."""
        if self._status is JobStatus.RUNNING:
            self.io_status, self.error = "nospace", str(error)
            self._enter(JobStatus.PAUSED)

    def resume(self) -> None:
        """Go on, also after an error that paused the job."""
        if self._status is JobStatus.PAUSED:
            self.io_status, self.error = "ok", ""
            self._progress.resumed(trio.current_time())
            self._enter(JobStatus.RUNNING)

    def set_speed(self, speed: int) -> None:
        """Cap the job at ``speed`` bytes per second; 0 lifts the cap."""
        self._speed = speed
        self._apply_speed()

    def set_pace(self, pace: int) -> None:
        """For the deadline: go no faster than ``pace`` bytes per second, if not 0."""
        if pace != self._pace:
            self._pace = pace
            self._apply_speed()

    def _apply_speed(self) -> None:
        if self._disk.backing is not None:
            speeds = [speed for speed in (self._speed, self._pace) if speed]
            self._disk.backing.set_speed(min(speeds, default=0))

    def cancel(self) -> None:
        """End the job; what is local stays local."""
        if self._status in ACTIVE and self._scope is not None:
            self._enter(JobStatus.ABORTING)
            self._scope.cancel()

    async def stop(self) -> None:
        """Cancel it, and return when nothing of it is under way any more."""
        while self._status is not JobStatus.NULL:
            self.cancel()
            await trio.lowlevel.checkpoint()

    async def step(self, offset: int, length: int) -> int:
        """Stream one piece by hand, whether or not the job runs: make the cluster(s) at
        ``offset`` local. Returns how many bytes were not before. Raises BackingError, OSError."""
        size = self._disk.leaf.cluster_size
        start = align_down(offset, size)
        end = min(align_up(offset + max(length, 1), size), self._disk.size)
        return await self._disk.populate(start, end - start, Priority.STREAM)

    # -- running -----------------------------------------------------------------------

    async def run(self) -> None:
        """The job's task: does the work whenever it is started; ends when all is local."""
        while not self.completed.is_set():
            await self._until(*ACTIVE)
            backing = self._disk.backing
            if backing is None:
                break
            with trio.CancelScope() as self._scope:
                while not await self._attempt(backing):
                    await self._until(JobStatus.RUNNING)
            self._scope = None
            if self._status is JobStatus.ABORTING:
                self._conclude("BLOCK_JOB_CANCELLED")

    async def _attempt(self, backing: Backing) -> bool:
        """Do all of the work; False if a bug ended it: the job is paused then."""
        failure: BaseException | None = None
        try:
            await self._stream_all(backing)
            await self._finish()
        except* Exception as group:
            failure = sole_error(group)
        if failure is not None:
            log_failure(f"job {self.id}", failure)
            self._stop("failed", "read", failure)
        return failure is None

    async def _stream_all(self, backing: Backing) -> None:
        self._progress = Progress(self._disk.size, trio.current_time())
        send, receive = trio.open_memory_channel[tuple[int, int]](SCOUT_AHEAD)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._scout, backing, send)
            async for offset, length in receive:
                await self._pull(nursery, offset, offset + length)

    async def _scout(
        self, backing: Backing, ranges: trio.MemorySendChannel[tuple[int, int]]
    ) -> None:
        """Look up what is unallocated and what of that is a hole; hand on the rest."""
        async with ranges:
            offset = 0
            look = self._disk.next_unallocated
            while (extent := await self._patiently(look, offset)) is not None:
                self._progress.saw(extent.offset - offset, data=False)
                offset = extent.offset
                while offset < extent.end:
                    offset = await self._scout_piece(backing, ranges, offset, extent.end)
            self._progress.saw(self._disk.size - offset, data=False)

    async def _scout_piece(
        self,
        backing: Backing,
        ranges: trio.MemorySendChannel[tuple[int, int]],
        offset: int,
        limit: int,
    ) -> int:
        """Settle or hand on what one status query tells of the unallocated blocks from
        ``offset`` to ``limit``; return where the next one goes on.

        Data is widened, and zeroes are narrowed, to whole blocks.
        """
        await self._until(JobStatus.RUNNING)
        start = offset
        block = self._disk.leaf.block_size
        parts = await self._patiently(backing.extents, offset, min(limit - offset, SCOUT_PIECE))
        for part in parts:
            if part.zero:
                end = part.end if part.end == limit else align_down(part.end, block)
                if end > offset:
                    await self._patiently(self._disk.fill_zero, offset, end - offset)
                    self._progress.saw(end - offset, data=False)
                    offset = end
            else:
                end = min(align_up(part.end, block), limit)
                if end > offset:
                    self._progress.saw(end - offset, data=True)
                    await ranges.send((offset, end - offset))
                    offset = end
        if offset == start:  # a hole smaller than a block is no hole to us
            offset = min(start + block, limit)
            self._progress.saw(offset - start, data=True)
            await ranges.send((start, offset - start))
        return offset

    async def _pull(self, nursery: trio.Nursery, offset: int, end: int) -> None:
        """Have a range of data fetched, unit by unit, as fast as the window lets us."""
        next_unit = self._disk.next_unit
        await self._until(JobStatus.RUNNING)
        while unit := await self._patiently(next_unit, offset, end, Priority.STREAM):
            self._progress.passed(unit.offset - offset)
            nursery.start_soon(self._settle, unit)
            offset = unit.end
            await self._until(JobStatus.RUNNING)
        self._progress.passed(end - offset)

    async def _settle(self, unit: Unit) -> None:
        """Wait until a unit is local; one that failed is fetched again."""
        try:
            await unit.wait()
        except TROUBLE as error:
            await self._after(error)
            populate = self._disk.populate
            await self._patiently(populate, unit.offset, unit.length, Priority.STREAM)
        self._retrying = False
        self._progress.got(unit.length, trio.current_time())

    async def _patiently(self, work: Callable[..., Awaitable[T]], *args: object) -> T:
        """Do a piece of work until it succeeds, through lost backings and full disks."""
        while True:
            try:
                return await work(*args)
            except TROUBLE as error:
                await self._after(error)

    async def _after(self, error: Exception) -> None:
        """Return when it makes sense to try again what failed with this error."""
        if isinstance(error, BackingError) and not isinstance(error, BackingMismatchError):
            # It has waited for the backing timeout already; the job waits on.
            if not self._retrying:  # once for all units and attempts of an outage
                log.warning("job %s: %s; retrying", self.id, error)
            self._retrying = True
            await trio.sleep(RETRY_INTERVAL)
        elif isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            self._stop("nospace" if full else "failed", "write", error)
        else:
            self._stop("failed", "write" if isinstance(error, LeafError) else "read", error)
        await self._until(JobStatus.RUNNING)

    async def _finish(self) -> None:
        """Everything has been fetched: end the job, and the leaf's need of a backing."""
        await self._until(JobStatus.RUNNING)
        self._enter(JobStatus.WAITING)
        self._enter(JobStatus.PENDING)
        try:
            await self._disk.complete(keep_backing=self._keep_backing)
        except (*TROUBLE, ValueError) as error:
            self.io_status, self.error = "failed", str(error)
            log.error("job %s: cannot complete: %s", self.id, error)  # noqa: TRY400
        else:
            self.completed.set()
        self._conclude("BLOCK_JOB_COMPLETED")

    # -- states and events -------------------------------------------------------------

    def _enter(self, status: JobStatus) -> None:
        self._status = status
        self._changed.unpark_all()
        self._emit("JOB_STATUS_CHANGE", {"id": self.id, "status": status.value})

    def _stop(self, io_status: str, operation: str, error: BaseException) -> None:
        """Pause for an error that only an operator can mend."""
        if self._status is not JobStatus.RUNNING:
            return  # another unit has met the same error before
        self.io_status, self.error = io_status, str(error)
        log.error("job %s paused: %s; resume it when that is mended", self.id, error)
        self._emit("BLOCK_JOB_ERROR", {"device": self.id, "operation": operation, "action": "stop"})
        self._enter(JobStatus.PAUSED)

    def _conclude(self, event: str) -> None:
        data: dict[str, object] = {
            "type": "stream",
            "device": self.id,
            "len": self.length,
            "offset": self.offset,
            "speed": self.speed,
        }
        if self.error:
            data["error"] = self.error
        self._emit(event, data)
        self._enter(JobStatus.CONCLUDED)
        self._enter(JobStatus.NULL)

    def _emit(self, name: str, data: Mapping[str, object]) -> None:
        for listener in self._listeners:
            listener(name, data)

    async def _until(self, *states: JobStatus) -> None:
        while self._status not in states:
            await self._changed.park()
