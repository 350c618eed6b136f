# SPDX-License-Identifier: Apache-2.0
"""How fast is a guest's disk after a pivot, beside the same guest on the local file all along?

Two guests with the same image and the same qcow2 data disk, filled with random data: one has the
disk on nbdstream and is pivoted, the other one opens the file from the beginning. fio in each of
them (`testbed/guests/fio_image.py`) runs the same loads with direct I/O; the guest that does not
measure is stopped. They take turns at each load, and the first turn alternates, so that what the
machine does meanwhile hits both alike. A ratio is of two turns that follow each other, and the
median of all rounds counts.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from benchmarks.report import Options, Report, judged, median, progress
from nbdstream.guest.disks import Disk
from nbdstream.guest.qemu import MiB
from nbdstream.pivot.leftovers import PivotDisk
from nbdstream.pivot.run import pivot
from nbdstream.pivot.servers import ControlledServer, Monitor
from testbed.guests import fio_image, images, systems
from testbed.guests.systems import BUSYBOX, RunningGuest
from testbed.peers import Peer, make_image, nbdstream_serve
from testbed.peers import run as run_program

SIZE = 256 << 20
MEMORY = 384 * MiB
# Rounds that are at least needed to call a median of ratios a result.
ROUNDS_LEAST = 5
# Name, fio's options, and where its terse output has the operations a second.
READ_IOPS, WRITE_IOPS = 7, 48
LOADS = (
    ("randread 4k, depth 1", "--rw=randread --bs=4k --iodepth=1", READ_IOPS),
    ("randread 4k, depth 16", "--rw=randread --bs=4k --iodepth=16", READ_IOPS),
    ("randwrite 4k, depth 16", "--rw=randwrite --bs=4k --iodepth=16", WRITE_IOPS),
    ("read 1M, depth 4", "--rw=read --bs=1M --iodepth=4", READ_IOPS),
    ("write 1M, depth 4", "--rw=write --bs=1M --iodepth=4", WRITE_IOPS),
)
_COMMON = "--filename=/dev/vdb --ioengine=libaio --direct=1 --time_based"

Rates = list[float]


def run(options: Options) -> Report:
    """See `benchmarks.__main__`."""
    report = Report(
        "fio in a guest whose disk was pivoted, and in one on the local file",
        ["load", "served IOPS", "pivoted IOPS", "local IOPS", "pivoted / local", "least", "most"],
    )
    with tempfile.TemporaryDirectory() as name:
        served, pairs = trio.run(_measure, Path(name), options)
    for number, (load, _, _) in enumerate(LOADS):
        ratios = [pivoted[number] / local[number] for pivoted, local in pairs]
        rates = (median(one[number] for one in side) for side in zip(*pairs, strict=True))
        judgement = judged(median(ratios), least=0.98)
        row = [load, served[number], *rates, judgement, min(ratios), max(ratios)]
        report.rows.append(row)
    everything = [new / old for pair in pairs for new, old in zip(*pair, strict=True)]
    total = judged(median(everything), least=0.98)
    report.ratios.append(["all loads", None, None, None, total, None, None])
    report.notes.append(f"{len(pairs)} rounds in turns; least and most of a round")
    return report


async def _measure(directory: Path, options: Options) -> tuple[Rates, list[tuple[Rates, Rates]]]:
    """The rates on the server, and those of the pivoted and the local guest in each round."""
    raw, leaf, local = (directory / name for name in ("data.raw", "leaf.qcow2", "local.qcow2"))
    make_image(raw, SIZE, sparse=False)
    for image in (leaf, local):
        run_program(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image])
    pairs = []
    with nbdstream_serve(leaf) as server:
        async with AsyncExitStack() as guests:
            moved = await _guest(guests, directory, Disk.nbd(server.uri))
            still = await _guest(guests, directory, Disk.file(local, "qcow2"))
            served = [await _rate(moved, load, options.seconds) for load in range(len(LOADS))]
            await _pivot(moved, server)
            for number in range(max(options.rounds, ROUNDS_LEAST)):
                rates: dict[RunningGuest, Rates] = {moved: [], still: []}
                for load in range(len(LOADS)):
                    order = (moved, still) if (number + load) % 2 else (still, moved)
                    for guest in order:
                        rates[guest].append(await _rate(guest, load, options.seconds))
                pairs.append((rates[moved], rates[still]))
                progress(number, *(f"{a / b:.2f}" for a, b in zip(*pairs[-1], strict=True)))
    return served, pairs


async def _guest(guests: AsyncExitStack, directory: Path, data: Disk) -> RunningGuest:
    """A guest that is stopped, with its data disk at /dev/vdb and fio mounted."""
    image = images.busybox()
    system = dataclasses.replace(BUSYBOX, memory=MEMORY)
    root = images.copy_image(image / "disk.raw", Path(tempfile.mkdtemp(dir=directory)) / "root")
    tools = {"driver": "file", "filename": str(images.fio() / "disk.raw"), "read-only": True}
    disks = (Disk.file(root), data, Disk({"driver": "raw", "read-only": True, "file": tools}))
    booting = systems.boot(system, *disks, extra=systems.direct_boot(image))
    guest = await guests.enter_async_context(booting)
    place = fio_image.MOUNT_POINT
    await guest.run(f"mkdir {place} && mount -t ext4 -o ro /dev/vdc {place}")
    await guest.guest.qmp.execute("stop")
    return guest


async def _rate(guest: RunningGuest, load: int, seconds: float) -> float:
    """Operations a second of a load; the guest runs as long as it takes."""
    _, options, place = LOADS[load]
    job = f"--name=load {_COMMON} {options} --runtime={round(seconds * 1000)}ms"
    await guest.guest.qmp.execute("cont")
    text = await guest.run(f"{fio_image.COMMAND} --output-format=terse {job}")
    await guest.guest.qmp.execute("stop")
    lines = [line.split(";") for line in text.split("\n") if line.startswith("3;fio")]
    if len(lines) != 1:
        raise RuntimeError(f"fio in the guest says: {text}")
    return float(lines[0][place])


async def _pivot(guest: RunningGuest, server: Peer) -> None:
    disks: Sequence[PivotDisk] = [PivotDisk(ControlledServer(str(server.control)))]
    await pivot(Monitor.of(guest.guest.qmp, guest.guest.process.pid), disks)
