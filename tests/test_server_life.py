# SPDX-License-Identifier: Apache-2.0
"""What must not stop the server: clients that are gone, too many, slow or in need of what
never comes, and errors out of anything that it calls."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from nbdstream.disk import open_disk
from nbdstream.server import connection as connection_module
from nbdstream.server import handshake as handshake_module
from nbdstream.server import server as server_module
from nbdstream.server.constants import (
    GREETING,
    Command,
    Option,
    OptionReply,
)
from nbdstream.server.server import Server
from testbed.peers import PeerError, unix_uri
from tests.doubles import GatedBacking, MemoryLeaf
from tests.memory_export import MemoryExport, held_export
from tests.server_support import (
    READ,
    WRITE,
    RawClient,
    client,
    clients_gone,
    context_data,
    info_data,
    option,
    request,
    serving,
)

SIZE = 4 << 20


@contextmanager
def raising(disk: MemoryExport, error: Exception) -> Iterator[None]:
    """Within the block, the disk's async methods raise the error."""

    async def fail(*_arguments: object, **_options: object) -> None:
        raise error

    names = ("read", "write", "flush", "block_status")
    for name in names:
        setattr(disk, name, fail)
    yield
    for name in names:
        delattr(disk, name)


async def calls(disk: MemoryExport, number: int) -> None:
    """Wait until the disk was asked so many times."""
    while len(disk.calls) < number:
        await trio.lowlevel.checkpoint()


# --- clients that are gone --------------------------------------------------------------


async def test_changes_of_clients_that_are_gone_hold_no_place() -> None:
    disk = held_export(SIZE)
    async with serving([disk], max_clients=4) as (server, path):
        for number in range(1, 13):  # three times as many as there are places
            gone = await RawClient.connect(path)
            await gone.go()
            await gone.send(request(WRITE, 0, 4) + b"data" + request(READ, 0, 512))
            await calls(disk, 2 * number)
            await gone.aclose()
            await trio.testing.wait_all_tasks_blocked()
        assert server.clients <= 4
        disk.gate.set()
        await clients_gone(server)


