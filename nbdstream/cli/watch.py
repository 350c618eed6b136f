# SPDX-License-Identifier: Apache-2.0
"""watch: the progress of one disk, or of any number of disks, until their jobs end."""

import signal
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import click
import trio

from nbdstream.cli.find import control_socket, control_sockets, is_ours, sockets_in
from nbdstream.cli.output import say
from nbdstream.cli.progress import LINE_INTERVAL, ProgressLine, Snapshot
from nbdstream.cli.steer import name_of, report_of, run_on, work_on
from nbdstream.cli.watched import Watched
from nbdstream.errors import NbdstreamError
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import Event, QMPConnectionError
from nbdstream.tasks import open_background_nursery

# Seconds between two looks for new servers. A socket that is not ours is looked at so many times:
# it may be one that is being made.
LOOK_INTERVAL = 1.0
LOOKS = 3


@click.command()
@click.argument("controls", nargs=-1, required=True, metavar="CONTROL|DIRECTORY...")
def watch(controls: tuple[str, ...]) -> None:
    """Show progress until the stream job ends; of several disks, until all jobs end.

    A directory stands for all control sockets in it, also for those of servers that start later.
    On a terminal it fills the screen. Keys:
    space pauses and resumes the job, + and - double and halve its limit, 0 lifts the limit, q
    leaves; the jobs continue then. Of several disks, the arrows choose one, Enter shows it
    alone, and Esc all of them again.

    The exit status is 0 if each disk is wholly local, and 1 if a job was cancelled or failed, or
    if a server ended before its job did.
    """
    interrupted = False
    try:
        if len(controls) == 1 and not Path(controls[0]).is_dir():
            run_on(control_socket(controls[0]), watch_job)
        else:
            directories = [name for name in controls if Path(name).is_dir()]
            watch_all([socket for name in controls for socket in _sockets(name)], directories)
    except* KeyboardInterrupt:
        interrupted = True  # an exit from here would end up in a group
    if interrupted:
        sys.exit(128 + signal.SIGINT)


def _sockets(name: str) -> list[str]:
    return control_sockets(name) if Path(name).is_dir() else [control_socket(name)]


# -- one disk ---------------------------------------------------------------------------------


async def watch_job(qmp: QMPClient) -> None:
    """Show progress until the job ends. Raises NbdstreamError if the disk is not local then."""
    # In this order: a job that ends after the first look has left its event, and one that had
    # ended before it shows in the second.
    jobs = await qmp.execute("query-jobs")
    snapshot = Snapshot.of(await report_of(qmp))
    if snapshot.state == "complete":
        say("complete: the whole disk is local")
        return
    job_id = name_of(jobs)
    event = await _on_screen(qmp, job_id) if sys.stderr.isatty() else None
    with ProgressLine() as line:
        event = event or await _follow(qmp, job_id, line)
        if trouble := trouble_of(event):
            raise NbdstreamError(trouble)
        # The server may have gone already: the event says all that is left to say.
        line.show(replace(snapshot, state="complete", local=snapshot.length))


def trouble_of(event: Event) -> str:
    """Why the disk is not wholly local after the event that ended the job, or ""."""
    if event.name == "BLOCK_JOB_COMPLETED" and "error" not in event.data:
        return ""
    return str(event.data.get("error", "the stream job was cancelled"))


async def _on_screen(qmp: QMPClient, job_id: str) -> Event:
    from nbdstream.cli.screen import show

    disk = Watched("")
    await disk.look(qmp)
    async with open_background_nursery() as nursery:
        nursery.start_soon(show, [disk])
        return await disk.follow(qmp, job_id)


async def _follow(qmp: QMPClient, job_id: str, line: ProgressLine) -> Event:
    """Show progress until the event comes that ends the job; return that."""

    async def refresh() -> None:
        try:
            while True:
                line.show(Snapshot.of(await report_of(qmp)))
                await trio.sleep(line.interval)
        except QMPConnectionError:
            pass  # `wait_event` raises the same, after the event if there is one

    async with open_background_nursery() as nursery:
        nursery.start_soon(refresh)
        return await qmp.wait_event(
            "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", data={"device": job_id}
        )


# -- any number -------------------------------------------------------------------------------


def watch_all(controls: list[str], directories: Sequence[str] = ()) -> None:
    """Show the progress of these disks until all jobs have ended, then how each ended. Servers that
    start meanwhile in one of the directories are shown, too.

    Raises:
        NbdstreamError: not all of them are wholly local.
    """
    disks = [Watched(control) for control in controls]
    try:
        trio.run(_watch_all, disks, directories)
    finally:
        for disk in disks:
            if disk.over:
                say(f"{disk.name}: {disk.trouble or 'complete: the whole disk is local'}", err=True)
    if failed := [disk for disk in disks if disk.trouble]:
        raise NbdstreamError(f"{len(failed)} of {len(disks)} disks are not wholly local")


async def _watch_all(disks: list[Watched], directories: Sequence[str]) -> None:
    async with open_background_nursery() as nursery:
        if sys.stderr.isatty():
            from nbdstream.cli.screen import show

            nursery.start_soon(show, disks)
        else:
            nursery.start_soon(_print_lines, disks)
        async with trio.open_nursery() as following:
            for disk in disks:
                following.start_soon(_watch_one, disk)
            if directories:
                nursery.start_soon(_look_for_more, disks, directories, following)


async def _look_for_more(
    disks: list[Watched], directories: Sequence[str], following: trio.Nursery
) -> None:
    """A task: follow servers that start in these directories, and those that start again."""
    looks = Counter(_version(disk.control) for disk in disks for _ in range(LOOKS))
    while True:
        await trio.sleep(LOOK_INTERVAL)
        for path in _sockets_now(directories):
            version = _version(path)
            looks[version] += 1
            if looks[version] > LOOKS or not await is_ours(path):
                continue
            looks[version] = LOOKS
            if all(disk.over for disk in disks):
                return  # the end has come
            number = next((i for i, disk in enumerate(disks) if disk.control == path), len(disks))
            disks[number:] = [Watched(path), *disks[number + 1 :]]
            following.start_soon(_watch_one, disks[number])


def _sockets_now(directories: Sequence[str]) -> list[str]:
    with suppress(OSError):  # a directory may be gone
        return [path for directory in directories for path in sockets_in(directory)]
    return []


def _version(path: str) -> tuple[str, int, int]:
    """What tells a socket from the next one at the same path."""
    with suppress(OSError):
        found = Path(path).stat()
        return path, found.st_ino, found.st_mtime_ns
    return path, 0, 0


async def _watch_one(disk: Watched) -> None:
    """A task: follow a disk until its job ends, or its server does."""

    async def work(qmp: QMPClient) -> str:
        jobs = await qmp.execute("query-jobs")
        await disk.look(qmp)
        if disk.snapshot.state == "complete":
            return ""
        return trouble_of(await disk.follow(qmp, name_of(jobs)))

    try:
        trouble = await work_on(disk.control, work)
    except NbdstreamError as error:
        trouble = str(error)
    disk.end(trouble)


async def _print_lines(disks: list[Watched]) -> None:
    """A task: a line for each disk from time to time."""
    while True:
        for disk in disks:
            if disk.known and not disk.over:
                say(f"{disk.name}: {disk.snapshot}", err=True)
        await trio.sleep(LINE_INTERVAL)
