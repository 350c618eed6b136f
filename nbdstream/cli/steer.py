# SPDX-License-Identifier: Apache-2.0
"""status, pause, resume, speed, cancel, stream: commands on a control socket.

Nothing here that another QMP client could not do: docs/control.md describes what is said
on the socket.
"""

import json
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import click
import trio

from nbdstream.cli.output import emit, say
from nbdstream.cli.params import CONTROL, RATE, SIZE
from nbdstream.cli.progress import Snapshot
from nbdstream.errors import NbdstreamError
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import JSONObject
from nbdstream.units import format_count, format_duration, format_rate, format_size

T = TypeVar("T")

# A program that sends no greeting for so many seconds is no QMP server.
CONNECT_SECONDS = 10.0

control_argument = click.argument("control", type=CONTROL, metavar="CONTROL")
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def run_on(control: str, work: Callable[[QMPClient], Awaitable[T]]) -> T:
    """Do some work over a connection to the control socket. Raises QMPError, NbdstreamError."""

    return trio.run(work_on, control, work)


async def work_on(control: str, work: Callable[[QMPClient], Awaitable[T]]) -> T:
    """As `run_on`, in a program that runs already. Raises QMPError, NbdstreamError."""
    with trio.CancelScope(deadline=trio.current_time() + CONNECT_SECONDS) as scope:
        async with QMPClient.connect(control) as qmp:
            scope.deadline = math.inf
            return await work(qmp)
    raise NbdstreamError(f"{control}: the program that listens there does not speak QMP")


async def _job_id(qmp: QMPClient) -> str:
    """The active job's name. Raises NbdstreamError if there is none."""
    return name_of(await qmp.execute("query-jobs"))


def name_of(jobs: list[JSONObject]) -> str:
    """The active job's name, from what query-jobs returns. Raises NbdstreamError."""
    if not jobs:
        raise NbdstreamError("no stream job is active ('resume' starts one)")
    return str(jobs[0]["id"])


async def device_of(qmp: QMPClient) -> str:
    """By what name the control socket knows the disk."""
    return str((await qmp.execute("query-block"))[0]["device"])


async def report_of(qmp: QMPClient) -> JSONObject:
    """What x-nbdstream-stats returns. Raises QMPError."""
    report: JSONObject = await qmp.execute("x-nbdstream-stats")
    return report


# -- looking ---------------------------------------------------------------------------------


@click.command()
@control_argument
@as_json_option
def status(control: str, as_json: bool) -> None:
    """Show the state of a server's disk, stream job and backing.

    CONTROL is the leaf that is being served, or the socket given to `nbdstream serve --control`.
    """

    async def look(qmp: QMPClient) -> tuple[JSONObject, JSONObject]:
        return (await qmp.execute("query-block"))[0], await report_of(qmp)

    block, report = run_on(control, look)
    if as_json:
        emit(json.dumps({"block": block, "stats": report}, indent=4))
        return
    for name, value in _facts(block["inserted"], report):
        say(f"{name + ':':<13} {value}")


def _facts(inserted: JSONObject, report: JSONObject) -> list[tuple[str, str]]:
    """`status` for people: one line a subject."""
    disk, job, backing = report["disk"], report.get("job", {}), report.get("backing")
    access = "read-only" if inserted["ro"] else "writable"
    keeps = "on" if report["copy-on-read"] else "off"
    facts = [
        (
            "leaf",
            f"{inserted['file']} ({inserted['drv']}, {format_size(report['size'])}, {access})",
        ),
        ("owner", "this server" if report["owner"] else f"not this server: {report['frozen']}"),
        ("backing", _backing_fact(backing)),
        *([("sandbox", backing["sandbox"])] if backing and backing.get("sandbox") else []),
        ("stream", str(Snapshot.of(report))),
    ]
    if backing is not None and job.get("speed"):
        facts.append(("limit", format_rate(job["speed"])))
    if deadline := job.get("finish-in"):
        pace = f"needs {format_rate(deadline['speed'])}"
        facts.append(("finish", f"in {format_duration(deadline['left'])}: {pace}"))
    if backing is not None:
        facts.append(("copy-on-read", keeps))
    facts.append(
        (
            "demand",
            f"{format_count(disk['demand-misses'], 'miss', 'misses')},"
            f" {format_size(disk['demand-bytes'])};"
            f" {format_size(disk['fetched-bytes'])} fetched in total",
        )
    )
    facts += [("problem", problem) for problem in report.get("problems", [])]
    return facts


def _backing_fact(backing: JSONObject | None) -> str:
    if backing is None:
        return "none: the whole disk is local"
    since = format_duration(max(time.time() - backing["since"], 0))
    if not backing["connected"]:
        return f"{backing['uri']}, lost {since} ago: {backing['last-error']}"
    connections = format_count(backing["connections"], "connection")
    return f"{backing['uri']}, connected for {since} ({connections})"


# -- steering --------------------------------------------------------------------------------


@click.command()
@control_argument
def pause(control: str) -> None:
    """Pause the stream job; guest reads still fetch data."""

    async def work(qmp: QMPClient) -> None:
        await qmp.execute("job-pause", {"id": await _job_id(qmp)})

    run_on(control, work)


@click.command()
@control_argument
def resume(control: str) -> None:
    """Resume a paused stream job, or start one."""

    async def work(qmp: QMPClient) -> None:
        if jobs := await qmp.execute("query-jobs"):
            await qmp.execute("job-resume", {"id": jobs[0]["id"]})
        else:
            await qmp.execute("block-stream", {"device": await device_of(qmp)})

    run_on(control, work)


@click.command()
@control_argument
@click.argument("rate", type=RATE)
def speed(control: str, rate: int) -> None:
    """Limit the stream job to RATE bytes per second; 0 removes the limit."""

    async def work(qmp: QMPClient) -> None:
        arguments = {"device": await _job_id(qmp), "speed": rate}
        await qmp.execute("block-job-set-speed", arguments)

    run_on(control, work)


@click.command()
@control_argument
def cancel(control: str) -> None:
    """End the stream job; local data stays local."""

    async def work(qmp: QMPClient) -> None:
        await qmp.execute("job-cancel", {"id": await _job_id(qmp)})

    run_on(control, work)


@click.command()
@control_argument
@click.argument("offset", type=SIZE)
@click.option("--length", type=SIZE, default=0, help="Bytes to stream.  [default: one cluster]")
@as_json_option
def stream(control: str, offset: int, length: int, as_json: bool) -> None:
    """Fetch the cluster at OFFSET, or the --length bytes from there.

    Prints how many bytes were fetched and where the next remote byte is. Calls in a loop
    stream the whole disk. This works with and without an active stream job.
    """

    async def work(qmp: QMPClient) -> Any:
        arguments = {"device": await device_of(qmp), "offset": offset, "length": length}
        return await qmp.execute("x-nbdstream-stream", arguments)

    step = run_on(control, work)
    if as_json:
        emit(json.dumps(step))
        return
    rest = "nothing after it is remote"
    if "next" in step:
        rest = f"the next remote byte is at {step['next']}"
    say(f"streamed {step['streamed']} bytes; {rest}")
