# SPDX-License-Identifier: Apache-2.0
"""A control socket over a real disk and job, whose leaf and backing tests can steer."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from nbdstream.control import control_server, listen_control
from nbdstream.control.server import ControlServer
from nbdstream.disk import StreamedDisk, open_disk
from nbdstream.qmp.client import QMPClient
from nbdstream.streamer.job import JobStatus, StreamJob
from tests.doubles import GatedBacking, MemoryLeaf
from tests.small_disk import CONTENT, SIZE

DEVICE = "disk0"
NEGOTIATE = b'{"execute":"qmp_capabilities"}\n'


class Room:
    """What a control socket is about; ``stopped`` is set when a client said ``quit``."""

    def __init__(self, path: Path, leaf: MemoryLeaf, backing: GatedBacking | None) -> None:
        self.path = path
        self.leaf = leaf
        self.backing_double = backing
        self.stopped = trio.Event()
        self.disk: StreamedDisk
        self.job: StreamJob | None = None
        self.server: ControlServer

    @property
    def backing(self) -> GatedBacking:
        assert self.backing_double is not None
        return self.backing_double

    @property
    def stream(self) -> StreamJob:
        assert self.job is not None
        return self.job

    def status(self) -> JobStatus:
        """The job's status now, for checks one after the other (an attribute's type narrows)."""
        return self.stream.status


@asynccontextmanager
async def control_room(
    directory: Path, *, gated: bool = False, backing: bool = True, more: tuple[object, ...] = ()
) -> AsyncIterator[Room]:
    """A room with a control socket. ``backing``: False for a plain local disk, without a job."""
    leaf = MemoryLeaf(SIZE)
    double = GatedBacking(CONTENT, gated=gated) if backing else None
    if double is None:
        leaf.drop_backing()
    room = Room(directory / "control.sock", leaf, double)
    async with open_disk(leaf, double) as room.disk, trio.open_nursery() as nursery:
        if double is not None:
            room.job = StreamJob(room.disk, job_id=DEVICE)
            nursery.start_soon(room.job.run)
        room.server = control_server(
            room.disk, room.job, device=DEVICE, stop=room.stopped.set, more=more
        )
        listener = listen_control(room.path)
        nursery.start_soon(room.server.serve, listener)
        yield room
        nursery.cancel_scope.cancel()
    leaf.close()


async def ask(room: Room, command: str, /, **arguments: Any) -> Any:
    """One command on a connection of its own; ``_`` in names stands for ``-``."""
    async with QMPClient.connect(room.path) as qmp:
        return await qmp.execute(command, spelled(arguments))


def spelled(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as QMP spells them."""
    return {name.replace("_", "-"): value for name, value in arguments.items()}


class RawClient:
    """A client that sends bytes as they are and takes the replies apart."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def message(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = await self.stream.receive_some()
            assert data, "the server hung up"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        data = self._buffer
        while more := await self.stream.receive_some():
            data += more
        return data


Connect = Callable[..., Awaitable[RawClient]]


async def raw_clients() -> AsyncIterator[Connect]:
    """A fixture that connects to rooms; what it connected is closed at the test's end."""
    async with AsyncExitStack() as stack:

        async def connect(room: Room, *, negotiate: bool = True) -> RawClient:
            stream = await trio.open_unix_socket(str(room.path))
            client = RawClient(await stack.enter_async_context(stream))
            assert "QMP" in await client.message()
            if negotiate:
                await client.send(NEGOTIATE)
                assert await client.message() == {"return": {}}
            return client

        yield connect


def fill_up(room: Room, size: int) -> None:
    """Emit events of so many bytes in all, without letting the tasks run that send them."""
    for _ in range(size // 1000):
        room.server.emit("X_FILL", {"blob": "x" * 900})
