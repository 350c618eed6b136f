# SPDX-License-Identifier: Apache-2.0
"""What the tests of the server share: a served export, and clients that misbehave.

`serving` runs a real server on a Unix socket inside the test's event loop; real clients
run beside it as processes (`client`) or in a thread (`in_thread`).
"""

import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio
import trio.lowlevel

from nbdstream.export import Export
from nbdstream.net.listeners import listen_unix
from nbdstream.server.certificates import Certificates
from nbdstream.server.constants import (
    CHUNK,
    GREETING,
    IHAVEOPT,
    OPTION,
    OPTION_REPLY,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
    Option,
    OptionReply,
)
from nbdstream.server.server import MAX_CLIENTS, Server
from testbed.peers import run, temporary_directory
from tests.memory_export import MemoryExport

T = TypeVar("T")
READ, WRITE, DISC = Command.READ, Command.WRITE, Command.DISC


@contextlib.asynccontextmanager
async def serving(
    exports: Sequence[Export],
    *,
    tls: Certificates | None = None,
    clients_changed: Callable[[int], None] | None = None,
    max_clients: int = MAX_CLIENTS,
) -> AsyncIterator[tuple[Server, Path]]:
    """A server on a Unix socket; it has stopped cleanly when the block ends."""
    with temporary_directory() as directory:
        path = directory / "nbd"
        server = Server(exports, tls=tls, clients_changed=clients_changed, max_clients=max_clients)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run, [listen_unix(path)])
            try:
                yield server, path
            finally:
                server.stop()


async def client(*argv: str | Path) -> str:
    """Run a client program; its standard output. Raises PeerError if it fails."""
    return await trio.to_thread.run_sync(run, argv)


async def in_thread(function: Callable[[], T]) -> T:
    """Run blocking code of a client."""
    return await trio.to_thread.run_sync(function, abandon_on_cancel=True)


async def clients_gone(server: Server, remaining: int = 0) -> None:
    """Wait until no more than ``remaining`` connections are left."""
    while server.clients > remaining:  # noqa: ASYNC110 - what a server tells
        await trio.sleep(0.001)


def option(kind: int, data: bytes = b"") -> bytes:
    """One option as a client sends it."""
    return OPTION.pack(IHAVEOPT, kind, len(data)) + data


def info_data(name: bytes, *infos: int) -> bytes:
    """The data of NBD_OPT_INFO and NBD_OPT_GO."""
    counted = len(infos).to_bytes(2, "big") + b"".join(i.to_bytes(2, "big") for i in infos)
    return len(name).to_bytes(4, "big") + name + counted


def context_data(name: bytes, *queries: bytes) -> bytes:
    """The data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""
    sized = b"".join(len(query).to_bytes(4, "big") + query for query in queries)
    return len(name).to_bytes(4, "big") + name + len(queries).to_bytes(4, "big") + sized


def request(
    command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 1
) -> bytes:
    """One request header."""
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)


class RawClient:
    """Speaks the protocol byte by byte, as wrongly as a test wants."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream: trio.SocketStream | trio.SSLStream[trio.SocketStream] = stream
        self._buffer = b""

    @classmethod
    async def connect(cls, path: Path) -> "RawClient":
        return cls(await trio.open_unix_socket(path))

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """Ask for TLS after the greeting, and go on through it. Raises trio.BrokenResourceError."""
        await self.take(GREETING.size)
        await self.send((3).to_bytes(4, "big"))
        assert await self.option(Option.STARTTLS) == [(OptionReply.ACK, b"")]
        assert isinstance(self.stream, trio.SocketStream)
        self.stream = trio.SSLStream(self.stream, context, server_hostname="localhost")
        await self.stream.do_handshake()

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def take(self, length: int) -> bytes:
        """Exactly so many bytes; raises EOFError if they never come."""
        while len(self._buffer) < length:
            more = await self.stream.receive_some()
            if not more:
                raise EOFError(f"{length} bytes wanted, {len(self._buffer)} came")
            self._buffer += more
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken

    async def hung_up(self) -> bool:
        """Wait for the server to end the connection; False if it sends something instead."""
        try:
            return not self._buffer and not await self.stream.receive_some()
        except trio.BrokenResourceError:
            return True

    async def go(self, *, structured: bool = True, contexts: Sequence[bytes] = ()) -> None:
        """The handshake, up to the transmission phase of the default export."""
        if not isinstance(self.stream, trio.SSLStream):
            await self.take(GREETING.size)
            await self.send((3).to_bytes(4, "big"))
        if structured:
            await self.option(Option.STRUCTURED_REPLY)
        if contexts:
            await self.option(Option.SET_META_CONTEXT, context_data(b"", *contexts))
        await self.option(Option.GO, info_data(b""))

    async def option(self, kind: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; the replies up to the final one, as (type, data)."""
        await self.send(option(kind, data))
        replies = []
        while True:
            _, _, reply, length = OPTION_REPLY.unpack(await self.take(OPTION_REPLY.size))
            replies.append((reply, await self.take(length)))
            if reply == OptionReply.ACK or reply >= 1 << 31:
                return replies

    async def reply(self, read_length: int = 0) -> tuple[int, int, bytes]:
        """The next reply or chunk: (cookie, error or chunk type, data).

        ``read_length``: what a successful simple reply carries.
        """
        magic = int.from_bytes(await self.take(4), "big")
        if magic == SIMPLE_REPLY_MAGIC:
            error, cookie = await self._u32(), int.from_bytes(await self.take(8), "big")
            return cookie, error, b"" if error else await self.take(read_length)
        assert magic == STRUCTURED_REPLY_MAGIC, hex(magic)
        header = magic.to_bytes(4, "big") + await self.take(CHUNK.size - 4)
        _, _, kind, cookie, length = CHUNK.unpack(header)
        return cookie, kind, await self.take(length)

    async def error(self) -> int:
        """The NBD error of the next reply; 0 for success."""
        _, kind, data = await self.reply()
        if kind in (Chunk.ERROR, Chunk.ERROR_OFFSET):
            return int.from_bytes(data[:4], "big")
        return kind

    async def _u32(self) -> int:
        return int.from_bytes(await self.take(4), "big")

    async def aclose(self) -> None:
        await self.stream.aclose()


@asynccontextmanager
async def attended(disk: MemoryExport) -> AsyncIterator[tuple[Server, Path, RawClient]]:
    """A server with one well-behaved client, which reads before and after the block."""
    async with serving([disk]) as (server, path):
        bystander = await RawClient.connect(path)
        await bystander.go(structured=False)
        await check_service(bystander, disk)
        yield server, path, bystander
        await check_service(bystander, disk)
        await bystander.aclose()


async def check_service(bystander: RawClient, disk: MemoryExport) -> None:
    await bystander.send(request(READ, 1000, 100, cookie=77))
    assert await bystander.reply(100) == (77, 0, bytes(disk.data[1000:1100]))
