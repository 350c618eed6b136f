# SPDX-License-Identifier: Apache-2.0
"""Events on the control socket: who gets them, and clients that do not read."""

import json
from pathlib import Path

import pytest
import trio
import trio.testing

from nbdstream.control.server import BACKLOG_LIMIT
from nbdstream.qmp.client import QMPClient
from tests.control_room import (
    DEVICE,
    NEGOTIATE,
    Connect,
    control_room,
    fill_up,
    raw_clients,
)

connect = pytest.fixture(raw_clients)


async def test_all_negotiated_clients_get_events_and_others_none(
    tmp_path: Path, connect: Connect
) -> None:
    async with control_room(tmp_path) as room:
        clients = [await connect(room) for _ in range(3)]
        silent = await connect(room, negotiate=False)
        room.server.emit("X_TEST", {"number": 5})
        for client in clients:
            event = await client.message()
            assert event["event"] == "X_TEST" and event["data"] == {"number": 5}
            assert event["timestamp"].keys() == {"seconds", "microseconds"}
        await silent.send(NEGOTIATE)
        assert await silent.message() == {"return": {}}


async def test_events_of_a_command_come_before_its_reply(tmp_path: Path, connect: Connect) -> None:
    async with control_room(tmp_path, gated=True) as room:
        client = await connect(room)
        request = {"execute": "block-stream", "arguments": {"device": DEVICE}}
        await client.send(json.dumps(request).encode() + b"\n")
        got = [await client.message() for _ in range(3)]
        assert [message.get("data", {}).get("status") for message in got] == [
            "created",
            "running",
            None,
        ]
        assert got[2] == {"return": {}}


async def test_a_client_that_does_not_read_its_events_is_dropped(
    tmp_path: Path, connect: Connect
) -> None:
    async with control_room(tmp_path) as room, QMPClient.connect(room.path) as attentive:
        deaf = await connect(room)
        heard = 0
        with attentive.events() as events:
            while heard < 8 * BACKLOG_LIMIT // 1000:
                # In pieces, so that one who reads can keep up.
                fill_up(room, BACKLOG_LIMIT // 4)
                for _ in range(BACKLOG_LIMIT // 4 // 1000):
                    await events.wait("X_FILL")
                    heard += 1
        await deaf.rest()  # comes to an end, though the server goes on
        assert await attentive.execute("query-jobs") == []


async def test_a_client_that_reads_no_replies_stalls_itself_alone(
    tmp_path: Path, connect: Connect
) -> None:
    count = 20_000
    async with control_room(tmp_path) as room, trio.open_nursery() as nursery:
        greedy, other = await connect(room), await connect(room)
        sent = trio.Event()

        async def ask_much() -> None:
            for number in range(count):
                await greedy.send(b'{"execute":"query-commands","id":%d}\n' % number)
            sent.set()

        nursery.start_soon(ask_much)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not sent.is_set(), "the server took in more than it should"
        await other.send(b'{"execute":"query-jobs"}\n')
        assert await other.message() == {"return": []}
        for number in range(count):
            assert (await greedy.message())["id"] == number
