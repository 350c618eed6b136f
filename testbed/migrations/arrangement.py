# SPDX-License-Identifier: Apache-2.0
"""Guests to migrate: a source with a busy disk, and what the destination has to look like.

The writer in the guest appends numbered records with their checksums and syncs each before
it says so on the console. `acknowledged` reads what it said, at either end; `records` what
the disk has.
"""

import dataclasses
import hashlib
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from nbdstream.errors import LeafInUseError
from nbdstream.guest.accelerator import qemu_binary
from nbdstream.guest.console import Console
from nbdstream.guest.disks import Disk
from nbdstream.guest.qemu import Machine, MiB
from nbdstream.leaf import open_leaf
from nbdstream.migrate.plan import DiskPlan, MigrationPlan
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import QMPConnectionError
from nbdstream.tasks import open_background_nursery
from testbed.guests import bootdisk, systems
from testbed.guests.systems import BUSYBOX, RunningGuest, System
from testbed.migrations import heartbeat

SMALL: System = dataclasses.replace(BUSYBOX, memory=128 * MiB)
RECORDS = "/records"
# One record a loop: its number and that number's checksum; synced, then acknowledged.
WRITER = (
    "i=0; while :; do i=$((i+1)); s=$(echo $i | md5sum); "
    f"echo $i ${{s%% *}} | dd of={RECORDS} oflag=append conv=notrunc,fsync 2>/dev/null"
    " && echo ACK $i; done &"
)


@dataclasses.dataclass(frozen=True)
class Ends:
    """The sockets and files of one migration, all in ``directory``. ``image`` is that of the
    ``system``; one that brings its kernel along is booted without firmware."""

    directory: Path
    image: Path
    system: System = SMALL

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def plan(self, *disks: DiskPlan, **changes: object) -> MigrationPlan:
        """A plan for the guest that `source` started, with these disks."""
        command = destination_command(self, len(disks))
        plan = MigrationPlan(
            source_qmp=self.path("source.qmp"),
            destination_qmp=self.path("there.qmp"),
            memory=f"unix:{self.path('memory')}",
            disks=disks,
            command=tuple(command),
            max_bandwidth=4 << 30,
        )
        return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]

    def disk(self, suffix: str, *, number: int = 0, control: str = "", node: str = "") -> DiskPlan:
        """A disk of the plan; its new leaf is called there<number>.<suffix>."""
        return DiskPlan(
            listen=f"unix:{self.path('offer' if node else f'offer{number}')}",
            leaf=self.path(f"there{number}.{suffix}"),
            socket=self.path(f"there{number}.nbd"),
            control=self.path(f"there{number}.control"),
            source_control=control,
            source_node=node,
        )


def destination_command(ends: Ends, disks: int) -> list[str]:
    """The destination's QEMU: the same machine, its console in a file and on a socket."""
    machine = Machine(memory=ends.system.memory, serial="chardev:serial")
    log, socket = ends.path("there.console"), ends.path("there.serial")
    command = [qemu_binary(), *machine.arguments("tcg"), "-no-reboot"]
    for number in range(disks):
        command += ["-device", f"virtio-blk-pci,drive=disk{number},id=virtio-disk{number}"]
        command[-1] += f",bootindex={number + 1},discard=on"
    serial = f"socket,id=serial,path={socket},server=on,wait=off,logfile={log}"
    return [*command, "-chardev", serial, *_extra(ends, "there")]


def _extra(ends: Ends, end: str) -> tuple[str, ...]:
    """What both QEMUs have besides disks and console."""
    kernel = systems.direct_boot(ends.image) if (ends.image / "vmlinuz").exists() else ()
    return (*kernel, *heartbeat.serial_port(ends.path(f"{end}.heartbeat")))


@asynccontextmanager
async def source(ends: Ends, *disks: Disk, **more: object) -> AsyncIterator[RunningGuest]:
    """A guest at its shell, with the writer at work."""
    qmp = ("-qmp", f"unix:{ends.path('source.qmp')},server=on,wait=off")
    extra = (*_extra(ends, "source"), *qmp)
    async with systems.boot(ends.system, *disks, extra=extra, **more) as guest:  # type: ignore[arg-type]
        await guest.console.send(WRITER + "\n")
        await guest.console.wait_for("ACK 3\\b", 60)
        yield guest


@asynccontextmanager
async def destination(ends: Ends) -> AsyncIterator[QMPClient]:
    """QMP to the migrated guest, whose QEMU is ended with the block."""
    async with QMPClient.connect(ends.path("there.qmp")) as qmp:
        try:
            yield qmp
        finally:
            with trio.move_on_after(10, shield=True):
                try:
                    await qmp.execute("quit")
                    await qmp.wait_event("SHUTDOWN")
                except Exception as error:  # it may be gone already
                    print(f"at the destination's end: {error}")


async def power_off(ends: Ends) -> None:
    """Switch the guest at the destination off as its user would, and see its QEMU end."""
    async with QMPClient.connect(ends.path("there.qmp")) as qmp:
        stream = await trio.open_unix_socket(ends.path("there.serial"))
        async with stream, open_background_nursery() as nursery:
            console = Console(stream)
            nursery.start_soon(console.pump)
            await console.send(f"\n{ends.system.power_off}\n")
            with trio.fail_after(systems.POWER_OFF_TIMEOUT):
                await qmp.wait_event("SHUTDOWN")
                with suppress(QMPConnectionError):
                    while True:
                        await qmp.wait_event()


async def end_server(control: str) -> None:
    """End the nbdstream at a control socket, and wait until it has closed its leaf."""
    async with QMPClient.connect(control) as qmp:
        leaf = (await qmp.execute("query-block"))[0]["inserted"]["file"]
        await qmp.execute("quit")
    with trio.fail_after(60):
        while True:
            try:
                open_leaf(leaf, read_only=True).close()
            except LeafInUseError:
                await trio.sleep(0.05)
            else:
                return


def last_acknowledged(text: str) -> int:
    """The highest number that a console shows as acknowledged."""
    numbers = [int(number) for number in re.findall(r"ACK (\d+)\r?\n", text)]
    return max(numbers, default=0)


async def wait_acknowledged(ends: Ends, number: int, within: float = 120) -> int:
    """Wait until the guest at the destination has acknowledged more than ``number``."""
    log = Path(ends.path("there.console"))
    with trio.fail_after(within):
        while True:
            last = last_acknowledged(log.read_text(errors="replace"))  # noqa: ASYNC240
            if last > number:
                return last
            await trio.sleep(0.1)


def records(raw_disk: Path) -> int:
    """How many records a raw disk has, each checked; the journal is replayed first."""
    partition = raw_disk.with_suffix(".partition")
    bootdisk.run(
        "dd",
        f"if={raw_disk}",
        f"of={partition}",
        "bs=1M",
        "conv=sparse",
        "iflag=skip_bytes",
        f"skip={bootdisk.PARTITION_OFFSET}",
        "status=none",
    )
    command = ["e2fsck", "-fp", str(partition)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    bootdisk.run("e2fsck", "-fn", partition)
    command = ["debugfs", "-R", f"cat {RECORDS}", str(partition)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = output.splitlines()
    # What was being written when the guest was ended may be half there: it was not acknowledged.
    whole = lines if output.endswith("\n") else lines[:-1]
    for number, line in enumerate(whole, 1):
        checksum = hashlib.md5(f"{number}\n".encode(), usedforsecurity=False).hexdigest()
        assert line == f"{number} {checksum}", (number, line)
    return len(whole)
