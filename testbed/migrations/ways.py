# SPDX-License-Identifier: Apache-2.0
"""The same running guest moved in three ways over the same network, timed alike.

- `MemoryOnly`: both ends have the same disk, as on shared storage. The yardstick;
- `Nbdstream`: ``nbdstream migrate``. The guest first, its disk afterwards;
- `Mirror`: QEMU's own way, ``blockdev-mirror`` to an NBD server at the destination, then
  memory. The guest's writes wait for the mirror (``write-blocking``): it does not catch up
  with a busy guest otherwise, but by chance.

Each begins with a guest at work on its disk. Afterwards the source is gone, and its disk is
deleted where there is another; the guest goes on writing at the destination until it is
switched off, and every record that it acknowledged, at either end, has to be on the disk.
"""

import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from nbdstream.guest.disks import Disk
from nbdstream.migrate.destination import Spawned
from nbdstream.migrate.memory import Memory
from nbdstream.migrate.plan import MigrationPlan
from nbdstream.migrate.run import Migration
from nbdstream.migrate.switchover import PHASE_WORDS, Phase
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import JSONObject
from nbdstream.tasks import open_background_nursery
from testbed.guests import systems
from testbed.migrations import arrangement, heartbeat
from testbed.migrations.arrangement import Ends, last_acknowledged, records, wait_acknowledged
from testbed.migrations.heartbeat import Heartbeat, Pause
from testbed.migrations.network import Network
from testbed.peers import run

NODE = "disk0"
# A mirror takes as long as its disk is large.
PATIENCE = 1800.0
BEATS = 100
RECORDS_AFTER = 3

Say = Callable[[str], None]
"""Called with what is going on, in a line."""


class WayError(Exception):
    """A way that does not do what it has to."""


@dataclass(frozen=True)
class Outcome:
    """What one way took, in seconds and bytes.

    ``running``: until the guest's first sign of life at the destination; ``complete``: until
    nothing depends on the source, both from being asked. ``pause`` is the time between QEMU's
    stop at the source and its start at the destination, ``heard`` what the guest's heartbeat
    shows of it. ``memory`` and ``disk`` went over the network, both ways; ``allocated`` is how
    much data the source's disk had in the end.
    """

    way: str
    running: float
    complete: float
    pause: float
    heard: Pause
    memory: int
    disk: int
    allocated: int
    acknowledged: int


class Way(ABC):
    """One way for one guest. ``disk`` is the source's, a raw image."""

    name: str

    def __init__(self, ends: Ends, network: Network, disk: Path, say: Say) -> None:
        self.ends, self.network, self.disk, self.say = ends, network, disk, say
        self.started: list[Spawned] = []

    @property
    @abstractmethod
    def disk_there(self) -> Path:
        """The destination's disk, raw."""

    @abstractmethod
    async def move(self, source: QMPClient) -> float:
        """Have the guest go on at the destination, and return when its disk is complete
        there: how long QEMU had it stopped."""

    @abstractmethod
    async def leave(self) -> None:
        """The destination's guest is switched off: close its disk."""

    def plan(self) -> MigrationPlan:
        """By which the guest moves over the network."""
        offer, memory = self.network.offer, self.network.memory
        disk = self.ends.disk("raw", node=NODE)
        return replace(
            self.ends.plan(replace(disk, listen=offer.listen, reach=offer.reach)),
            prefix=self.network.there,
            memory=_uri(memory.reach),
            memory_listen=_uri(memory.listen),
        )


class Nbdstream(Way):
    """The guest first, then its disk."""

    name = "nbdstream migrate"

    @property
    def disk_there(self) -> Path:
        return Path(self.plan().disks[0].leaf)

    async def move(self, source: QMPClient) -> float:
        def watch(phase: Phase, facts: JSONObject) -> None:
            if not facts:
                self.say(PHASE_WORDS[phase])

        migrated = Migration(self.plan(), watch)
        try:
            summary = await migrated.run()
        finally:
            processes = migrated.qemu, *(disk.process for disk in migrated.disks)
            self.started += [process for process in processes if process is not None]
        return summary.downtime

    async def leave(self) -> None:
        await arrangement.end_server(self.plan().disks[0].control)


class MemoryOnly(Way):
    """QEMU's migration, with a disk that both ends have."""

    name = "memory only (shared disk)"

    @property
    def disk_there(self) -> Path:
        return self.disk

    async def move(self, source: QMPClient) -> float:
        plan = self.plan()
        command = [*plan.prefix, *plan.command, "-incoming", "defer", "-S"]
        command += ["-blockdev", Disk.file(self.disk_there).named(NODE)]
        command += ["-qmp", f"unix:{plan.destination_qmp},server=on,wait=off"]
        process = Spawned(command, Path(self.ends.path("there.log")))
        self.started.append(process)
        await process.wait_socket(plan.destination_qmp)
        async with QMPClient.connect(plan.destination_qmp) as there:
            await self.copy_disk(source, there)
            self.say(PHASE_WORDS[Phase.MEMORY])
            memory = Memory(source, there, plan)
            with source.events() as events, source.events() as stops:
                await memory.start()
                paused = await memory.wait_stopped(events, lambda _facts: None)
                stopped = trio.current_time()
                stopped -= paused.timestamp - (await stops.wait("STOP")).timestamp
                await self.end_copy(source)
                await memory.hand_over(events)
            await there.execute("cont")
            await there.wait_event("RESUME")
            return trio.current_time() - stopped

    async def leave(self) -> None:
        """QEMU has closed it."""

    async def copy_disk(self, source: QMPClient, there: QMPClient) -> None:
        """Before memory moves."""

    async def end_copy(self, source: QMPClient) -> None:
        """The guest stands still: the disk at the destination is the same now."""


