# SPDX-License-Identifier: Apache-2.0
"""migrate: a running guest moves to another host, its disks follow."""

import json
import shlex
import signal
import sys
from dataclasses import asdict

import click
import trio
from rich.console import Console

from nbdstream.cli.output import emit, say
from nbdstream.cli.params import DURATION, RATE
from nbdstream.cli.pivot import pivoted
from nbdstream.cli.progress import Snapshot
from nbdstream.errors import NbdstreamError
from nbdstream.migrate.plan import DiskPlan, MigrationPlan
from nbdstream.migrate.recover import take_back
from nbdstream.migrate.run import Migration, Summary
from nbdstream.migrate.switchover import PHASE_WORDS, Phase
from nbdstream.pivot.leftovers import PivotDisk
from nbdstream.pivot.run import pivot as run_pivot
from nbdstream.pivot.servers import ControlledServer, Monitor
from nbdstream.qmp.protocol import JSONObject
from nbdstream.tasks import open_background_nursery
from nbdstream.text import shown
from nbdstream.units import format_duration, format_size

# Exit status when the migration was cancelled: as of a program that SIGINT has ended.
CANCELLED = 130


@click.command()
@click.option(
    "--source-qmp", required=True, metavar="SOCKET", help="QMP socket of the guest's QEMU."
)
@click.option(
    "--destination-qmp",
    required=True,
    metavar="SOCKET",
    help="QMP socket of the destination's QEMU.",
)
@click.option(
    "--memory",
    required=True,
    metavar="URI",
    help="Migration URI for guest RAM, e.g. tcp:HOST:PORT.",
)
@click.option(
    "--memory-listen",
    default="",
    metavar="URI",
    help="URI the destination QEMU listens on, if different.",
)
@click.option(
    "--disk",
    "disks",
    required=True,
    multiple=True,
    metavar="KEY=VALUE,...",
    help="A disk: source-control=SOCKET or source-node=NAME, listen=HOST:PORT|unix:PATH, "
    "[reach=HOST:PORT|unix:PATH,] leaf=FILE, socket=SOCKET, control=SOCKET. Repeat for each disk.",
)
@click.option(
    "--at",
    "prefix",
    default="",
    metavar="PREFIX",
    help="Command prefix for the destination, e.g. 'ip netns exec far'.",
)
@click.option(
    "--tls",
    default="",
    metavar="DIR",
    help="Send guest RAM and disks by TLS, with the certificates in DIR.",
)
@click.option("--postcopy-ram", is_flag=True, help="Switch to post-copy after the first RAM pass.")
@click.option(
    "--max-bandwidth", type=RATE, default=0, help="Limit for guest RAM, bytes per second."
)
@click.option("--downtime-limit", type=DURATION, default=0.0, help="Downtime that QEMU aims at.")
@click.option(
    "--no-follow", is_flag=True, help="Exit as soon as the guest runs at the destination."
)
@click.option(
    "--pivot/--no-pivot",
    default=True,
    help="Have the guest use its leaves itself once all is local.  [default: pivot]",
)
@click.option("--dry-run", is_flag=True, help="Print the steps and do nothing.")
@click.option("--cancel", is_flag=True, help="Undo what a killed 'migrate' left behind.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("command", nargs=-1, metavar="[-- QEMU ARGS...]")
def migrate(
    source_qmp: str,
    destination_qmp: str,
    memory: str,
    memory_listen: str,
    disks: tuple[str, ...],
    prefix: str,
    tls: str,
    postcopy_ram: bool,
    max_bandwidth: int,
    downtime_limit: float,
    no_follow: bool,
    pivot: bool,
    dry_run: bool,
    cancel: bool,
    as_json: bool,
    command: tuple[str, ...],
) -> None:
    """Move a running guest to another host; its disks follow while it runs there.

    QEMU ARGS is the command line of the destination's QEMU without its disks. The disks are
    added as the nodes disk0, disk1 and so on, together with -incoming, -S and -qmp. Until the
    guest is told to run at the destination, an error or Ctrl-C undoes everything.
    """
    plan = MigrationPlan(
        source_qmp=source_qmp,
        destination_qmp=destination_qmp,
        memory=memory,
        memory_listen=memory_listen,
        disks=tuple(DiskPlan.parse(disk) for disk in disks),
        prefix=tuple(shlex.split(prefix)),
        command=command,
        tls=tls,
        postcopy_ram=postcopy_ram,
        max_bandwidth=max_bandwidth,
        downtime_limit=downtime_limit,
        pivot=pivot and no_follow,
    )
    if cancel:
        say(trio.run(take_back, plan))
        return
    plan.check()
    if dry_run:
        for step in plan.describe():
            say(str(step))
        return
    with Phases() as phases:
        summary = trio.run(_run, Migration(plan, phases.show), not no_follow)
    if summary is None:
        say("nbdstream: cancelled; the guest stays at the source", err=True)
        sys.exit(CANCELLED)
    pause = trio.run(_pivot, plan) if pivot and not no_follow else None
    if as_json:
        emit(json.dumps(asdict(summary) | {"pivot": pause}))
        return
    for line in _words(summary, follow=not no_follow):
        say(line)
    if pause is not None:
        say(pivoted(pause))


async def _pivot(plan: MigrationPlan) -> float | None:
    """All is local: have the guest go on from its leaves. Seconds for which it was stopped, or
    None if it goes on through the servers; that is no failure of the migration."""
    disks = [PivotDisk(ControlledServer(disk.control)) for disk in plan.disks]
    try:
        return await run_pivot(Monitor.at(plan.destination_qmp), disks)
    except (NbdstreamError, OSError) as error:
        say(f"nbdstream: no pivot: {error}; try 'nbdstream pivot' later", err=True)
        return None


async def _run(migration: Migration, follow: bool) -> Summary | None:
    """The summary, or None if a signal cancelled the migration before it was too late."""
    with trio.CancelScope() as scope:
        async with open_background_nursery() as nursery:

            async def cancel_on_signal() -> None:
                with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                    async for _ in signals:
                        scope.cancel()

            nursery.start_soon(cancel_on_signal)
            return await migration.run(follow=follow)
    return migration.summary if migration.phase >= Phase.TOLD else None


class Phases:
    """Shows phases on standard error: live on a terminal, else a line for each."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False)
        self._status = self._console.status("") if self._console.is_terminal else None

    def __enter__(self) -> "Phases":
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, phase: Phase, facts: JSONObject) -> None:
        """See `nbdstream.migrate.run.Watch`."""
        words = PHASE_WORDS[phase]
        if not facts:
            self._console.print(f"nbdstream: {shown(words)}", markup=False)
        elif self._status is not None:
            self._status.update(f"{words}: {_facts(facts)}")


def _facts(facts: JSONObject) -> str:
    if "disks" in facts:
        return "; ".join(
            str(Snapshot.of(report)) if report else "no answer" for report in facts["disks"]
        )
    ram = facts.get("ram")
    if ram is None:
        return str(facts.get("status", ""))
    return (
        f"{format_size(ram['transferred'])} sent, {format_size(ram['remaining'])} to go, "
        f"pass {ram['dirty-sync-count']}"
    )


def _words(summary: Summary, *, follow: bool) -> list[str]:
    lines = [
        f"downtime:             {summary.downtime:.3f} s",
        f"time to switch over:  {format_duration(summary.until_running)}",
        f"RAM transferred:      {format_size(summary.memory_bytes)}",
    ]
    if follow:
        lines += [
            f"time until local:     {format_duration(summary.until_local)}",
            f"disk transferred:     {format_size(summary.disk_bytes)}",
            f"transferred twice:    {format_size(summary.disk_twice)}",
            "the source's images are no longer needed and may be deleted",
        ]
    return lines
