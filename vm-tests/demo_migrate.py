# SPDX-License-Identifier: Apache-2.0
"""The demo of a migration: a guest that writes moves over a slow link, and its disk follows.

    ./dev demo migrate [--rate 200M] [--delay 10ms] [--data 512M]

The same guest, with a writer that syncs and acknowledges numbered records, moves three times:

- memory only: both ends share the disk, as if there was shared storage: the yardstick;
- ``nbdstream migrate``: the guest first, its disk afterwards. Then the source is deleted, the
  guest goes on writing, and every record that it acknowledged is in the destination's leaf;
- QEMU's own way: ``blockdev-mirror`` to an NBD server at the destination, then memory.

Memory and disk each go over an emulated link of the given rate and delay.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import trio

import images
import migration
from benchmarks.link_control import LinkProcess, link_process, parse_bit_rate, parse_seconds
from benchmarks.link_model import Shape
from migration import Ends, last_acknowledged, records, wait_acknowledged
from nbdstream.guest.disks import Disk
from nbdstream.guest.qmp import QMPClient
from nbdstream.migrate.destination import Spawned
from nbdstream.migrate.memory import Memory
from nbdstream.migrate.plan import MigrationPlan
from nbdstream.migrate.run import Migration
from nbdstream.migrate.switchover import PHASE_WORDS, Phase
from nbdstream.qmp import JSONObject
from nbdstream.units import format_size, parse_size
from tests.peers import run

PATIENCE = 600.0


@dataclass(frozen=True)
class Outcome:
    """What one way took: seconds, and bytes over the links."""

    way: str
    running: float
    downtime: float
    complete: float
    memory: int
    disk: int


@dataclass(frozen=True)
class Road:
    """The links between the hosts, and what was sent over them."""

    memory: LinkProcess
    disk: LinkProcess

    def sent(self, link: LinkProcess) -> int:
        return sum(int(link.stats()[way]["bytes"]) for way in ("up", "down"))

    def outcome(self, way: str, running: float, downtime: float, complete: float) -> Outcome:
        return Outcome(
            way, running, downtime, complete, self.sent(self.memory), self.sent(self.disk)
        )


@contextmanager
def road(ends: Ends, shape: Shape) -> Iterator[Road]:
    """Links to the destination's memory socket and to the socket at which disks are served."""
    with link_process("127.0.0.1:0", f"unix:{ends.path('memory')}", shape) as memory:
        with link_process("127.0.0.1:0", f"unix:{ends.path('offer')}", shape) as disk:
            yield Road(memory, disk)


def plan_for(ends: Ends, links: Road) -> MigrationPlan:
    """A plan that takes the links."""
    disk = replace(ends.disk("raw", node="disk0"), reach=str(links.disk.address))
    return replace(
        ends.plan(disk),
        memory=f"tcp:{links.memory.address}",
        memory_listen=f"unix:{ends.path('memory')}",
    )


async def with_nbdstream(ends: Ends, disk: Path, shape: Shape) -> Outcome:
    """The guest first, then its disk; afterwards the source is gone."""

    def watch(phase: Phase, facts: JSONObject) -> None:
        if not facts:
            print(f"  {PHASE_WORDS[phase]}", flush=True)

    with road(ends, shape) as links:
        plan = plan_for(ends, links)
        async with migration.source(ends, Disk.file(disk)) as guest:
            summary = await Migration(plan, watch).run()
            seen = last_acknowledged(guest.console.transcript)
        outcome = links.outcome(
            "nbdstream migrate", summary.until_running, summary.downtime, summary.until_local
        )
    leaf = plan.disks[0].leaf
    disk.unlink()  # noqa: ASYNC240
    print("  the source is gone, and its image deleted")
    async with migration.destination(ends):
        await wait_acknowledged(ends, seen + 3)
    last = last_acknowledged(Path(ends.path("there.console")).read_text())  # noqa: ASYNC240
    await migration.end_server(plan.disks[0].control)
    found = records(Path(leaf))
    if found < last:
        sys.exit(f"of {last} acknowledged records only {found} are on the disk")
    print(f"  {last} records acknowledged, {found} found, each checked; e2fsck finds no fault")
    return outcome


