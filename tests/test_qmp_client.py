# SPDX-License-Identifier: Apache-2.0
"""The QMP client: against a scripted peer for the races, against QEMU for the truth."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import (
    Command,
    CommandError,
    CommandNotFound,
    DeviceNotFound,
    Event,
    Failure,
    QMPConnectionError,
    QMPProtocolError,
    Return,
    ServerSession,
    encode,
)


class Peer:
    """A QMP server under the test's control, on the codec's own server side."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.session = ServerSession({"qemu": {}})
        self._commands: list[Command] = []

    async def negotiate(self) -> None:
        await self.stream.send_all(self.session.greeting())
        while not self.session.negotiated:
            await self._receive()

    async def command(self) -> Command:
        while not self._commands:
            await self._receive()
        return self._commands.pop(0)

    async def _receive(self) -> None:
        data = await self.stream.receive_some()
        assert data, "the client hung up"
        for message in self.session.receive(bytes(data)):
            if isinstance(message, Command):
                self._commands.append(message)
            else:
                await self.stream.send_all(encode(message))

    async def send(self, *messages: Return | Failure | Event) -> None:
        await self.stream.send_all(b"".join(map(encode, messages)))


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[QMPClient, Peer]]:
    here, there = trio.testing.memory_stream_pair()
    peer = Peer(there)
    async with trio.open_nursery() as nursery, there:
        nursery.start_soon(peer.negotiate)
        async with QMPClient.over(here) as qmp:
            yield qmp, peer


class Caller:
    """One ``execute`` in a task of its own, and how it ended."""

    def __init__(self, nursery: trio.Nursery, qmp: QMPClient, *command: Any) -> None:
        self.outcome: Any = None
        self.scope = trio.CancelScope()
        nursery.start_soon(self._run, qmp, *command)

    async def _run(self, qmp: QMPClient, *command: Any) -> None:
        with self.scope:
            try:
                self.outcome = await qmp.execute(*command)
            except Exception as error:
                self.outcome = error


async def test_several_commands_in_flight_get_their_own_answers() -> None:
    async with connected() as (qmp, peer), trio.open_nursery() as nursery:
        first = Caller(nursery, qmp, "first", {"a-b": 1})
        one = await peer.command()
        second = Caller(nursery, qmp, "second")
        two = await peer.command()
        assert (one.name, one.arguments, two.name) == ("first", {"a-b": 1}, "second")
        await peer.send(Failure(DeviceNotFound("which?"), two.id))
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(second.outcome, DeviceNotFound) and first.outcome is None
        await peer.send(Return({"n": 1}, one.id))
        await trio.testing.wait_all_tasks_blocked()
        assert first.outcome == {"n": 1}


async def test_a_cancelled_command_leaves_the_connection_sound() -> None:
    async with connected() as (qmp, peer), trio.open_nursery() as nursery:
        slow = Caller(nursery, qmp, "slow")
        asked = await peer.command()
        slow.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert slow.outcome is None
        quick = Caller(nursery, qmp, "quick")
        following = await peer.command()
        assert following.name == "quick"
        await peer.send(Return("late", asked.id), Return("mine", following.id))
        await trio.testing.wait_all_tasks_blocked()
        assert quick.outcome == "mine"


class LastWords(trio.abc.Stream):
    """A server that answers ``quit`` and hangs up, both before any other task runs."""

    def __init__(self) -> None:
        self._session = ServerSession({"qemu": {}})
        self._to_client = [self._session.greeting()]
        self._changed = trio.Event()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        while not self._to_client:
            await self._changed.wait()
            self._changed = trio.Event()
        return self._to_client.pop(0)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        for message in self._session.receive(bytes(data)):
            if isinstance(message, Command):
                self._to_client += [encode(Return({"bye": True}, message.id)), b""]
            else:
                self._to_client.append(encode(message))
        self._changed.set()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_an_answer_stands_though_the_server_hangs_up_at_once() -> None:
    async with QMPClient.over(LastWords()) as qmp:
        assert await qmp.execute("quit") == {"bye": True}


async def test_a_lost_connection_tells_everyone_who_waits_or_comes_later() -> None:
    async with connected() as (qmp, peer), trio.open_nursery() as nursery:
        waiting = Caller(nursery, qmp, "stop")
        await peer.command()
        with qmp.events() as events:
            await peer.stream.aclose()
            with pytest.raises(QMPConnectionError, match="closed the connection"):
                await events.wait()
        assert isinstance(waiting.outcome, QMPConnectionError)
        with pytest.raises(QMPConnectionError):
            await qmp.execute("stop")
        with pytest.raises(QMPConnectionError):
            await qmp.wait_event("STOP")
        with qmp.events() as events, pytest.raises(QMPConnectionError):
            await events.wait()


