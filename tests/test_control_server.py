# SPDX-License-Identifier: Apache-2.0
"""The control socket: who may connect, and what clients of every kind get."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from nbdstream.control import listen_control
from nbdstream.control.encoding import encode_in_turns
from nbdstream.control.server import BACKLOG_LIMIT, MAX_CLIENTS, SILENCE
from nbdstream.errors import UsageError
from nbdstream.qmp.protocol import COMMAND_LIMIT, Return, encode
from tests.control_room import (
    DEVICE,
    NEGOTIATE,
    Connect,
    RawClient,
    Room,
    control_room,
    fill_up,
    raw_clients,
)

connect = pytest.fixture(raw_clients)


# -- the socket ------------------------------------------------------------------------------


async def test_only_the_owner_may_connect_and_the_socket_goes_away(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room:
        assert room.path.stat().st_mode & 0o777 == 0o600
    assert not room.path.exists()


async def test_a_socket_that_a_dead_server_left_is_replaced(
    tmp_path: Path, connect: Connect
) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "control.sock"))
    async with control_room(tmp_path) as room:
        await connect(room)


async def test_a_socket_where_a_server_listens_is_left_alone(
    tmp_path: Path, connect: Connect
) -> None:
    async with control_room(tmp_path) as room:
        with pytest.raises(UsageError, match="another server listens"):
            listen_control(room.path)
        await connect(room)


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("precious")
    with pytest.raises(UsageError, match="not a socket"):
        listen_control(path)
    assert path.read_text() == "precious"


# -- sessions --------------------------------------------------------------------------------


async def test_commands_wait_for_the_negotiation_and_ids_come_back(
    tmp_path: Path, connect: Connect
) -> None:
    async with control_room(tmp_path) as room:
        client = await connect(room, negotiate=False)
        await client.send(b'{"execute":"query-version","id":7}\n')
        refusal = await client.message()
        assert refusal["error"]["class"] == "CommandNotFound" and refusal["id"] == 7
        await client.send(NEGOTIATE)
        assert await client.message() == {"return": {}}
        await client.send(b'{"execute":"query-block-jobs","id":{"any":["thing"]}}\n')
        assert await client.message() == {"return": [], "id": {"any": ["thing"]}}


async def test_bytes_may_come_one_by_one_and_commands_in_a_heap(
    tmp_path: Path, connect: Connect
) -> None:
    async with control_room(tmp_path) as room:
        client = await connect(room)
        for byte in b'{"execute":"query-jobs","id":"slow"}\r\n':
            await client.send(bytes([byte]))
        assert await client.message() == {"return": [], "id": "slow"}
        await client.send(b"".join(b'{"execute":"query-jobs","id":%d}\n' % i for i in range(500)))
        assert [(await client.message())["id"] for _ in range(500)] == list(range(500))


async def test_commands_may_end_with_the_end_of_the_stream(
    tmp_path: Path, connect: Connect
) -> None:
    async with control_room(tmp_path) as room:
        client = await connect(room)
        await client.send(b'{"execute":"query-jobs","id":1}\n{"execute":"query-jobs","id":2}\n{"ha')
        await client.stream.send_eof()
        replies = [json.loads(line) for line in (await client.rest()).splitlines()]
        assert replies == [{"return": [], "id": 1}, {"return": [], "id": 2}]


@pytest.mark.parametrize(
    "line",
    [
        b"}{",
        b"[]",
        b"null",
        b'"quit"',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"9" * 100_000,
        b'{"execute":1}',
        b'{"execute":"query-jobs","arguments":[]}',
        b'{"execute":"query-jobs","arguments":{"extra":1}}',
        b'{"execute":"query-jobs","oops":1}',
        b'{"execute":"\\ud800"}',
        b'{"return":{}}',
    ],
)
async def test_nonsense_costs_an_error_reply_and_no_more(
    tmp_path: Path, connect: Connect, line: bytes
) -> None:
    async with control_room(tmp_path) as room:
        client = await connect(room)
        await client.send(line + b"\n" + b'{"execute":"query-jobs","id":1}\n')
        reply = await client.message()
        assert reply["error"]["class"] in ("GenericError", "CommandNotFound")
        assert "Traceback" not in reply["error"]["desc"]
        assert await client.message() == {"return": [], "id": 1}


async def test_an_endless_line_is_cut_off_and_others_do_not_notice(
    tmp_path: Path, connect: Connect
) -> None:
    async with control_room(tmp_path) as room:
        other = await connect(room)
        client = await connect(room)
        with pytest.raises(trio.BrokenResourceError):
            for _ in range(100):
                await client.send(b"x" * (COMMAND_LIMIT // 4))
        await other.send(b'{"execute":"query-jobs"}\n')
        assert await other.message() == {"return": []}


async def test_a_client_may_vanish_in_the_middle_of_a_command(
    tmp_path: Path, connect: Connect
) -> None:
    async with control_room(tmp_path, gated=True) as room:
        client = await connect(room)
        step = {"execute": "x-nbdstream-stream", "arguments": {"device": DEVICE, "offset": 0}}
        await client.send(json.dumps(step).encode() + b"\n")
        await trio.testing.wait_all_tasks_blocked()
        await client.stream.aclose()
        (read,) = room.backing.reads
        read.gate.set()
        other = await connect(room)
        await other.send(b'{"execute":"query-jobs"}\n')
        assert await other.message() == {"return": []}


async def test_a_slow_command_delays_its_own_client_alone(tmp_path: Path, connect: Connect) -> None:
    async with control_room(tmp_path, gated=True) as room:
        slow, quick = await connect(room), await connect(room)
        step = {"execute": "x-nbdstream-stream", "arguments": {"device": DEVICE, "offset": 0}}
        await slow.send(json.dumps(step).encode() + b'\n{"execute":"query-jobs","id":2}\n')
        await trio.testing.wait_all_tasks_blocked()
        await quick.send(b'{"execute":"query-jobs"}\n')
        assert await quick.message() == {"return": []}
        room.backing.reads[0].gate.set()
        assert (await slow.message())["return"]["streamed"] == 2048
        assert await slow.message() == {"return": [], "id": 2}


async def test_quit_is_answered_before_the_server_ends(tmp_path: Path, connect: Connect) -> None:
    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[Room]) -> None:
            async with control_room(tmp_path) as room:
                task_status.started(room)
                await room.stopped.wait()

        room = await nursery.start(serve)
        client = await connect(room)
        await client.send(b'{"execute":"quit","id":"last"}\n')
        assert await client.message() == {"return": {}, "id": "last"}
        assert await client.rest() == b""


async def test_a_client_that_reads_nothing_does_not_hold_up_the_end(
    tmp_path: Path, connect: Connect
) -> None:
    with trio.fail_after(20):
        async with control_room(tmp_path) as room:
            client = await connect(room)
            fill_up(room, BACKLOG_LIMIT - 1000)
            await trio.testing.wait_all_tasks_blocked()
    assert (await client.rest()).count(b"\n") > 0


# -- too many clients, and long replies ------------------------------------------------------


async def test_a_client_too_many_takes_the_place_of_a_silent_one(
    tmp_path: Path, connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    async with control_room(tmp_path) as room:
        silent = [await connect(room) for _ in range(MAX_CLIENTS)]
        await trio.sleep(SILENCE)
        for each in silent[1:]:
            await each.send(b'{"execute":"query-jobs"}\n')
            assert await each.message() == {"return": []}
        newcomer = await connect(room)
        await newcomer.send(b'{"execute":"query-jobs"}\n')
        assert await newcomer.message() == {"return": []}
        assert await silent[0].rest() == b""


async def test_a_client_too_many_is_told_if_the_others_are_busy(
    tmp_path: Path, connect: Connect, autojump_clock: trio.testing.MockClock
) -> None:
    async with control_room(tmp_path) as room, trio.open_nursery() as nursery:

        async def poll(client: RawClient) -> None:
            while True:
                await client.send(b'{"execute":"query-jobs"}\n')
                await client.message()
                await trio.sleep(1)

        for _ in range(MAX_CLIENTS):
            nursery.start_soon(poll, await connect(room))
        stream = await trio.open_unix_socket(str(room.path))
        async with stream:
            told = await RawClient(stream).message()
        assert told["error"]["desc"] == f"{MAX_CLIENTS} clients are connected; try again later"
        nursery.cancel_scope.cancel()


async def test_a_bug_in_one_clients_session_leaves_the_others_alone(
    tmp_path: Path,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with control_room(tmp_path) as room:
        good, unlucky = await connect(room), await connect(room)

        async def broken(_message: object) -> bytes:
            raise ZeroDivisionError("oops")

        with monkeypatch.context() as patch:
            patch.setattr("nbdstream.control.server.encode_in_turns", broken)
            await unlucky.send(b'{"execute":"query-jobs"}\n')
            assert await unlucky.rest() == b""
        await good.send(b'{"execute":"query-jobs"}\n')
        assert await good.message() == {"return": []}
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize("value", [{}, None, [1], {"extents": [], "next": 1}])
@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 512, 5000])
async def test_a_reply_that_is_encoded_in_turns_is_the_same(value: Any, length: int) -> None:
    if isinstance(value, dict):
        value = value | {"long": [{"null": None, "n": i} for i in range(length)], "é\n": "null"}
    for identity in (7, None, {"null": "null"}):
        message = Return(value, identity)
        assert json.loads(await encode_in_turns(message)) == json.loads(encode(message))


async def test_a_long_reply_lets_others_have_their_turn() -> None:
    message = Return({"extents": [{"start": i} for i in range(65536)]}, None)
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        await encode_in_turns(message)
        nursery.cancel_scope.cancel()
    assert turns >= 250
