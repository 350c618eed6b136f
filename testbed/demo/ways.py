# SPDX-License-Identifier: Apache-2.0
"""The same guest from the same slow remote image, in three ways, timed alike.

- nbdstream: a leaf that pulls on demand and streams the rest;
- copy, then boot: ``nbdcopy`` the image to a file, boot from that;
- QEMU alone: a qcow2 overlay with ``copy-on-read=on``, and QEMU's own ``block-stream``.

Each starts its clock when the guest is asked for, boots it to its login, gives it a little
work (to verify some files), and ends once the disk is wholly local. Each leaves
the disk in the directory it was given.
"""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import trio

from nbdstream.cli.progress import Snapshot
from nbdstream.guest.disks import Disk
from nbdstream.pivot.leftovers import PivotDisk
from nbdstream.pivot.run import pivot
from nbdstream.pivot.servers import ControlledServer, Monitor
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import Event
from nbdstream.tasks import open_background_nursery
from nbdstream.units import format_rate, format_size
from testbed.demo.show import Result, Show
from testbed.guests.systems import RunningGuest, System, start
from testbed.link.control import LinkProcess, link_process
from testbed.link.model import Shape
from testbed.peers import Peer, nbdkit, nbdstream_serve

POLL_INTERVAL = 0.5
# Read by the guest to measure its disk.
BLOCKS = 4096
STREAM_TIMEOUT = 1800.0

Until = Literal["worked", "local", "pivoted"]

_JOB_ENDED = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", "BLOCK_JOB_ERROR")


@dataclass(frozen=True)
class Task:
    """What is to be brought up: a guest, from an image at the far end of a link."""

    system: System
    work: str
    """A shell command for the guest, once it is up, and what it is about."""
    work_done: str
    link: LinkProcess
    show: Show

    @property
    def uri(self) -> str:
        return self.link.uri()

    def moved(self) -> int:
        """Bytes that came over the link so far."""
        return int(self.link.stats()["down"]["bytes"])


@contextmanager
def slow_remote(image: Path, shape: Shape) -> Iterator[LinkProcess]:
    """Serve *image*, read-only, at the far end of a link; gone when the block ends."""
    with nbdkit("file", image, readonly=True) as server, far_end(server, shape) as link:
        yield link


@contextmanager
def far_end(server: Peer, shape: Shape) -> Iterator[LinkProcess]:
    """A link, at the far end of which is *server*; gone when the block ends."""
    with link_process("127.0.0.1:0", f"unix:{server.socket}", shape) as link:
        yield link


async def stream_with_nbdstream(
    task: Task, leaf: Path, way: str = "nbdstream", *, until: Until = "pivoted"
) -> Result:
    """Boot over NBD from a leaf while the rest streams, until the guest has done its work, until
    all is local, or until QEMU has opened the leaf itself and the server ended."""
    with nbdstream_serve(leaf, task.uri) as server:
        task.show.note(f"nbdstream serves {leaf.name}: {server.uri}")
        assert server.control is not None
        disk = Disk.nbd(server.uri)
        # Watched from the beginning: a small disk is local before its guest has begun.
        async with QMPClient.connect(server.control) as control, _watched(task, control) as stream:

            async def status() -> str:
                return str(Snapshot.of(await control.execute("x-nbdstream-stats")))

            async with start(task.system, disk, on_console=task.show.guest) as guest:
                async with _shown(task.show, status):
                    login = await bring_up(task, guest)
                    local = None if until == "worked" else await stream.wait()
                if until == "pivoted":
                    await _pivot(task, guest, str(server.control))
                await power_off(task, guest)
    return Result(way, login, local, task.moved())


async def _pivot(task: Task, guest: RunningGuest, control: str) -> None:
    before = await _read_rate(guest)
    monitor = Monitor.of(guest.guest.qmp, guest.guest.process.pid)
    pause = await pivot(monitor, [PivotDisk(ControlledServer(control))])
    task.show.note(f"pivot: QEMU uses the leaf itself; the guest was stopped for {pause:.3f} s")
    after = await _read_rate(guest)
    task.show.note(
        f"the guest reads {before:.0f} blocks of 4 KiB a second before, {after:.0f} after"
    )


async def _read_rate(guest: RunningGuest) -> float:
    """How many blocks of 4 KiB the guest reads from its disk in a second, one after the other."""
    said = await guest.run(f"dd if=/dev/vda of=/dev/null bs=4k count={BLOCKS} iflag=direct 2>&1")
    found = re.search(r", ([\d.]+) s,", said)
    if found is None:
        raise RuntimeError(f"dd in the guest says: {said}")
    return BLOCKS / float(found[1])


