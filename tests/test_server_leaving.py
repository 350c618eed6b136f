# SPDX-License-Identifier: Apache-2.0
"""Clients that go away: reads end, writes do not, and others notice nothing."""

import subprocess

import trio
import trio.lowlevel

from nbdstream.server.constants import (
    Command,
)
from testbed.peers import binary, unix_uri
from tests.memory_export import MemoryExport, held_export
from tests.server_support import (
    READ,
    WRITE,
    RawClient,
    attended,
    check_service,
    clients_gone,
    request,
    serving,
)

SIZE = 4 << 20


async def test_a_client_that_goes_away_cancels_its_reads_but_not_its_writes() -> None:
    disk = held_export(SIZE)
    async with serving([disk]) as (server, path):
        gone = await RawClient.connect(path)
        await gone.go()
        await gone.send(request(READ, 0, 512) + request(WRITE, 0, 4) + b"data")
        while len(disk.calls) < 2:
            await trio.lowlevel.checkpoint()
        await gone.aclose()
        with trio.move_on_after(0.05):
            await clients_gone(server)
        assert server.clients == 1  # the write is not done yet
        disk.gate.set()
        await clients_gone(server)
        assert disk.data[:4] == b"data"


async def test_a_client_that_goes_away_while_only_reading_is_gone_at_once() -> None:
    disk = held_export(SIZE)
    async with serving([disk]) as (server, path):
        gone = await RawClient.connect(path)
        await gone.go()
        await gone.send(request(READ, 0, 512) * 10)
        while len(disk.calls) < 10:
            await trio.lowlevel.checkpoint()
        await gone.aclose()
        await clients_gone(server)


async def test_disconnect_waits_for_everything_in_flight() -> None:
    disk = held_export(SIZE)
    async with serving([disk]) as (server, path):
        polite = await RawClient.connect(path)
        await polite.go(structured=False)
        await polite.send(request(READ, 0, 512) + request(Command.DISC))
        while not disk.calls:
            await trio.lowlevel.checkpoint()
        disk.gate.set()
        assert await polite.reply(512) == (1, 0, bytes(disk.data[:512]))
        assert await polite.hung_up()
        await clients_gone(server)
        await polite.aclose()


async def test_a_killed_client_is_not_noticed_by_others() -> None:
    disk = MemoryExport(SIZE)
    async with attended(disk) as (server, path, bystander):
        command = [
            binary("FIO"), "--name=killed", "--ioengine=nbd", f"--uri={unix_uri(path)}",
            "--rw=randrw", "--bs=4k", "--iodepth=16", "--time_based", "--runtime=60",
            "--offset=1M", "--size=3M", "--thread",
        ]  # fmt: skip
        for _ in range(5):
            disk.data[1 << 20 :] = blank = bytes(3 << 20)
            process = await trio.lowlevel.open_process(command, stdout=subprocess.DEVNULL)
            try:
                while disk.data[1 << 20 :] == blank:  # until it has begun to write
                    await check_service(bystander, disk)
            finally:
                process.kill()
                await process.wait()
            await clients_gone(server, 1)
