# SPDX-License-Identifier: Apache-2.0
"""A disk over a damaged image, with guests and a stream job, as the server has it.

A request fails with NbdstreamError or OSError, or it does what it says; the disk's tasks and
the job go on, whatever one request met.
"""

import trio

from fuzz.images import BACKING_BYTE
from fuzz.source import Source
from nbdstream.backing.base import Grant, Priority
from nbdstream.disk import StreamedDisk, open_disk
from nbdstream.errors import NbdstreamError
from nbdstream.extents import BackingExtent
from nbdstream.leaf.base import Leaf
from nbdstream.streamer.job import JobStatus, StreamJob
from testbed.backings import PlainBacking

REFUSALS = (NbdstreamError, OSError)
# Seconds of the virtual clock for the job, once all requests are done.
JOB_SECONDS = 60.0


class ByteBacking(PlainBacking):
    """A backing that has everything at once: one byte, with holes where it pleases."""

    def __init__(self, size: int) -> None:
        super().__init__("nbd://fuzz", size, identity="s1:fuzz")

    def _zero(self, offset: int) -> bool:
        return offset >> 18 & 3 == 3

    async def read(
        self, view: memoryview, offset: int, priority: Priority, grant: Grant | None = None
    ) -> None:
        assert offset >= 0 and offset + len(view) <= self.size
        await trio.lowlevel.checkpoint()
        view[:] = bytes([BACKING_BYTE]) * len(view)

    async def extents(self, offset: int, length: int) -> list[BackingExtent]:
        await trio.lowlevel.checkpoint()
        stop = min(offset + length, (offset >> 18) + 1 << 18)
        return [BackingExtent(offset, stop - offset, zero=self._zero(offset))]

    async def wait_for_room(self, priority: Priority) -> Grant:
        await trio.lowlevel.checkpoint()
        return Grant(65536, priority)


async def serve(leaf: Leaf, source: Source) -> list[object]:
    """Requests of guests, several at once, while a job streams; what came of each."""
    backing = ByteBacking(leaf.size) if leaf.backing is not None else None
    outcome: list[object] = []
    async with open_disk(leaf, backing) as disk, trio.open_nursery() as nursery:
        job = StreamJob(disk, job_id="fuzz") if backing is not None else None
        # The whole of a disk of petabytes would take a while.
        if job is not None and not disk.read_only and disk.size <= 16 << 20:
            nursery.start_soon(job.run)
            if source.flag():
                job.start()
        # A request that hangs is seen by the user who runs the target: the virtual clock cannot
        # tell, since it runs on while a worker thread is busy.
        async with trio.open_nursery() as guests:
            for _ in range(1 + source.byte() % 3):
                guests.start_soon(_guest, disk, Source(source.take(40)), outcome)
        if job is not None and job.status is not JobStatus.NULL:
            with trio.move_on_after(JOB_SECONDS):
                await job.completed.wait()
            if job.status is JobStatus.PAUSED:
                assert job.error, "a paused job has no error"
        nursery.cancel_scope.cancel()
    return outcome


async def _guest(disk: StreamedDisk, source: Source, outcome: list[object]) -> None:
    while source.left:
        try:
            outcome.append(await _request(disk, source))
        except REFUSALS as error:
            assert str(error)
            outcome.append(type(error).__name__)
        await trio.lowlevel.checkpoint()


async def _request(disk: StreamedDisk, source: Source) -> object:
    offset = min(source.number(3), disk.size - 1)
    length = min(1 + source.number(2) * (1 + source.byte() % 4), disk.size - offset)
    # The server refuses changes of a read-only disk before they get here.
    kind = source.byte() % (3 if disk.read_only else 9)
    if kind < 2:
        view = memoryview(bytearray(b"\xee" * length))
        if kind and disk.read_nowait(view, offset):
            return "hit"
        for at, size in await disk.read(view, offset):
            assert not any(view[at - offset : at - offset + size])
        return "read"
    if kind == 2:
        extents = await disk.block_status(offset, length, 8)
        assert extents and len(extents) <= 8 and extents[0].offset == offset
        assert sum(extent.length for extent in extents) <= length
        return "status"
    if kind == 3:
        await disk.flush()
    elif kind == 4:
        await disk.cache(offset, length)
    elif kind == 5:
        await disk.zero(offset, length, may_trim=source.flag(), fast_only=False, fua=False)
    elif kind == 6:
        await disk.trim(offset, length, fua=source.flag())
    else:
        data = memoryview(bytes([source.byte()]) * length)
        if kind == 7 and disk.write_nowait(data, offset):
            return "written"
        await disk.write(data, offset, fua=source.flag())
    return kind