async def with_qemu(ends: Ends, disk: Path, shape: Shape, *, mirror: bool) -> Outcome:
    """QEMU alone; without ``mirror`` both ends have the same disk, and only memory moves."""
    target = Path(ends.path("target.raw")) if mirror else disk
    if mirror:
        run(["truncate", "-r", disk, target])
    with road(ends, shape) as links:
        plan = plan_for(ends, links)
        command = [*plan.command, "-incoming", "defer", "-S"]
        command += ["-blockdev", Disk.file(target).named("disk0")]
        command += ["-qmp", f"unix:{plan.destination_qmp},server=on,wait=off"]
        async with migration.source(ends, Disk.file(disk)) as guest:
            source, began = guest.guest.qmp, trio.current_time()
            process = Spawned(command, Path(ends.path("qemu.log")))
            try:
                await process.wait_socket(plan.destination_qmp)
                async with QMPClient.connect(plan.destination_qmp) as there:
                    if mirror:
                        await _mirror(ends, links, source, there)
                    memory = Memory(source, there, plan)
                    with source.events() as events:
                        await memory.start()
                        await memory.wait_stopped(events, lambda _facts: None)
                        stopped = trio.current_time()
                        if mirror:
                            await source.execute("block-job-cancel", {"device": "mirror"})
                            await source.wait_event("BLOCK_JOB_COMPLETED")
                        await memory.hand_over(events)
                    await there.execute("cont")
                    await there.wait_event("RESUME")
                    now = trio.current_time()
            finally:
                await process.end()
        way = "QEMU: mirror, then migrate" if mirror else "memory only (shared disk)"
        return links.outcome(way, now - began, now - stopped, now - began)


async def _mirror(ends: Ends, links: Road, source: QMPClient, there: QMPClient) -> None:
    """Copy the disk to the destination, and keep the copy up to date."""
    address = {"type": "unix", "data": {"path": ends.path("offer")}}
    await there.execute("nbd-server-start", {"addr": address})
    export = {"type": "nbd", "id": "mirror", "node-name": "disk0", "name": "disk0"}
    await there.execute("block-export-add", {**export, "writable": True})
    node = Disk.nbd(f"nbd://{links.disk.address}/disk0").blockdev
    await source.execute("blockdev-add", {**node, "node-name": "target"})
    job = {"job-id": "mirror", "device": "disk0", "target": "target", "sync": "full"}
    await source.execute("blockdev-mirror", job)
    with trio.fail_after(PATIENCE):
        await source.wait_event("BLOCK_JOB_READY")


async def demo(shape: Shape, data: int) -> None:
    """Run all three, and compare."""
    image = images.busybox()
    outcomes = []
    for way in ("memory only", "nbdstream", "QEMU alone"):
        print(f"{way}:", flush=True)
        with tempfile.TemporaryDirectory(prefix="nbdstream-demo-") as directory:
            ends = Ends(Path(directory), image)
            disk = images.copy_image(image / "disk.raw", Path(directory) / "disk.raw")
            _grow(disk, data)
            if way == "nbdstream":
                outcome = await with_nbdstream(ends, disk, shape)
            else:
                outcome = await with_qemu(ends, disk, shape, mirror=way == "QEMU alone")
        outcomes.append(outcome)
        print(f"  runs there after {outcome.running:.1f} s, pause {outcome.downtime:.2f} s")
    _table(outcomes)


def _grow(disk: Path, data: int) -> None:
    """More data than the guest's own on the disk, behind its partition."""
    with open(disk, "ab") as file:
        for _ in range(data >> 20):
            file.write(os.urandom(1 << 20))


def _table(outcomes: list[Outcome]) -> None:
    print(
        f"\n{'way':28} {'runs there':>11} {'pause':>8} {'complete':>9} {'memory':>10} {'disk':>10}"
    )
    for one in outcomes:
        print(
            f"{one.way:28} {one.running:9.1f} s {one.downtime:6.2f} s {one.complete:7.1f} s "
            f"{format_size(one.memory):>10} {format_size(one.disk):>10}"
        )
    yardstick, ours, theirs = outcomes
    print(
        f"\ntime until running: x {ours.running / yardstick.running:.2f} of memory only, ", end=""
    )
    print(f"x {ours.running / theirs.running:.2f} of QEMU's own way; ", end="")
    print(f"pause: x {ours.downtime / yardstick.downtime:.2f} of memory only")


def main() -> None:
    """Run the demo as the command line says."""
    parser = argparse.ArgumentParser(description="Migrate a guest over a slow link, in three ways.")
    parser.add_argument("--rate", default="200M", help="of the link, bits per second")
    parser.add_argument("--delay", default="10ms", help="of the link, one way")
    parser.add_argument("--data", default="512M", help="on the disk besides the system")
    arguments = parser.parse_args()
    if shutil.which("qemu-system-x86_64") is None:
        sys.exit("qemu-system-x86 is not installed")
    shape = Shape(rate=parse_bit_rate(arguments.rate), delay=parse_seconds(arguments.delay))
    trio.run(demo, shape, parse_size(arguments.data))


if __name__ == "__main__":
    main()
