# SPDX-License-Identifier: Apache-2.0
"""The commands on a control socket, run as programs against a real one."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from nbdstream.cli.watch import watch_job
from nbdstream.leaf.base import State
from nbdstream.qmp.client import QMPClient
from nbdstream.streamer.job import JobStatus
from tests.control_room import DEVICE, Room, control_room
from tests.small_disk import SIZE

Done = subprocess.CompletedProcess[str]


async def nbdstream(*args: str | Path) -> Done:
    """Run the program to its end."""
    command = [sys.executable, "-m", "nbdstream", *map(str, args)]
    done = await trio.run_process(
        command, check=False, capture_stdout=True, capture_stderr=True, stdin=b""
    )
    return subprocess.CompletedProcess(
        command, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def open_gates(room: Room) -> None:
    """Answer the reads under way, and all to come, at once."""
    room.backing.gated = False
    for read in room.backing.waiting:
        read.gate.set()


# -- looking ---------------------------------------------------------------------------------


async def test_status_is_for_people_and_for_programs(tmp_path: Path) -> None:
    async with control_room(tmp_path, gated=True) as room:
        room.stream.set_speed(10 << 20)
        room.stream.start()
        done = await nbdstream("status", room.path)
        assert done.returncode == 0 and done.stderr == ""
        facts = dict(line.split(":", 1) for line in done.stdout.splitlines())
        assert "64.3 KiB, writable" in facts["leaf"]
        assert "memory:, connected for" in facts["backing"]
        assert "0.0 % local, 0 B of 64.3 KiB" in facts["stream"]
        assert facts["limit"].strip() == "10.0 MiB/s"
        assert facts["owner"].strip() == "this server"
        assert facts["copy-on-read"].strip() == "on"
        program = json.loads((await nbdstream("status", "--json", room.path)).stdout)
        assert program["block"]["device"] == DEVICE
        assert program["stats"]["job"]["status"] == "running"


async def test_status_of_a_plain_local_disk(tmp_path: Path) -> None:
    async with control_room(tmp_path, backing=False) as room:
        done = await nbdstream("status", room.path)
        assert done.returncode == 0
        assert "none: the whole disk is local" in done.stdout
        assert "100.0 % local" in done.stdout


async def test_watch_follows_the_job_to_its_end(tmp_path: Path) -> None:
    async with control_room(tmp_path, gated=True) as room:
        room.stream.start()
        async with watching(room) as results:
            open_gates(room)
    (done,) = results
    assert done.returncode == 0 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith("0.0 % local, ") and lines[-1].startswith("100.0 % local, ")


@asynccontextmanager
async def watching(room: Room) -> AsyncIterator[list[Done]]:
    """`nbdstream watch` has shown its first line; what came of it is there after the block."""
    results: list[Done] = []

    async def watch() -> None:
        results.append(await nbdstream("watch", room.path))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await listening(room)
        yield results


async def listening(room: Room) -> None:
    """Wait until a client watches: what the first line says has been looked up."""
    watched = trio.Event()
    looks = 0
    original = room.disk.statistics

    def noticed() -> dict[str, int]:
        nonlocal looks
        looks += 1
        if looks == 2:
            watched.set()  # the first look is to see whether there is a job
        return original()

    room.disk.statistics = noticed  # type: ignore[method-assign]
    with trio.fail_after(20):
        await watched.wait()


@pytest.mark.parametrize(
    ("ending", "complaint"),
    [
        ("cancel", "the stream job was cancelled"),
        ("fail", "Input/output error"),
        ("vanish", "connection"),
    ],
)
async def test_watch_fails_where_the_job_does(tmp_path: Path, ending: str, complaint: str) -> None:
    results: list[Done] = []
    over = trio.Event()

    async def watch(path: Path) -> None:
        results.append(await nbdstream("watch", path))
        over.set()

    async with trio.open_nursery() as nursery, control_room(tmp_path, gated=True) as room:
        room.stream.start()
        nursery.start_soon(watch, room.path)
        await listening(room)
        if ending == "cancel":
            room.stream.cancel()
            await over.wait()
        elif ending == "fail":
            room.leaf.drop_backing = failing  # type: ignore[method-assign]
            open_gates(room)
            await over.wait()
    (done,) = results
    assert done.returncode == 1
    assert complaint in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def failing() -> None:
    raise OSError(5, "Input/output error")


async def test_watch_succeeds_though_the_server_ends_with_the_job(tmp_path: Path) -> None:
    """As under --exit-when-complete: the event may be the last thing that is heard."""
    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[Room]) -> None:
            async with control_room(tmp_path, gated=True) as room:
                task_status.started(room)
                await room.stream.completed.wait()

        room = await nursery.start(serve)
        room.stream.start()
        async with watching(room) as results:
            open_gates(room)
    assert results[0].returncode == 0, results[0].stderr


async def test_watch_of_what_is_over_or_never_began(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room:
        idle = await nbdstream("watch", room.path)
        assert idle.returncode == 1
        assert idle.stderr.startswith("nbdstream: error: no stream job is active")
        room.stream.start()
        await room.stream.completed.wait()
        over = await nbdstream("watch", room.path)
        assert over.returncode == 0 and "the whole disk is local" in over.stdout


async def test_watch_of_a_job_that_ends_at_the_first_look(tmp_path: Path) -> None:
    async with control_room(tmp_path, gated=True) as room, QMPClient.connect(room.path) as qmp:
        room.stream.start()
        execute = qmp.execute

        async def late(command: str) -> Any:
            answer = await execute(command)
            if command == "x-nbdstream-stats":
                open_gates(room)
                await room.stream.completed.wait()
            return answer

        qmp.execute = late  # type: ignore[assignment,method-assign]
        with trio.fail_after(20):
            await watch_job(qmp)


async def test_watch_ends_quietly_on_control_c(tmp_path: Path) -> None:
    async with control_room(tmp_path, gated=True) as room:
        room.stream.start()
        command = [sys.executable, "-m", "nbdstream", "watch", str(room.path)]
        async with trio.open_nursery() as nursery:
            run = partial(trio.run_process, command, check=False, capture_stderr=True)
            process: trio.Process = await nursery.start(run)
            await listening(room)
            process.send_signal(signal.SIGINT)
        assert process.returncode == 130


# -- steering --------------------------------------------------------------------------------


async def test_the_job_does_as_it_is_told(tmp_path: Path) -> None:
    async with control_room(tmp_path, gated=True) as room:
        job = room.stream

        async def tell(*args: str) -> None:
            done = await nbdstream(args[0], room.path, *args[1:])
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

        await tell("resume")  # there is none: starts one
        assert room.status() is JobStatus.RUNNING and job.id == DEVICE
        await tell("pause")
        assert room.status() is JobStatus.PAUSED
        await tell("resume")
        assert room.status() is JobStatus.RUNNING
        await tell("speed", "1.5M")
        assert job.speed == 3 << 19
        await tell("pause")
        await tell("cancel")
        await trio.testing.wait_all_tasks_blocked()
        assert room.status() is JobStatus.NULL


async def test_stream_takes_one_step(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room:
        done = await nbdstream("stream", room.path, "4k")
        assert done.stdout == "streamed 2048 bytes; the next remote byte is at 6144\n"
        assert room.leaf.states[8] is State.DATA and room.leaf.states[0] is State.UNALLOCATED
        done = await nbdstream("stream", "--json", "--length", "1M", room.path, "0")
        assert json.loads(done.stdout) == {"streamed": SIZE - 2048}
        done = await nbdstream("stream", room.path, "0")
        assert done.stdout == "streamed 0 bytes; nothing after it is remote\n"


# -- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["pause", "cancel", "speed"])
async def test_without_a_job_there_is_nothing_to_steer(tmp_path: Path, command: str) -> None:
    async with control_room(tmp_path) as room:
        rate = ["1M"] if command == "speed" else []
        done = await nbdstream(command, room.path, *rate)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert done.stderr.startswith("nbdstream: error: no stream job is active")


def no_socket(path: Path) -> None:
    assert not path.exists()


def dead_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def plain_file(path: Path) -> None:
    path.write_text("")


@pytest.mark.parametrize(
    ("prepare", "complaint"),
    [
        (no_socket, "No such file or directory"),
        (dead_socket, "Connection refused"),
        (plain_file, "is not being served"),
        (Path.mkdir, "is a directory: name the control socket, or the leaf"),
    ],
)
async def test_no_server_at_the_socket_is_one_clear_line(
    tmp_path: Path, prepare: Callable[[Path], None], complaint: str
) -> None:
    path = tmp_path / "control.sock"
    prepare(path)
    done = await nbdstream("status", path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("nbdstream: error: ") and done.stderr.count("\n") == 1
    assert str(path) in done.stderr and complaint in done.stderr


async def test_a_server_of_something_else_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        async with trio.open_nursery() as nursery:
            results: list[Done] = []

            async def status() -> None:
                results.append(await nbdstream("status", path))

            nursery.start_soon(status)
            client, _ = await trio.to_thread.run_sync(other.accept)
            with client:
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                client.shutdown(socket.SHUT_WR)
                await trio.to_thread.run_sync(client.recv, 1)
    assert results[0].returncode == 1 and results[0].stderr.count("\n") == 1


async def test_bad_usage_ends_with_status_2(tmp_path: Path) -> None:
    done = await nbdstream("speed", tmp_path / "any", "fast")
    assert done.returncode == 2 and "'fast' is not a rate" in done.stderr
