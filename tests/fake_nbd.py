# SPDX-License-Identifier: Apache-2.0
"""An NBD server that answers wrongly on request, for tests of clients.

It speaks just enough of the protocol: fixed newstyle, structured replies, one export of
zeroes. What it does with each read is a script's to say.
"""

import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from testbed.peers import unix_uri
from testbed.streams import receive_exactly

OPTION_REPLY = 0x0003E889045565A9
STRUCTURED = 0x668E33EF
SIMPLE = 0x67446698
DONE = 1
NONE, OFFSET_DATA, ERROR = 0, 1, 0x8001

Reply = Callable[[bytes], Awaitable[None]]
# Called as script(number of the read, cookie, offset, length, send).
Script = Callable[[int, bytes, int, int, Reply], Awaitable[None]]


def data_chunk(cookie: bytes, offset: int, payload: bytes, *, flags: int = DONE) -> bytes:
    """A structured reply chunk with data."""
    body = struct.pack(">Q", offset) + payload
    return struct.pack(">IHH8sI", STRUCTURED, flags, OFFSET_DATA, cookie, len(body)) + body


def error_chunk(cookie: bytes, code: int) -> bytes:
    """A structured reply chunk that says that the request failed."""
    body = struct.pack(">IH", code, 0)
    return struct.pack(">IHH8sI", STRUCTURED, DONE, ERROR, cookie, len(body)) + body


async def _handshake(stream: trio.SocketStream, size: int) -> None:
    await stream.send_all(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
    await receive_exactly(stream, 4)
    while True:
        _, option, length = struct.unpack(">8sII", await receive_exactly(stream, 16))
        await receive_exactly(stream, length)

        async def reply(kind: int, body: bytes = b"", *, to: int = option) -> None:
            await stream.send_all(struct.pack(">QIII", OPTION_REPLY, to, kind, len(body)) + body)

        if option == 8:  # structured replies
            await reply(1)
        elif option == 7:  # go
            await reply(3, struct.pack(">HQH", 0, size, 1 | 1 << 1 | 1 << 8))
            await reply(1)
            return
        else:
            await reply(0x80000001)


@asynccontextmanager
async def fake_server(size: int, script: Script) -> AsyncIterator[str]:
    """Serve on a unix socket, yield the URI. ``script`` answers every read."""
    count = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal count
        try:
            await _handshake(stream, size)
            buffer = b""
            async for data in stream:
                buffer += data
                while len(buffer) >= 28:
                    _, _, kind, cookie, offset, length = struct.unpack(">IHH8sQI", buffer[:28])
                    buffer = buffer[28:]
                    if kind == 2:
                        return
                    count += 1
                    await script(count, cookie, offset, length, stream.send_all)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client went away, which is its right
        finally:
            await stream.aclose()

    with tempfile.TemporaryDirectory(prefix="nbds-") as directory:
        path = Path(directory) / "nbd"
        with trio.socket.socket(trio.socket.AF_UNIX) as listener:
            await listener.bind(str(path))
            listener.listen(16)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
                yield unix_uri(path)
                nursery.cancel_scope.cancel()