async def test_an_event_that_absent_waited_for_yet_is_not_missed() -> None:
    async with connected() as (qmp, peer):
        await peer.send(
            Event("JOB", {"id": "a"}), Event("STOP"), Event("JOB", {"id": "b", "more": 1})
        )
        assert (await qmp.wait_event("JOB", data={"id": "b"})).data["more"] == 1
        assert (await qmp.wait_event("JOB", "STOP")).data == {"id": "a"}
        assert (await qmp.wait_event()).name == "STOP"


async def test_each_queue_of_events_sees_all_of_them() -> None:
    async with connected() as (qmp, peer):
        with qmp.events() as one, qmp.events() as two:
            await peer.send(Event("A"), Event("B"))
            assert (await two.wait("B")).name == "B"
            names = []
            async for event in one:
                names.append(event.name)
                if event.name == "B":
                    break
            assert names == ["A", "B"]
        await peer.send(Event("C"))
        await qmp.wait_event("C")
        with trio.move_on_after(0) as scope:
            await one.wait("C")
        assert scope.cancelled_caught, "a queue gets nothing after its block"


@pytest.mark.parametrize("nonsense", [b"nonsense\n", b'{"return": {}}\n'])
async def test_a_peer_that_does_not_speak_qmp_is_given_up(nonsense: bytes) -> None:
    async with connected() as (qmp, peer), trio.open_nursery() as nursery:
        waiting = Caller(nursery, qmp, "stop")
        await peer.command()
        await peer.stream.send_all(nonsense)
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(waiting.outcome, QMPProtocolError)


@pytest.mark.parametrize("late", [b'{"return": {}, "id": 2}\n', b'{"return": {}, "id": "x-2"}\n'])
async def test_an_answer_to_an_earlier_client_is_nothing_to_this_one(late: bytes) -> None:
    """QEMU sends what a client that has hung up did not wait for to the next one."""
    async with connected() as (qmp, peer), trio.open_nursery() as nursery:
        waiting = Caller(nursery, qmp, "stop")
        command = await peer.command()
        await peer.stream.send_all(late)
        await trio.testing.wait_all_tasks_blocked()
        assert waiting.outcome is None
        await peer.send(Return({"mine": True}, command.id))
        await trio.testing.wait_all_tasks_blocked()
        assert waiting.outcome == {"mine": True}


async def test_a_socket_without_a_server_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(QMPConnectionError, match=r"no QMP server at .*absent"):
        async with QMPClient.connect(tmp_path / "absent"):
            pass


async def test_an_error_of_the_block_comes_out_as_it_is() -> None:
    here, there = trio.testing.memory_stream_pair()
    peer = Peer(there)
    async with there, trio.open_nursery() as nursery:
        nursery.start_soon(peer.negotiate)
        with pytest.raises(ZeroDivisionError):
            async with QMPClient.over(here):
                raise ZeroDivisionError
        assert await there.receive_some() == b"", "the stream is closed"


async def test_the_client_is_closed_after_its_block() -> None:
    async with connected() as (qmp, _peer):
        pass
    with pytest.raises(QMPConnectionError, match="closed here"):
        await qmp.execute("stop")
    with pytest.raises(QMPConnectionError, match="closed here"):
        await qmp.wait_event()


async def listens(path: Path) -> bool:
    """Whether a server accepts connections there; the file alone comes a moment before."""
    try:
        stream = await trio.open_unix_socket(path)
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    await stream.aclose()
    return True


async def test_against_qemu(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-machine", "none", "-nodefaults"]
    command += ["-display", "none", "-S", "-qmp", f"unix:{path},server=on,wait=off"]
    async with trio.open_nursery() as nursery:
        process = await nursery.start(trio.run_process, command)
        while not await listens(path):  # QEMU does not say when it does
            assert process.poll() is None, "QEMU died"
            await trio.sleep(0.01)
        async with QMPClient.connect(path, oob=True) as qmp:
            assert await qmp.execute("yank", {"instances": []}, oob=True) == {}
        async with QMPClient.connect(path) as qmp:
            with pytest.raises(CommandError, match="exec-oob"):
                await qmp.execute("yank", {"instances": []}, oob=True)
            assert qmp.version["qemu"]["major"] >= 7
            assert (await qmp.execute("query-status"))["running"] is False
            with pytest.raises(CommandNotFound):
                await qmp.execute("no-such-command")
            schema = await qmp.execute("query-qmp-schema")
            assert len(schema) > 500, "an answer of many chunks"
            await qmp.execute("cont")
            await qmp.wait_event("RESUME")
            await qmp.execute("quit")
            event = await qmp.wait_event("SHUTDOWN")
            assert event.data["reason"] == "host-qmp-quit"
