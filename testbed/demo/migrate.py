# SPDX-License-Identifier: Apache-2.0
"""The demo of a migration: a guest that writes moves over a slow link, and its disk follows.

    ./dev demo migrate [--guest debian|busybox] [--rate 200M] [--delay 10ms] [--data SIZE]

The same guest, with a writer that syncs and acknowledges numbered records, moves three times
from one network namespace into another (see `network`): memory alone, by ``nbdstream migrate``,
and by QEMU's own means (see `ways`). One table compares them.
"""

import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import trio

from nbdstream.units import format_size, parse_size
from testbed.guests import images, systems
from testbed.link.control import parse_bit_rate, parse_seconds
from testbed.link.model import Shape
from testbed.migrations import arrangement
from testbed.migrations.arrangement import Ends
from testbed.migrations.network import Network, network
from testbed.migrations.ways import WAYS, Outcome, Way, migrate

SYSTEMS = {"debian": systems.DEBIAN, "busybox": arrangement.SMALL}


async def demo(base: Ends, between: Network, data: int) -> None:
    """Run all three, and compare."""
    _table([await _one(way, base, between, data) for way in WAYS])


async def _one(kind: type[Way], base: Ends, between: Network, data: int) -> Outcome:
    print(f"\n{kind.name}:", flush=True)
    begin = trio.current_time()

    def say(text: str) -> None:
        print(f"  {trio.current_time() - begin:6.1f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory(dir=base.directory) as name:
        ends = replace(base, directory=Path(name))
        disk = images.copy_image(ends.image / "disk.raw", ends.directory / "disk.raw")
        images.grow(disk, disk.stat().st_size + data, data)
        return await migrate(kind(ends, between, disk, say))


def _table(outcomes: list[Outcome]) -> None:
    columns = (
        "way",
        "runs there",
        "QEMU's pause",
        "heartbeat's pause",
        "complete",
        "memory",
        "disk",
    )
    print("\n{:28}{:>12}{:>14}{:>15}{:>11}{:>12}{:>12}".format(*columns))
    for one in outcomes:
        print(
            f"{one.way:28}{one.running:10.2f} s{one.pause:12.2f} s{one.heard.heard:13.2f} s"
            f"{one.complete:9.1f} s{format_size(one.memory):>12}{format_size(one.disk):>12}"
        )
    yardstick, ours, theirs = outcomes
    usual, clock = (
        max(getattr(one.heard, what) for one in outcomes) for what in ("usual", "guest")
    )
    print(
        f"\ntime until running: x {ours.running / yardstick.running:.2f} of memory only, "
        f"x {ours.running / theirs.running:.2f} of QEMU's own way\n"
        f"pause as the guest's heartbeat shows it: "
        f"x {ours.heard.heard / yardstick.heard.heard:.2f} of memory only "
        f"(without a migration {usual:.2f} s at most;\n"
        f"  of all this the guest's own clock shows {clock:.2f} s at most: it stands still)\n"
        f"disk moved: x {ours.disk / ours.allocated:.3f} of what was allocated at the source"
    )


def main() -> None:
    """Run the demo as the command line says."""
    parser = argparse.ArgumentParser(description="Migrate a guest over a slow link, in three ways.")
    parser.add_argument("--guest", choices=SYSTEMS, default="debian")
    parser.add_argument("--rate", default="200M", help="of the link, bits per second")
    parser.add_argument("--delay", default="10ms", help="of the link, one way")
    parser.add_argument("--data", default="0", help="on the disk besides the system")
    arguments = parser.parse_args()
    if shutil.which("qemu-system-x86_64") is None:
        sys.exit("qemu-system-x86 is not installed")
    shape = Shape(rate=parse_bit_rate(arguments.rate), delay=parse_seconds(arguments.delay))
    image = images.debian() if arguments.guest == "debian" else images.busybox()
    with tempfile.TemporaryDirectory(prefix="nbdstream-demo-") as name:
        base = Ends(Path(name), image, SYSTEMS[arguments.guest])
        with network(base.directory, shape) as between:
            print(f"{arguments.rate}bit/s, {2000 * shape.delay:g} ms: {between.what}")
            trio.run(demo, base, between, parse_size(arguments.data))


if __name__ == "__main__":
    main()
