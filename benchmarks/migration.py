# SPDX-License-Identifier: Apache-2.0
"""How soon does a running guest run elsewhere, and what does that cost it? Over a link of
200 Mbit/s and 20 ms round trip, with a disk of 2 GiB that is half full, beside memory alone
(as on shared storage) and beside QEMU's own way, which mirrors the disk first.

The ways, the guest and what it is checked for afterwards are those of `./dev demo migrate`
(`testbed/migrations/ways.py`): as root between two network namespaces, memory and disk through one
queue. Time runs from being asked, with the guest at work, to its first sign of life at the
destination; so making a leaf and starting servers and QEMU there counts. The pause is the
one that the guest's heartbeat shows (`testbed/migrations/heartbeat.py`), beside the time for
which QEMU has the guest stopped.

`--seconds` means nothing here: a round takes about three minutes.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import trio

from benchmarks.report import Cell, Options, Report, judged, median, progress, ratio
from nbdstream.errors import NbdstreamError
from testbed.guests import images
from testbed.link.model import Shape
from testbed.migrations.arrangement import Ends
from testbed.migrations.network import Network, network
from testbed.migrations.ways import (
    WAYS,
    MemoryOnly,
    Mirror,
    Nbdstream,
    Outcome,
    Way,
    WayError,
    migrate,
)
from testbed.peers import PeerError, temporary_directory

LINK = Shape(rate=200e6, delay=0.010)
SIZE = 2 << 30
ALLOCATED = 1 << 30


def one(kind: type[Way], base: Ends, between: Network, disk: Path) -> Outcome:
    """Move a guest with a copy of a disk. Raises PeerError."""
    with tempfile.TemporaryDirectory(dir=base.directory) as name:
        ends = replace(base, directory=Path(name))
        copy = images.copy_image(disk, ends.directory / "disk.raw")
        try:
            return trio.run(migrate, kind(ends, between, copy, lambda _text: None))
        except (NbdstreamError, WayError) as error:
            raise PeerError(f"{kind.name}: {error}") from error


def run(options: Options) -> Report:
    columns = ["runs there s", "pause s", "QEMU's pause s", "all there s", "memory MB", "disk MB"]
    report = Report("A guest moves over 200 Mbit/s, 20 ms, with 2 GiB of disk", ["", *columns])
    outcomes: dict[str, list[Outcome]] = {}
    image = images.busybox()
    with temporary_directory() as directory, network(directory, LINK) as between:
        report.notes.append(f"Over {between.what}.")
        disk = images.copy_image(image / "disk.raw", directory / "disk.raw")
        images.grow(disk, SIZE, ALLOCATED - disk.stat().st_blocks * 512)
        for _ in range(options.rounds):
            for way in WAYS:
                outcome = one(way, Ends(directory, image), between, disk)
                progress(way.name, f"{outcome.running:.1f} s, {outcome.heard.heard:.2f} s")
                outcomes.setdefault(way.name, []).append(outcome)
    _fill(report, outcomes)
    return report


def _fill(report: Report, outcomes: dict[str, list[Outcome]]) -> None:
    def typical(name: str, of: str) -> float | None:
        return median(getattr(outcome, of) for outcome in outcomes[name])

    heard = {
        name: median(outcome.heard.heard for outcome in found) for name, found in outcomes.items()
    }
    for name in outcomes:
        seconds: list[Cell] = [typical(name, of) for of in ("running", "pause", "complete")]
        seconds.insert(1, heard[name])
        sent = [(typical(name, of) or 0) / 1e6 for of in ("memory", "disk")]
        report.rows.append([name, *seconds, *sent])
    yardstick, ours, theirs = MemoryOnly.name, Nbdstream.name, Mirror.name
    running = typical(ours, "running")
    blank = [None, None, None]
    report.ratios += [
        [
            "nbdstream / memory only",
            judged(ratio(running, typical(yardstick, "running")), most=1.2),
            judged(ratio(heard[ours], heard[yardstick]), most=1.5),
            ratio(typical(ours, "pause"), typical(yardstick, "pause")),
            *blank,
        ],
        [
            "nbdstream / QEMU",
            judged(ratio(running, typical(theirs, "running")), most=0.2),
            ratio(heard[ours], heard[theirs]),
            ratio(typical(ours, "pause"), typical(theirs, "pause")),
            *blank,
        ],
        [
            "disk moved / allocated at the source",
            *blank,
            *blank[:2],
            judged(ratio(typical(ours, "disk"), typical(ours, "allocated")), most=1.02),
        ],
    ]
    everything = [outcome for found in outcomes.values() for outcome in found]
    report.notes.append(
        "Pause: from the last beat of the guest's heartbeat at the source to the first one at the "
        f"destination; without a migration at most {max(o.heard.usual for o in everything):.2f} s "
        "were between two."
    )
    report.notes.append(
        "The guest's own clock stands still meanwhile; it shows at most "
        f"{max(o.heard.guest for o in everything):.2f} s."
    )
