# SPDX-License-Identifier: Apache-2.0
"""Stopping a server: what is under way ends, within its time."""

import pytest
import trio
import trio.lowlevel
import trio.testing

from nbdstream.net.listeners import listen_unix
from nbdstream.server import server as server_module
from nbdstream.server.constants import (
    GREETING,
    Chunk,
)
from nbdstream.server.server import Server
from testbed.peers import temporary_directory
from tests.memory_export import MemoryExport, held_export
from tests.server_support import (
    READ,
    WRITE,
    RawClient,
    request,
    serving,
)

SIZE = 4 << 20


async def test_stop_finishes_what_is_in_flight_and_closes() -> None:
    disk = held_export(SIZE)
    with temporary_directory() as directory:
        path = directory / "nbd"
        server = Server([disk])
        ended = trio.Event()

        async def run() -> None:
            await server.run([listen_unix(path)])
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.testing.wait_all_tasks_blocked()
            idle, haggling, busy = [await RawClient.connect(path) for _ in range(3)]
            await idle.go()
            await haggling.take(GREETING.size)
            await busy.go()
            await busy.send(request(READ, 512, 512) + request(WRITE, 0, 4, cookie=2) + b"data")
            while len(disk.calls) < 2:
                await trio.lowlevel.checkpoint()
            server.stop()
            assert await idle.hung_up()
            assert await haggling.hung_up()
            assert not path.exists()
            with pytest.raises(FileNotFoundError):
                await RawClient.connect(path)
            assert not ended.is_set()
            disk.gate.set()
            replies = sorted([await busy.reply(), await busy.reply()])
            position = (512).to_bytes(8, "big")
            assert replies == [
                (1, Chunk.OFFSET_DATA, position + disk.data[512:1024]),
                (2, 0, b""),
            ]
            assert await busy.hung_up()
            await ended.wait()
            for each in (idle, haggling, busy):
                await each.aclose()


async def test_stop_drops_what_takes_too_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "STOP_TIMEOUT", 0.05)
    disk = held_export(SIZE)
    async with serving([disk]) as (server, path):
        waiting = await RawClient.connect(path)
        await waiting.go()
        await waiting.send(request(READ, 0, 512))
        while not disk.calls:
            await trio.lowlevel.checkpoint()
        server.stop()
        assert await waiting.hung_up()
        await waiting.aclose()
    assert "dropped" in caplog.messages[-1]


async def test_stop_under_load_loses_no_reply() -> None:
    """Whatever was answered was answered whole, however busy the connection was."""
    disk = MemoryExport(SIZE)
    async with serving([disk]) as (server, path):
        busy = await RawClient.connect(path)
        await busy.go(structured=False)
        answered_reads = 0

        async def flood() -> None:
            try:
                while True:
                    await busy.send(request(READ, 0, 4096) * 64)
            except trio.BrokenResourceError:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            try:
                while True:
                    assert await busy.reply(4096) == (1, 0, bytes(disk.data[:4096]))
                    answered_reads += 1
                    if answered_reads == 1000:
                        server.stop()
            except (EOFError, trio.BrokenResourceError):
                pass
        assert answered_reads >= 1000
        await busy.aclose()
