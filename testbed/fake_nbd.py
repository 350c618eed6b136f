# SPDX-License-Identifier: Apache-2.0
"""An NBD server that answers wrongly on request, for tests of clients.

It speaks just enough of the protocol: fixed newstyle, structured replies, one export, and block
status if there is a script for it. What it does with each request is a script's to say, and
what becomes of each of its messages in the handshake a `Disturb`'s.
"""

import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from nbdstream.tasks import open_background_nursery
from testbed.peers import unix_uri
from testbed.streams import receive_exactly

OPTION_REPLY = 0x0003E889045565A9
STRUCTURED = 0x668E33EF
SIMPLE = 0x67446698
DONE = 1
NONE, OFFSET_DATA, STATUS, ERROR = 0, 1, 5, 0x8001
CONTEXT_ID = 3

Reply = Callable[[bytes], Awaitable[None]]
# Called as script(number of the request, cookie, offset, length, send). An error of the stream
# that leaves it ends the connection.
Script = Callable[[int, bytes, int, int, Reply], Awaitable[None]]
# What happens to the next message of the handshake: "" (nothing), or one of `DISTURBANCES`.
Disturb = Callable[[], str]
DISTURBANCES = ("hang-up", "half", "garbage", "silent")


def chunk(cookie: bytes, kind: int, body: bytes = b"", *, flags: int = DONE) -> bytes:
    """A chunk of a structured reply."""
    return struct.pack(">IHH8sI", STRUCTURED, flags, kind, cookie, len(body)) + body


def data_chunk(cookie: bytes, offset: int, payload: bytes, *, flags: int = DONE) -> bytes:
    """A structured reply chunk with data."""
    return chunk(cookie, OFFSET_DATA, struct.pack(">Q", offset) + payload, flags=flags)


def error_chunk(cookie: bytes, code: int) -> bytes:
    """A structured reply chunk that says that the request failed."""
    return chunk(cookie, ERROR, struct.pack(">IH", code, 0))


def status_chunk(cookie: bytes, *extents: tuple[int, int], context: int = CONTEXT_ID) -> bytes:
    """A structured reply chunk with block status: lengths and flags."""
    packed = b"".join(struct.pack(">II", *extent) for extent in extents)
    return chunk(cookie, STATUS, struct.pack(">I", context) + packed)


async def disturbed(send: Reply, words: bytes, disturbance: str) -> None:
    """Send a message, or what is left of it. Raises trio.BrokenResourceError to hang up."""
    if disturbance == "silent":
        await trio.sleep_forever()
    if disturbance == "garbage":
        words = bytes(byte ^ 0xA5 for byte in words)
    elif disturbance == "half":
        words = words[: len(words) // 2]
    if disturbance != "hang-up":
        await send(words)
    if disturbance in ("hang-up", "half"):
        raise trio.BrokenResourceError


async def _handshake(
    stream: trio.SocketStream, size: int, *, status: bool, block: int, disturb: Disturb
) -> None:
    async def say(words: bytes) -> None:
        await disturbed(stream.send_all, words, disturb())

    await say(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
    await receive_exactly(stream, 4)
    while True:
        _, option, length = struct.unpack(">8sII", await receive_exactly(stream, 16))
        await receive_exactly(stream, length)

        async def reply(kind: int, body: bytes = b"", *, to: int = option) -> None:
            await say(struct.pack(">QIII", OPTION_REPLY, to, kind, len(body)) + body)

        if option == 8:  # structured replies
            await reply(1)
        elif option == 10 and status:  # a metadata context
            await reply(4, struct.pack(">I", CONTEXT_ID) + b"base:allocation")
            await reply(1)
        elif option == 7:  # go
            await reply(3, struct.pack(">HQH", 0, size, 1 | 1 << 1 | 1 << 8))
            if block:
                await reply(3, struct.pack(">HIII", 3, 1, block, block))
            await reply(1)
            return
        else:
            await reply(0x80000001)


@asynccontextmanager
async def fake_server(
    size: int,
    script: Script,
    *,
    status: Script | None = None,
    block: int = 0,
    disturb: Disturb = str,
) -> AsyncIterator[str]:
    """Serve on a unix socket, yield the URI.

    Args:
        script, status: answer every read, and every question for block status.
        block: the most bytes that a request may be about, 0 for no limit.
    """
    count = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal count
        turn = trio.Lock()

        async def send(words: bytes) -> None:
            async with turn:
                await stream.send_all(words)

        try:
            await _handshake(stream, size, status=status is not None, block=block, disturb=disturb)
            buffer = b""
            async for data in stream:
                buffer += data
                while len(buffer) >= 28:
                    _, _, kind, cookie, offset, length = struct.unpack(">IHH8sQI", buffer[:28])
                    buffer = buffer[28:]
                    if kind == 2:
                        return
                    count += 1
                    answer = status if kind == 7 and status is not None else script
                    await answer(count, cookie, offset, length, send)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client went away, which is its right
        finally:
            await stream.aclose()

    with tempfile.TemporaryDirectory(prefix="nbds-") as directory:
        path = Path(directory) / "nbd"
        with trio.socket.socket(trio.socket.AF_UNIX) as listener:
            await listener.bind(str(path))
            listener.listen(16)
            async with open_background_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
                yield unix_uri(path)
