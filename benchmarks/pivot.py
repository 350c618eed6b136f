# SPDX-License-Identifier: Apache-2.0
"""For how long does a guest stand still when it is pivoted, and how fast is its disk afterwards?

A guest with one and with four disks on qcow2 leaves, from the last heartbeat before the pivot to
the first one after it (`testbed/migrations/heartbeat.py`). Then the same guest reads its disk with
direct I/O, 4 KiB at a time, in turns with a guest that was on the local file all along.
"""

import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import trio

from benchmarks.report import Options, Report, judged, median, progress, ratio
from nbdstream.guest.disks import Disk
from nbdstream.pivot.leftovers import PivotDisk
from nbdstream.pivot.run import pivot
from nbdstream.pivot.servers import ControlledServer, Monitor
from testbed.guests import images, systems
from testbed.guests.systems import RunningGuest
from testbed.migrations.arrangement import SMALL
from testbed.migrations.heartbeat import LOOP, Heartbeat, serial_port
from testbed.peers import Peer, make_image, nbdstream_serve
from testbed.peers import run as run_program

SIZE = 64 << 20
READS = 5000
BEATS = 100


@dataclass
class Figures:
    """Seconds that the guest was stopped, that nothing was heard of it, and at the most before;
    seconds for `READS` reads, on the server, after the pivot, and of the local guest."""

    stopped: list[float] = field(default_factory=list)
    silent: list[float] = field(default_factory=list)
    usual: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)
    pivoted: list[float] = field(default_factory=list)
    local: list[float] = field(default_factory=list)


def run(options: Options) -> Report:
    """See `benchmarks.__main__`."""
    report = Report(
        "A guest goes on from its leaf",
        ["disks", "stopped ms", "silent ms", "before ms", "served IOPS", "pivoted", "local"],
    )
    for disks, most in ((1, 50), (4, 100)):
        figures = Figures()
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as name:
                trio.run(_round, Path(name), disks, figures)
            progress(disks, f"{1000 * figures.silent[-1]:.0f} ms")
        pauses = [figures.stopped, figures.silent, figures.usual]
        rates = [figures.served, figures.pivoted, figures.local]
        report.rows.append(
            [
                str(disks),
                *(1000 * (median(times) or 0) for times in pauses),
                *(READS / (median(times) or 1) for times in rates),
            ]
        )
        silent = median(figures.silent) or 0
        speed = ratio(median(figures.local), median(figures.pivoted))
        report.ratios.append(
            [
                f"{disks}: target",
                None,
                judged(1000 * silent, most=most),
                None,
                None,
                judged(speed, least=0.98),
                None,
            ]
        )
    return report


async def _round(directory: Path, disks: int, figures: Figures) -> None:
    image = images.busybox()
    leaves = [directory / f"disk{number}.qcow2" for number in range(disks)]
    for leaf in leaves:
        raw = image / "disk.raw"
        if leaf is not leaves[0]:
            raw = directory / "data.raw"
            make_image(raw, SIZE)
        _convert(raw, leaf)
    local = directory / "local.qcow2"
    _convert(image / "disk.raw", local)
    with ExitStack() as servers:
        peers = [servers.enter_context(nbdstream_serve(leaf)) for leaf in leaves]
        async with AsyncExitStack() as guests:
            await _measure(directory, image, peers, local, figures, guests)


async def _measure(
    directory: Path,
    image: Path,
    peers: Sequence[Peer],
    local: Path,
    figures: Figures,
    guests: AsyncExitStack,
) -> None:
    qmp, port = directory / "qmp", directory / "pulse"
    extra = (*systems.direct_boot(image), "-qmp", f"unix:{qmp},server=on,wait=off")
    moved = await guests.enter_async_context(
        systems.boot(
            SMALL, *(Disk.nbd(peer.uri) for peer in peers), extra=(*extra, *serial_port(str(port)))
        )
    )
    still = await guests.enter_async_context(
        systems.boot(SMALL, Disk.file(local, "qcow2"), extra=systems.direct_boot(image))
    )
    figures.served.append(await _read(moved))
    await still.guest.qmp.execute("stop")
    beats = Heartbeat()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(beats.listen, str(port), str(directory / "none"))
        await moved.console.send(f"{LOOP}\n")
        await beats.wait_here(BEATS)
        first = len(beats.here)
        disks = [PivotDisk(ControlledServer(str(peer.control))) for peer in peers]
        figures.stopped.append(await pivot(Monitor.at(str(qmp)), disks))
        await beats.wait_here(first + BEATS)
        nursery.cancel_scope.cancel()
    times = [after.heard - before.heard for before, after in pairwise(beats.here)]
    figures.usual.append(max(times[: first - 1]))
    figures.silent.append(max(times[first - 1 :]))
    await moved.console.run("kill $!")
    await still.guest.qmp.execute("cont")
    for _ in range(3):
        figures.pivoted.append(await _read(moved))
        figures.local.append(await _read(still))


async def _read(guest: RunningGuest) -> float:
    """Seconds for `READS` direct reads of 4 KiB."""
    began = trio.current_time()
    await guest.run(f"dd if=/dev/vda of=/dev/null bs=4k count={READS} iflag=direct")
    return trio.current_time() - began


def _convert(raw: Path, leaf: Path) -> None:
    run_program(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, leaf])