class Mirror(MemoryOnly):
    """QEMU's own way: the whole disk first."""

    name = "QEMU: mirror, then migrate"

    @property
    def disk_there(self) -> Path:
        return Path(self.ends.path("target.raw"))

    async def move(self, source: QMPClient) -> float:
        run(["truncate", "-r", self.disk, self.disk_there])
        return await super().move(source)

    async def copy_disk(self, source: QMPClient, there: QMPClient) -> None:
        endpoint = self.network.target
        await there.execute("nbd-server-start", {"addr": _address(endpoint.listen)})
        export = {"type": "nbd", "id": "mirror", "node-name": NODE, "name": NODE}
        await there.execute("block-export-add", {**export, "writable": True})
        node = Disk.nbd(f"nbd://{endpoint.reach}/{NODE}").blockdev
        await source.execute("blockdev-add", {**node, "node-name": "target"})
        job = {"job-id": "mirror", "device": NODE, "target": "target", "sync": "full"}
        job["copy-mode"] = "write-blocking"
        self.say("mirroring the disk")
        await source.execute("blockdev-mirror", job)
        with trio.fail_after(PATIENCE):
            await source.wait_event("BLOCK_JOB_READY")

    async def end_copy(self, source: QMPClient) -> None:
        await source.execute("block-job-cancel", {"device": "mirror"})
        await source.wait_event("BLOCK_JOB_COMPLETED")


WAYS: tuple[type[Way], ...] = (MemoryOnly, Nbdstream, Mirror)


async def migrate(way: Way) -> Outcome:
    """Boot a guest, have it work, move it, and see that it has lost nothing.

    Raises WayError if it has, SystemExit on SIGTERM, and what `migration` and `Migration.run`
    raise; whatever was started is ended then.
    """
    ends, beats = way.ends, Heartbeat()
    try:
        async with open_background_nursery() as nursery:
            nursery.start_soon(_heed_signal)
            nursery.start_soon(
                beats.listen, ends.path("source.heartbeat"), ends.path("there.heartbeat")
            )
            async with arrangement.source(
                ends, Disk.file(way.disk), prefix=way.network.here
            ) as guest:
                await guest.console.send(f"{heartbeat.LOOP}\n")
                await beats.wait_here(BEATS)
                way.say("the guest is up, and writes")
                before = way.network.moved()
                began = trio.current_time()
                pause = await way.move(guest.guest.qmp)
                complete = trio.current_time() - began
                running = await _wait_there(way, beats) - began
                memory, disk = (
                    after - count for after, count in zip(way.network.moved(), before, strict=True)
                )
                seen = last_acknowledged(guest.console.transcript)
            allocated = way.disk.stat().st_blocks * 512
            if way.disk_there != way.disk:
                way.disk.unlink()
                way.say("the source is gone, and its image deleted")
            heard = beats.pause()
            last = await _end_there(way, seen)
    finally:
        with trio.CancelScope(shield=True):
            for process in way.started:
                await process.end()
    _check(way, last)
    return Outcome(
        way.name, running, complete, pause, heard, memory, disk, allocated, acknowledged=last
    )


async def _wait_there(way: Way, beats: Heartbeat) -> float:
    """When the guest gave its first sign of life at the destination."""
    try:
        return await beats.wait_there()
    except trio.TooSlowError:
        async with QMPClient.connect(way.ends.path("there.qmp")) as there:
            status = (await there.execute("query-status"))["status"]
        console = _console(way)
        raise WayError(f"no sign of life there: {status}; its console: {console[-80:]!r}") from None


async def _heed_signal() -> None:
    """Have SIGTERM end this as an error does: nothing that was started stays behind."""
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _number in signals:
            sys.exit(1)


async def _end_there(way: Way, seen: int) -> int:
    """See that the guest still writes, and switch it off; the last record it acknowledged."""
    await wait_acknowledged(way.ends, seen + RECORDS_AFTER)
    await arrangement.power_off(way.ends)
    await way.leave()
    return last_acknowledged(_console(way))


def _console(way: Way) -> str:
    """What the guest has said at the destination."""
    return Path(way.ends.path("there.console")).read_text(errors="replace")


def _check(way: Way, last: int) -> None:
    """See that a disk has all that was acknowledged, in a file system without fault."""
    if way.ends.system is systems.DEBIAN:  # switched off properly: there is no journal to replay
        systems.check_filesystem(way.disk_there)
    found = records(way.disk_there)
    if found < last:
        raise WayError(f"of {last} acknowledged records only {found} are on the disk")
    way.say(f"{last} records acknowledged, {found} found, each checked; e2fsck finds no fault")


def _uri(address: str) -> str:
    """HOST:PORT or unix:PATH, for QEMU's ``migrate``."""
    return address if address.startswith("unix:") else f"tcp:{address}"


def _address(address: str) -> JSONObject:
    """The same for ``nbd-server-start``."""
    if address.startswith("unix:"):
        return {"type": "unix", "data": {"path": address.removeprefix("unix:")}}
    host, _, port = address.rpartition(":")
    return {"type": "inet", "data": {"host": host, "port": port}}
