# SPDX-License-Identifier: Apache-2.0
"""status, watch, pause, resume, speed, cancel, stream: commands on a control socket.

Nothing here that another QMP client could not do: docs/control.md describes what is said
on the socket.
"""

import json
import math
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

import click
import trio

from nbdstream.cli.output import emit, say
from nbdstream.cli.params import CONTROL, RATE, SIZE
from nbdstream.cli.progress import ProgressLine, Snapshot
from nbdstream.errors import NbdstreamError
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import Event, JSONObject, QMPConnectionError
from nbdstream.units import format_count, format_duration, format_rate, format_size

T = TypeVar("T")

# A program that sends no greeting for so many seconds is no QMP server.
CONNECT_SECONDS = 10.0

control_argument = click.argument("control", type=CONTROL, metavar="CONTROL")
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def run_on(control: str, work: Callable[[QMPClient], Awaitable[T]]) -> T:
    """Do some work over a connection to the control socket. Raises QMPError, NbdstreamError."""

    async def main() -> T:
        with trio.CancelScope(deadline=trio.current_time() + CONNECT_SECONDS) as scope:
            async with QMPClient.connect(control) as qmp:
                scope.deadline = math.inf
                return await work(qmp)
        raise NbdstreamError(f"{control}: the program that listens there does not speak QMP")

    return trio.run(main)


async def _job_id(qmp: QMPClient) -> str:
    """The active job's name. Raises NbdstreamError if there is none."""
    return _name_of(await qmp.execute("query-jobs"))


def _name_of(jobs: list[JSONObject]) -> str:
    if not jobs:
        raise NbdstreamError("no stream job is active ('resume' starts one)")
    return str(jobs[0]["id"])


async def device_of(qmp: QMPClient) -> str:
    """By what name the control socket knows the disk."""
    return str((await qmp.execute("query-block"))[0]["device"])


async def _report(qmp: QMPClient) -> JSONObject:
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
        return (await qmp.execute("query-block"))[0], await _report(qmp)

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


@click.command()
@control_argument
def watch(control: str) -> None:
    """Show progress until the stream job ends.

    On a terminal it fills the screen. Keys: space pauses and resumes the job, + and - double and
    halve its limit, 0 lifts the limit, q leaves; the job continues then.

    The exit status is 0 if the whole disk is local, and 1 if the job was cancelled or
    failed, or if the server ended before the job did.
    """
    interrupted = False
    try:
        run_on(control, watch_job)
    except* KeyboardInterrupt:
        interrupted = True  # an exit from here would end up in a group
    if interrupted:
        sys.exit(128 + signal.SIGINT)


async def watch_job(qmp: QMPClient) -> None:
    """Show progress until the job ends. Raises NbdstreamError if the disk is not local then."""
    # In this order: a job that ends after the first look has left its event, and one that had
    # ended before it shows in the second.
    jobs = await qmp.execute("query-jobs")
    snapshot = Snapshot.of(await _report(qmp))
    if snapshot.state == "complete":
        say("complete: the whole disk is local")
        return
    job_id = _name_of(jobs)
    if sys.stderr.isatty():
        from nbdstream.cli.screen import watch_on_screen

        event = await watch_on_screen(qmp, job_id)
    else:
        event = None
    with ProgressLine() as line:
        event = event or await _follow(qmp, job_id, line)
        if event.name == "BLOCK_JOB_COMPLETED" and "error" not in event.data:
            # The server may have gone already: the event says all that is left to say.
            line.show(replace(snapshot, state="complete", local=snapshot.length))
            return
    raise NbdstreamError(event.data.get("error", "the stream job was cancelled"))


async def _follow(qmp: QMPClient, job_id: str, line: ProgressLine) -> Event:
    """Show progress until the event comes that ends the job; return that."""

    async def refresh() -> None:
        try:
            while True:
                line.show(Snapshot.of(await _report(qmp)))
                await trio.sleep(line.interval)
        except QMPConnectionError:
            pass  # `wait_event` raises the same, after the event if there is one

    async with trio.open_nursery() as nursery:
        nursery.start_soon(refresh)
        event = await qmp.wait_event(
            "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", data={"device": job_id}
        )
        nursery.cancel_scope.cancel()
    return event


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
