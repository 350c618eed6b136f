# SPDX-License-Identifier: Apache-2.0
"""pivot: the running guest goes on from the leaf itself."""

from functools import partial

import click
import trio

from nbdstream.cli.output import say
from nbdstream.cli.params import CONTROL
from nbdstream.errors import UsageError
from nbdstream.pivot.auto import pivot_when_complete
from nbdstream.pivot.leftovers import PivotDisk
from nbdstream.pivot.run import pivot as run_pivot
from nbdstream.pivot.servers import ControlledServer, Monitor
from nbdstream.service import Service


@click.command()
@click.argument("controls", nargs=-1, required=True, type=CONTROL, metavar="CONTROL...")
@click.option("--qmp", required=True, metavar="SOCKET", help="QMP socket of the guest's QEMU.")
@click.option(
    "--leaf-path",
    "leaf_paths",
    multiple=True,
    metavar="PATH",
    help="Path of the leaf as QEMU sees it, if that differs. Once per CONTROL, in order.",
)
@click.option(
    "--now",
    is_flag=True,
    help="Do not wait for a qcow2 leaf to be complete: QEMU reads the rest by itself.",
)
def pivot(controls: tuple[str, ...], qmp: str, leaf_paths: tuple[str, ...], now: bool) -> None:
    """Let a running guest go on from its leaf, without nbdstream.

    CONTROL is a leaf that is completely local, or the control socket of its server; name those
    of all disks of the guest to pivot them in one pause. The guest is stopped for some
    milliseconds, QEMU opens the leaf, and the server ends. If anything fails, the guest goes
    on through the server as before.
    """
    if leaf_paths and len(leaf_paths) != len(controls):
        raise UsageError("give --leaf-path once per CONTROL, or not at all")
    paths = leaf_paths or ("",) * len(controls)
    disks = [
        PivotDisk(ControlledServer(control), path)
        for control, path in zip(controls, paths, strict=True)
    ]
    pause = trio.run(partial(run_pivot, Monitor.at(qmp), disks, now=now))
    say(pivoted(pause))


def pivoted(pause: float) -> str:
    """What is said of a pivot for which the guest was stopped for so many seconds."""
    return f"pivoted: QEMU uses the leaf itself; the guest was stopped for {pause:.3f} s"


async def pivot_itself(service: Service, monitor: Monitor) -> None:
    """A task: pivot when the disk is complete, say so, and end the service."""
    pause = await pivot_when_complete(service, monitor)
    say(f"nbdstream: {pivoted(pause)}", err=True)
    service.stop()