async def boot_from_file(task: Task, disk: Disk) -> Result:
    """Boot from a local image."""
    async with start(task.system, disk, on_console=task.show.guest) as guest:
        login = await bring_up(task, guest)
        await power_off(task, guest)
    return Result("from a local file", login, None, 0)


async def copy_then_boot(task: Task, directory: Path) -> Result:
    """Copy the image to ``copy.raw`` in *directory* with nbdcopy, then boot from it."""
    copy = directory / "copy.raw"
    async with shown_link(task):
        await trio.run_process(["nbdcopy", task.uri, str(copy)])
        local = task.show.elapsed
        task.show.note("nbdcopy is done: the disk is wholly local")
        async with start(task.system, Disk.file(copy)) as guest:
            login = await bring_up(task, guest)
            await power_off(task, guest)
    return Result("nbdcopy, then boot", login, local, task.moved())


async def stream_with_qemu(task: Task, directory: Path, patience: float) -> Result:
    """Boot from ``overlay.qcow2`` in *directory* while QEMU's own job streams the rest, which is
    given up after *patience* seconds."""
    overlay = directory / "overlay.qcow2"
    await trio.run_process(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", task.uri, str(overlay)]
    )
    drive = f"file={overlay},format=qcow2,if=none,id=disk0,copy-on-read=on,discard=unmap"
    device = "virtio-blk-pci,drive=disk0,bootindex=1"
    async with shown_link(task):
        async with start(task.system, extra=("-drive", drive, "-device", device)) as guest:
            qmp = guest.guest.qmp
            await qmp.execute("block-stream", {"job-id": "stream", "device": "disk0"})
            async with _watched(task, qmp) as stream:
                login = await bring_up(task, guest)
                local = patience
                with trio.move_on_after(patience - task.show.elapsed) as waiting:
                    local = await stream.wait()
                moved = task.moved()
                if waiting.cancelled_caught:
                    task.show.note("it is not waited for any longer")
                await power_off(task, guest)
    return Result("QEMU alone", login, local, moved, not waiting.cancelled_caught)


async def bring_up(task: Task, guest: RunningGuest) -> float:
    """Wait for the login and have the guest do its work; when the login was."""
    await guest.wait_login()
    login = task.show.elapsed
    task.show.note("the guest asks for a login")
    await guest.wait_shell()
    await guest.run(task.work, within=STREAM_TIMEOUT)
    task.show.note(f"the guest has {task.work_done}")
    return login


async def power_off(task: Task, guest: RunningGuest) -> None:
    """Switch the guest off; what it says of that is not shown."""
    task.show.mute_guest()
    await guest.power_off()
    task.show.note("the guest has switched itself off")


class _StreamWatch:
    """Notes when the stream job of a QMP server ends, whatever else is going on."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._ended = trio.Event()
        self._event: Event | None = None
        self._seconds = 0.0

    async def watch(self, qmp: QMPClient) -> None:
        self._event = await qmp.wait_event(*_JOB_ENDED)
        self._seconds = self._task.show.elapsed
        self._task.show.note(f"the stream job has ended: {self._event.name}")
        self._ended.set()

    async def wait(self) -> float:
        """When the disk became wholly local. Raises RuntimeError if the job failed."""
        with trio.fail_after(STREAM_TIMEOUT):
            await self._ended.wait()
        assert self._event is not None
        if self._event.name != "BLOCK_JOB_COMPLETED" or "error" in self._event.data:
            raise RuntimeError(f"the stream job failed: {self._event}")
        return self._seconds


@asynccontextmanager
async def _watched(task: Task, qmp: QMPClient) -> AsyncIterator[_StreamWatch]:
    watch = _StreamWatch(task)
    async with open_background_nursery() as nursery:
        nursery.start_soon(watch.watch, qmp)
        yield watch


@asynccontextmanager
async def _shown(show: Show, status: Callable[[], Awaitable[str]]) -> AsyncIterator[None]:
    """While the block lasts, show what *status* says, again and again."""

    async def poll() -> None:
        while True:
            show.status(await status())
            await trio.sleep(POLL_INTERVAL)

    with show.live():
        async with open_background_nursery() as nursery:
            nursery.start_soon(poll)
            yield


def shown_link(task: Task) -> AbstractAsyncContextManager[None]:
    """While the block lasts, show what has come over the link: for a peer that does not tell."""

    async def status() -> str:
        moved = task.moved()
        rate = format_rate(moved / max(task.show.elapsed, POLL_INTERVAL))
        return f"{format_size(moved)} over the link, {rate} on average"

    return _shown(task.show, status)