async def test_changes_that_cannot_be_finished_are_dropped_in_the_end(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    disk = held_export(SIZE)
    original = bytes(disk.data)
    async with serving([disk]) as (server, path):
        gone = await RawClient.connect(path)
        await gone.go()
        await gone.send(request(WRITE, 0, 4) + b"data")
        await calls(disk, 1)
        await gone.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert server.clients == 1
        await trio.sleep(connection_module.CHANGE_GRACE + 0.1)
        assert server.clients == 0
    assert disk.data == original
    assert caplog.messages == [
        "client 1 (unix): it is gone, and changes that it got no answer to are dropped"
    ]


async def test_a_client_that_is_gone_is_noticed_while_it_has_too_much_in_flight(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr("nbdstream.server.transmission.MAX_SLOW_REQUESTS", 4)
    disk = held_export(SIZE)
    async with serving([disk]) as (server, path):
        gone = await RawClient.connect(path)
        await gone.go()
        await gone.send(request(READ, 0, 512) * 20)  # 16 of which stay in the socket
        await calls(disk, 4)
        await gone.aclose()
        await trio.sleep(1)
        assert server.clients == 0
        assert len(disk.calls) == 4


async def test_a_client_that_disconnects_and_goes_away_does_not_wait_for_its_replies(
    autojump_clock: trio.testing.MockClock,
) -> None:
    disk = held_export(SIZE)
    async with serving([disk]) as (server, path):
        gone = await RawClient.connect(path)
        await gone.go()
        await gone.send(request(READ, 0, 512) * 3 + request(Command.DISC))
        await calls(disk, 3)
        await gone.aclose()
        await trio.sleep(1)
        assert server.clients == 0


async def test_stopping_takes_no_longer_than_it_may_whatever_clients_left_behind(
    autojump_clock: trio.testing.MockClock,
) -> None:
    disk = held_export(SIZE)
    async with serving([disk]) as (server, path):
        gone, waiting, deaf = [await RawClient.connect(path) for _ in range(3)]
        for each in (gone, waiting, deaf):
            await each.go()
        await gone.send(request(WRITE, 0, 4) + b"data")
        await waiting.send((request(WRITE, 0, 4) + b"data" + request(READ, 0, 512)) * 3)
        await deaf.send(request(READ, 0, SIZE) * 4)
        await calls(disk, 11)
        await gone.aclose()
        began = trio.current_time()
        server.stop()
        server.stop()  # a second time changes nothing
        await clients_gone(server)
        assert trio.current_time() - began == pytest.approx(server_module.STOP_TIMEOUT, abs=1)
        await waiting.aclose()
        await deaf.aclose()


async def test_a_dropped_write_leaves_whole_blocks() -> None:
    """A write whose edges wait for a lost backing is cancelled: each block of the real disk
    holds either its old content or its new one, and the disk goes on."""
    content = bytes(range(256)) * 4096  # 1 MiB
    leaf, backing = MemoryLeaf(len(content)), GatedBacking(content, gated=True)
    async with open_disk(leaf, backing) as disk:
        new = b"n" * 200_000  # begins and ends in the middle of a block
        with trio.move_on_after(0.05) as waiting:
            await disk.write(memoryview(new), 1000, fua=False)
        assert waiting.cancelled_caught
        backing.gated = False
        for read in backing.reads:
            read.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        found = bytearray(len(content))
        await disk.read(memoryview(found), 0)
        wanted = bytearray(content)
        wanted[1000 : 1000 + len(new)] = new
        block = 4096
        for start in range(0, len(content), block):
            end = start + block
            assert found[start:end] in (content[start:end], bytes(wanted[start:end])), start
    leaf.close()


# --- too many clients -------------------------------------------------------------------


async def test_one_client_too_many_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    disk = MemoryExport(SIZE)
    async with serving([disk], max_clients=1) as (server, path):
        first = await RawClient.connect(path)
        await first.go()
        second = await RawClient.connect(path)
        await second.take(GREETING.size)
        await second.send((3).to_bytes(4, "big"))
        # It may still ask what there is ...
        assert (await second.option(Option.INFO, info_data(b"")))[-1][0] == OptionReply.ACK
        # ... but not have it.
        [(reply, message)] = await second.option(Option.GO, info_data(b""))
        assert reply == OptionReply.ERR_POLICY
        assert message == b"1 clients are connected, and no more are served at once"
        with pytest.raises(PeerError):
            await client("nbdcopy", unix_uri(path), "null:")
        await first.aclose()
        await clients_gone(server, 1)
        # The client that was told may try again on the same connection.
        await second.option(Option.GO, info_data(b""))
        await second.send(request(READ, 0, 8))
        assert await second.reply(8) == (1, 0, bytes(disk.data[:8]))
        await second.aclose()
    assert caplog.messages == ["1 clients are connected: no more are served"]


async def test_slow_handshakes_do_not_keep_others_out(
    autojump_clock: trio.testing.MockClock,
) -> None:
    disk = MemoryExport(SIZE)
    async with serving([disk]) as (server, path):
        slow = [await RawClient.connect(path) for _ in range(200)]
        began = trio.current_time()
        guest = await RawClient.connect(path)
        await guest.go(structured=False)
        # Behind 136 that have to be dropped first, of which each batch gets its grace.
        assert trio.current_time() - began < 5
        await guest.send(request(READ, 0, 8))
        assert await guest.reply(8) == (1, 0, bytes(disk.data[:8]))
        await trio.sleep(connection_module.HANDSHAKE_TIMEOUT + 1)
        await clients_gone(server, 1)
        await guest.send(request(READ, 0, 8))
        assert await guest.reply(8) == (1, 0, bytes(disk.data[:8]))
        for each in (*slow, guest):
            await each.aclose()


# --- floods in the handshake ------------------------------------------------------------


async def test_a_flood_of_options_ends_and_lets_others_in() -> None:
    disk = MemoryExport(SIZE)
    async with serving([disk]) as (_, path), trio.open_nursery() as nursery:
        flood = await RawClient.connect(path)
        await flood.take(GREETING.size)

        async def send() -> None:
            try:
                while True:
                    await flood.send(option(Option.LIST) * 64)
            except trio.BrokenResourceError:
                pass

        async def take() -> None:
            try:
                while True:
                    await flood.take(1000)
            except (EOFError, trio.BrokenResourceError):
                pass

        await flood.send((3).to_bytes(4, "big"))
        nursery.start_soon(send)
        nursery.start_soon(take)
        for _ in range(20):
            guest = await RawClient.connect(path)
            await guest.go()
            await guest.aclose()
    # Both tasks have ended, because the server hung up.
    await flood.aclose()


@pytest.mark.parametrize(
    "data",
    [
        context_data(b"", *[b""] * 257),
        context_data(b"", *[b"base:allocation"] * 3000),
    ],
)
async def test_more_queries_than_make_sense_are_too_big(data: bytes) -> None:
    async with serving([MemoryExport(SIZE)]) as (_, path):
        each = await RawClient.connect(path)
        await each.take(GREETING.size)
        await each.send((3).to_bytes(4, "big"))
        await each.option(Option.STRUCTURED_REPLY)
        for kind in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            [(reply, message)] = await each.option(kind, data)
            assert reply == OptionReply.ERR_TOO_BIG and b"at most 256" in message
        [(reply, _)] = await each.option(Option.INFO, info_data(b"", *[3] * 257))
        assert reply == OptionReply.ERR_TOO_BIG
        [*_, (reply, _)] = await each.option(Option.GO, info_data(b""))
        assert reply == OptionReply.ACK
        await each.aclose()


def test_the_limit_of_options_is_beyond_what_any_client_needs() -> None:
    assert handshake_module.MAX_OPTIONS >= 100


# --- errors out of what the server calls ------------------------------------------------


async def test_an_error_in_what_follows_the_number_of_clients_is_contained(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(_count: int) -> None:
        raise ZeroDivisionError("oops")

    disk = MemoryExport(SIZE)
    async with serving([disk], clients_changed=broken) as (server, path):
        for _ in range(2):
            each = await RawClient.connect(path)
            await each.go()
            await each.aclose()
            await clients_gone(server)
    assert {record.levelno for record in caplog.records} == {logging.ERROR}


async def test_a_server_without_clients_stops_at_once() -> None:
    server = Server([MemoryExport(SIZE)])
    server.stop()
    await server.run([])


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("oops"),
        MemoryError(),
        RuntimeError("can't start new thread"),
        ExceptionGroup("several", [ValueError(), OSError(5, "bad")]),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogate"),
        RecursionError(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("command", [READ, WRITE, Command.FLUSH, Command.BLOCK_STATUS])
async def test_whatever_the_disk_raises_is_the_answer_to_that_request(
    error: Exception, command: int
) -> None:
    disk = held_export(SIZE)
    disk.gate.set()
    async with serving([disk]) as (_, path):
        each = await RawClient.connect(path)
        await each.go(contexts=[b"base:allocation"])
        with raising(disk, error):
            length = 0 if command == Command.FLUSH else 8
            payload = bytes(8) if command == WRITE else b""
            await each.send(request(command, 0, length) + payload)
            assert await each.error() in (5, 12)
        await each.send(request(READ, 0, 8))
        assert (await each.reply())[2][8:] == disk.data[:8]
        await each.aclose()
