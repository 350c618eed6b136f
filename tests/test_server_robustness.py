# SPDX-License-Identifier: Apache-2.0
"""Clients that are slow, rude, silent or too many, while another notices nothing."""

import logging

import pytest
import trio
import trio.lowlevel

from nbdstream.net.listeners import listen_tcp, listen_unix
from nbdstream.server import connection as connection_module
from nbdstream.server import server as server_module
from nbdstream.server.constants import (
    GREETING,
    IHAVEOPT,
    OPTION,
    Command,
    Error,
    Option,
)
from nbdstream.server.server import Server
from nbdstream.server.transmission import MAX_SLOW_BYTES, MAX_SLOW_REQUESTS
from testbed.peers import temporary_directory, unix_uri
from tests.memory_export import MemoryExport, held_export
from tests.server_support import (
    READ,
    WRITE,
    RawClient,
    attended,
    check_service,
    client,
    clients_gone,
    info_data,
    request,
    serving,
)

SIZE = 4 << 20


async def answered(rude: RawClient) -> bytes:
    """Everything that the server still sends until it hangs up."""
    received = b""
    try:
        async for data in rude.stream:
            received += data
    except trio.BrokenResourceError:
        pass
    return received


# --- garbage ----------------------------------------------------------------------------

HANDSHAKE = (3).to_bytes(4, "big")
GO = OPTION.pack(IHAVEOPT, Option.GO, len(info_data(b""))) + info_data(b"")


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 64,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        HANDSHAKE + bytes(64),
        HANDSHAKE + OPTION.pack(IHAVEOPT, Option.GO, 2**32 - 1),
        HANDSHAKE + OPTION.pack(IHAVEOPT, Option.EXPORT_NAME, 4) + b"nope",
        HANDSHAKE + GO + b"\x16\x03\x01" * 20,
        HANDSHAKE + GO + request(READ, 0, 1) + bytes(28),
        HANDSHAKE + GO + request(WRITE, 0, 2**32 - 1) + bytes(4096),
    ],
    ids=["noise", "http", "option", "4g-option", "name", "tls", "request", "4g-write"],
)
async def test_garbage_ends_that_connection_with_one_line(
    garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    disk = MemoryExport(SIZE)
    with caplog.at_level(logging.WARNING):
        async with attended(disk) as (server, path, _):
            rude = await RawClient.connect(path)
            try:
                await rude.send(garbage)
            except trio.BrokenResourceError:
                pass  # it may hang up before the end
            await answered(rude)
            await rude.aclose()
            await clients_gone(server, 1)
    assert len(caplog.records) == 1
    assert "client 2 (unix)" in caplog.messages[0]
    assert caplog.records[0].exc_info is None


async def test_4_gib_lengths_are_refused_without_memory() -> None:
    disk = MemoryExport(SIZE)
    disk.size = 1 << 40  # the requests lie within the export
    async with attended(disk) as (_, path, _):
        rude = await RawClient.connect(path)
        await rude.go()
        for flags in (0, 4):
            await rude.send(request(READ, 0, 2**32 - 1, flags=flags))
            assert await rude.error() == Error.EOVERFLOW
        await rude.send(request(Command.TRIM, 0, 2**32 - 1))
        assert await rude.error() == 0
        assert disk.calls == [("trim", 0, 2**32 - 1, False)]
        await rude.aclose()


# --- half requests and silence ----------------------------------------------------------


@pytest.mark.parametrize("cut", range(0, 28 + 512, 31))
async def test_half_a_request_changes_nothing(cut: int) -> None:
    disk = MemoryExport(SIZE)
    before = bytes(disk.data)
    async with attended(disk) as (server, path, bystander):
        half = await RawClient.connect(path)
        await half.go()
        await half.send((request(WRITE, 0, 512) + bytes(512))[:cut])
        await check_service(bystander, disk)
        await half.aclose()
        await clients_gone(server, 1)
        assert disk.data == before


async def test_a_request_byte_by_byte_is_served() -> None:
    disk = MemoryExport(SIZE)
    async with attended(disk) as (_, path, bystander):
        slow = await RawClient.connect(path)
        await slow.go(structured=False)
        for byte in request(WRITE, 5, 4) + b"data":
            await slow.send(bytes([byte]))
            await check_service(bystander, disk)
        assert await slow.error() == 0
        assert disk.data[5:9] == b"data"
        await slow.aclose()


@pytest.mark.parametrize("said", [b"", HANDSHAKE, HANDSHAKE + GO[:20]])
async def test_a_silent_client_is_sent_away_after_the_handshake_timeout(
    said: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = MemoryExport(SIZE)
    async with attended(disk) as (server, path, _):
        monkeypatch.setattr(connection_module, "HANDSHAKE_TIMEOUT", 0.05)
        silent = await RawClient.connect(path)
        await silent.take(GREETING.size)
        await silent.send(said)
        assert await silent.hung_up()
        await clients_gone(server, 1)
        await silent.aclose()
    assert caplog.messages == ["client 2 (unix): no handshake in 0.05 s"]


async def test_a_client_may_be_silent_after_its_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "HANDSHAKE_TIMEOUT", 0.05)
    disk = MemoryExport(SIZE)
    async with attended(disk) as (_, path, _):
        silent = await RawClient.connect(path)
        await silent.go(structured=False)
        with trio.move_on_after(0.1):
            await silent.hung_up()
        await check_service(silent, disk)
        await silent.aclose()


# --- misses -----------------------------------------------------------------------------


async def test_a_miss_never_holds_up_a_hit() -> None:
    disk = MemoryExport(SIZE)
    disk.slow = [range(1 << 20, 2 << 20)]
    disk.gate = trio.Event()
    async with attended(disk) as (_, path, bystander):
        slow = await RawClient.connect(path)
        await slow.go(structured=False)
        misses = b"".join(
            request(READ, (1 << 20) + 512 * number, 512, cookie=number) for number in range(100)
        )
        await slow.send(misses + request(READ, 0, 512, cookie=1000))
        # The hit overtakes all of them, on its own connection and on others ...
        assert await slow.reply(512) == (1000, 0, bytes(disk.data[:512]))
        await slow.send(request(WRITE, 0, 4, cookie=1001) + b"data")
        assert await slow.reply() == (1001, 0, b"")
        await check_service(bystander, disk)
        # ... and each is answered in the end.
        disk.gate.set()
        for _ in range(100):
            cookie, error, data = await slow.reply(512)
            start = (1 << 20) + 512 * cookie
            assert (error, data) == (0, bytes(disk.data[start : start + 512]))
        await slow.aclose()


@pytest.mark.parametrize("length", [1, 1 << 20])
async def test_a_flood_of_misses_is_bounded_and_served(length: int) -> None:
    disk = held_export(SIZE)
    limit = min(MAX_SLOW_REQUESTS, MAX_SLOW_BYTES // length)
    total = 2 * limit
    async with serving([disk]) as (server, path):
        flood = await RawClient.connect(path)
        await flood.go(structured=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood.send, request(READ, 0, length) * total)
            while len(disk.calls) < limit:
                await trio.lowlevel.checkpoint()
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            assert len(disk.calls) == limit
            disk.gate.set()
            for _ in range(total):
                assert await flood.reply(length) == (1, 0, bytes(disk.data[:length]))
        assert len(disk.calls) == total
        await flood.aclose()
        await clients_gone(server)


async def test_a_client_that_does_not_read_stalls_only_itself() -> None:
    disk = MemoryExport(SIZE)
    async with attended(disk) as (server, path, bystander):
        deaf = await RawClient.connect(path)
        await deaf.go()
        sent = 0

        async def flood() -> None:
            nonlocal sent
            try:
                while True:
                    await deaf.send(request(READ, 0, 65536) * 16)
                    sent += 16
            except trio.BrokenResourceError:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            previous = -1
            while sent != previous:  # until the server reads no more
                previous = sent
                for _ in range(20):
                    await check_service(bystander, disk)
            assert sent < 100_000
            nursery.cancel_scope.cancel()
        await deaf.aclose()
        await clients_gone(server, 1)


async def test_many_clients_at_once() -> None:
    disk = MemoryExport(SIZE)
    async with serving([disk]) as (server, path):

        async def one() -> None:
            each = await RawClient.connect(path)
            await each.go(structured=False)
            for _ in range(20):
                await check_service(each, disk)
            await each.aclose()

        async with trio.open_nursery() as nursery:
            for _ in range(server_module.MAX_CLIENTS):
                nursery.start_soon(one)
        await clients_gone(server)


async def test_a_bug_in_the_disk_ends_that_connection_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = MemoryExport(SIZE)
    async with attended(disk) as (server, path, _):
        unlucky = await RawClient.connect(path)
        await unlucky.go()
        disk.error = ZeroDivisionError("oops")
        await unlucky.send(request(READ, 0, 512))
        assert await unlucky.hung_up()
        await clients_gone(server, 1)
        disk.error = None
        await unlucky.aclose()
    assert [record.levelname for record in caplog.records] == ["ERROR"]


# --- counting and addresses -------------------------------------------------------------


async def test_clients_are_counted() -> None:
    counts: list[int] = []
    with temporary_directory() as directory:
        server = Server([MemoryExport(SIZE)], clients_changed=counts.append)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run, [listen_unix(directory / "nbd")])
            await client("nbdinfo", "--size", unix_uri(directory / "nbd"))
            await clients_gone(server)
            server.stop()
    assert set(counts) == {0, 1}
    assert counts[-1] == 0


async def test_tcp_clients() -> None:
    disk = MemoryExport(SIZE)
    server = Server([disk])
    listeners = listen_tcp("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run, listeners)
        uri = listeners[0].uri("disk")
        assert await client("nbdinfo", "--size", uri) == f"{SIZE}\n"
        copied = await client("nbdcopy", uri, "null:")
        assert copied == ""
        server.stop()
