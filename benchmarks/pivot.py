# SPDX-License-Identifier: Apache-2.0
"""For how long does a guest stand still when it is pivoted?

A guest with one and with four disks on qcow2 leaves has just written to each of them what nothing
has flushed. The pause is heard from outside: from the last heartbeat before the pivot to the first
one after it (`testbed/migrations/heartbeat.py`). "before" is the longest silence of the second
before the pivot: what there is without one. The steps of the pause are timed as well.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import trio

from benchmarks.report import Cell, Options, Report, judged, median, progress
from nbdstream.guest.disks import Disk
from nbdstream.pivot.leftovers import PivotDisk
from nbdstream.pivot.run import pivot
from nbdstream.pivot.servers import ControlledServer, Monitor
from nbdstream.qmp.client import QMPClient
from testbed.guests import images, systems
from testbed.guests.systems import RunningGuest
from testbed.migrations.arrangement import SMALL
from testbed.migrations.heartbeat import LOOP, Heartbeat, serial_port
from testbed.peers import Peer, make_image, nbdstream_serve
from testbed.peers import run as run_program

SIZE = 64 << 20
BEATS = 100
# Pivots of each number of disks; --rounds asks for more.
PIVOTS_LEAST = 5
# MiB that the guest writes to each disk before.
WRITTEN = 8
STEPS = ("stop", "x-nbdstream-let-go", "blockdev-add", "blockdev-reopen", "cont")


@dataclass
class Figures:
    """Seconds that the guest was stopped, that nothing was heard of it, and at the most before;
    seconds of each step."""

    stopped: list[float] = field(default_factory=list)
    silent: list[float] = field(default_factory=list)
    usual: list[float] = field(default_factory=list)
    steps: dict[str, list[float]] = field(default_factory=dict)


def run(options: Options) -> Report:
    """See `benchmarks.__main__`."""
    columns = [
        f"{what} {kind}" for what in ("stopped", "silent", "before") for kind in ("", "most")
    ]
    report = Report("A guest goes on from its leaf: the pause, ms", ["disks", *columns])
    for disks, most in ((1, 50), (4, 100)):
        figures = Figures()
        for _ in range(max(options.rounds, PIVOTS_LEAST)):
            with tempfile.TemporaryDirectory() as name:
                trio.run(_round, Path(name), disks, figures)
            progress(disks, f"{1000 * figures.silent[-1]:.0f} ms")
        cells: list[Cell] = []
        for times in (figures.stopped, figures.silent, figures.usual):
            cells += [1000 * (median(times) or 0), 1000 * max(times)]
        report.rows.append([str(disks), *cells])
        silent = judged(1000 * (median(figures.silent) or 0), most=most)
        report.ratios.append([f"{disks}: target", None, None, silent, None, None, None])
        steps = (f"{name} {1000 * (median(took) or 0):.1f}" for name, took in figures.steps.items())
        report.notes.append(f"steps of {disks}, ms: {', '.join(steps)}")
    report.notes.append(f"{len(figures.silent)} pivots each; medians, and the longest of each")
    return report


async def _round(directory: Path, disks: int, figures: Figures) -> None:
    image = images.busybox()
    leaves = [directory / f"disk{number}.qcow2" for number in range(disks)]
    for leaf in leaves:
        raw = image / "disk.raw"
        if leaf is not leaves[0]:
            raw = directory / "data.raw"
            make_image(raw, SIZE)
        run_program(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, leaf])
    with ExitStack() as servers:
        peers = [servers.enter_context(nbdstream_serve(leaf)) for leaf in leaves]
        await _measure(directory, image, peers, figures)


async def _measure(directory: Path, image: Path, peers: Sequence[Peer], figures: Figures) -> None:
    qmp, port = directory / "qmp", directory / "pulse"
    monitor = ("-qmp", f"unix:{qmp},server=on,wait=off", *serial_port(str(port)))
    disks = [PivotDisk(ControlledServer(str(peer.control))) for peer in peers]
    exports = (Disk.nbd(peer.uri) for peer in peers)
    extra = (*systems.direct_boot(image), *monitor)
    beats = Heartbeat()
    async with systems.boot(SMALL, *exports, extra=extra) as guest, trio.open_nursery() as nursery:
        nursery.start_soon(beats.listen, str(port), str(directory / "none"))
        await _write(guest, len(peers))
        await guest.console.send(f"{LOOP}\n")
        await beats.wait_here(BEATS)
        with _timed(figures.steps):
            first = len(beats.here)
            figures.stopped.append(await pivot(Monitor.at(str(qmp)), disks))
        await beats.wait_here(first + BEATS)
        nursery.cancel_scope.cancel()
    times = [after.heard - before.heard for before, after in pairwise(beats.here)]
    figures.usual.append(max(times[: first - 1]))
    figures.silent.append(max(times[first - 1 :]))


async def _write(guest: RunningGuest, disks: int) -> None:
    """What reaches the server, and is not flushed."""
    targets = ["/root/written", *(f"/dev/vd{chr(ord('b') + n)}" for n in range(disks - 1))]
    for target in targets:
        command = f"dd if=/dev/zero of={target} bs=1M count={WRITTEN} oflag=direct conv=notrunc"
        await guest.run(command)


@contextmanager
def _timed(steps: dict[str, list[float]]) -> Iterator[None]:
    """Note how long the steps of a pivot take, each from its first command to its last answer."""
    began: dict[str, float] = {}
    ended: dict[str, float] = {}
    execute = QMPClient.execute

    async def timed(self: QMPClient, name: str, *args: Any, **more: Any) -> Any:
        now = trio.current_time()
        if name == "stop":
            began.clear()  # what came before is not part of the pause
        began.setdefault(name, now)
        try:
            return await execute(self, name, *args, **more)
        finally:
            ended[name] = trio.current_time()

    with mock.patch.object(QMPClient, "execute", timed):
        yield
    for name in STEPS:
        steps.setdefault(name, []).append(ended[name] - began[name])
