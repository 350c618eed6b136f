# SPDX-License-Identifier: Apache-2.0
"""An NBD server that lies as an input says: in the handshake, in replies, in block status.

What it sends as data for an offset is always the pattern of that offset; so whatever else a
client makes of its replies, it must never take anything else for the data. Where the input has
ended, it tells the truth.
"""

import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from fuzz.export import pattern
from fuzz.source import Source
from testbed.streams import receive_exactly

OPTION_REPLY = 0x0003E889045565A9
STRUCTURED = 0x668E33EF
SIMPLE = 0x67446698
DONE = 1
NONE, DATA, HOLE, STATUS, ERROR = 0, 1, 2, 5, 0x8001
CONTEXT_ID = 7
# Up to here a byte of the input asks for the truth.
HONEST = 160
# What a lie may cost us to send.
LONGEST = 1 << 18

Send = Callable[[bytes], Awaitable[None]]


class Liar:
    """Serves clients; ``holes`` are the ranges that it has called holes."""

    def __init__(self, source: Source, size: int) -> None:
        self._source = source
        self._size = size
        self.holes: list[tuple[int, int]] = []

    def _lie(self, kinds: int) -> int:
        """0: tell the truth; else the number of a lie."""
        byte = self._source.byte()
        return 0 if byte < HONEST else 1 + byte % kinds

    async def listen(
        self, path: Path, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve on a Unix socket until cancelled."""
        path.unlink(missing_ok=True)  # noqa: ASYNC240 - in memory
        with trio.socket.socket(trio.socket.AF_UNIX) as listener:
            await listener.bind(str(path))
            listener.listen(16)
            task_status.started()
            await trio.serve_listeners(self._serve, [trio.SocketListener(listener)])

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                if await self._handshake(stream):
                    await self._transmission(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client has had enough

    # -- handshake -------------------------------------------------------------------------

    async def _handshake(self, stream: trio.SocketStream) -> bool:
        lie = self._lie(6)
        greeting = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
        if lie == 1:
            greeting = self._source.take(20)
        elif lie == 2:
            greeting = greeting[: self._source.byte() % 18]
        elif lie == 3:  # the old style: no options, the size at once
            greeting = struct.pack(">8sQQI124x", b"NBDMAGIC", 0x420281861253, self._claimed(), 1)
        elif lie == 4:
            greeting = greeting[:16] + self._source.take(2).ljust(2, b"\0")
        elif lie == 5:
            greeting = b"HTTP/1.1 400 Bad Request\r\n\r\n"
        await stream.send_all(greeting)
        if lie in (2, 5):
            return False
        if lie == 3:
            return True
        await receive_exactly(stream, 4)
        while True:
            _, option, length = struct.unpack(">8sII", await receive_exactly(stream, 16))
            await receive_exactly(stream, min(length, LONGEST))
            ending = await self._option(stream.send_all, option)
            if ending is not None:
                return ending

    def _claimed(self) -> int:
        """The size of the export, or another one."""
        return self._source.integer(64) if self._lie(2) else self._size

    async def _option(self, send: Send, option: int) -> bool | None:
        """Answer an option; whether transmission begins, or None if more options come."""

        async def reply(kind: int, body: bytes = b"", *, to: int = option) -> None:
            await send(struct.pack(">QIII", OPTION_REPLY, to, kind, len(body)) + body)

        lie = self._lie(8)
        if lie == 1:
            await send(self._source.take(40))
            return False
        if lie == 2:
            await reply(self._source.integer(32) | 1 << 31, self._source.take(8))
            return None
        if lie == 3:
            await reply(1, to=option + 1)
            return None
        if lie == 4:
            await send(struct.pack(">QIII", OPTION_REPLY, option, 3, self._source.integer(32)))
            return False
        if lie == 5:
            await reply(3, self._source.take(self._source.byte() % 32))
        if lie == 6:
            return False
        if option == 8:
            await reply(1)
        elif option in (9, 10):
            await reply(4, struct.pack(">I", CONTEXT_ID) + b"base:allocation")
            await reply(1)
        elif option == 7:
            await reply(3, struct.pack(">HQH", 0, self._claimed(), self._flags()))
            if self._source.byte() % 4 == 3:
                await reply(3, struct.pack(">HIII", 3, *self._blocks()))
            await reply(1)
            return True
        elif option == 2:
            return False
        else:
            await reply(0x80000001)
        return None

    def _flags(self) -> int:
        return self._source.integer(16) if self._lie(2) else 1 | 1 << 1 | 1 << 7 | 1 << 8

    def _blocks(self) -> tuple[int, int, int]:
        if self._lie(2):
            return self._source.integer(32), self._source.integer(32), self._source.integer(32)
        return 512, 4096, 65536

    # -- transmission ----------------------------------------------------------------------

    async def _transmission(self, stream: trio.SocketStream) -> None:
        while True:
            request = await receive_exactly(stream, 28)
            magic, _, command, cookie, offset, length = struct.unpack(">IHH8sQI", request)
            if magic != 0x25609513 or command == 2:
                return
            if command == 0:
                goes_on = await self._read(stream.send_all, cookie, offset, length)
            elif command == 7:
                goes_on = await self._status(stream.send_all, cookie, length)
            else:
                await stream.send_all(struct.pack(">II8s", SIMPLE, 22, cookie))
                goes_on = True
            if not goes_on:
                return

    async def _read(self, send: Send, cookie: bytes, offset: int, length: int) -> bool:
        """Answer a read; whether the connection goes on."""
        lie = self._lie(14)
        part = self._source.below(max(1, length)) if lie else 0
        data = [(offset, length)]
        if lie == 1:
            data = [(offset, part)]  # short
        elif lie == 2:
            data = [(offset + part, length)]  # beyond the end
        elif lie == 3:
            data = [(offset, length), (offset, part)]  # twice
        elif lie == 4:
            data = [(offset + part, length - part), (offset, part)]  # in another order
        elif lie == 5:
            data = [(self._source.integer(64), part)]
        elif lie == 6:
            data = []
        elif lie == 7:
            return await self._hole(send, cookie, offset, self._source.integer(32))
        elif lie == 8:
            return await self._hole(send, cookie, offset, length)
        elif lie == 9:
            await send(_chunk(cookie, ERROR, struct.pack(">IH", self._source.byte(), 0)))
            return True
        elif lie == 10:
            await send(struct.pack(">II8s", SIMPLE, self._source.byte() % 2, cookie))
            return True
        elif lie == 11:
            cookie = self._source.take(8).ljust(8, b"\0")
        elif lie == 12:
            await send(self._source.take(60))
            return False
        elif lie == 13:
            await send(_chunk(cookie, self._source.number(2), self._source.take(20)))
            return True
        elif lie == 14:
            return False
        for at, size in data:
            size = max(0, min(size, LONGEST))
            body = struct.pack(">Q", at & (1 << 64) - 1) + pattern(at, size)
            last = at == data[-1][0] and size == data[-1][1]
            await send(_chunk(cookie, DATA, body, last=last))
        if not data:
            await send(_chunk(cookie, NONE, b""))
        return True

    async def _hole(self, send: Send, cookie: bytes, offset: int, length: int) -> bool:
        self.holes.append((offset, length))
        await send(_chunk(cookie, HOLE, struct.pack(">QI", offset, length)))
        return True

    async def _status(self, send: Send, cookie: bytes, length: int) -> bool:
        """Answer a block status query; whether the connection goes on."""
        lie = self._lie(8)
        context = CONTEXT_ID
        extents = [(min(length, 4096), 0), (length - min(length, 4096), 3)]
        if lie == 1:
            extents = [(0, 0)] * (1 + self._source.byte() % 4)
        elif lie == 2:
            extents = [(self._source.integer(32), self._source.integer(32)) for _ in range(6)]
        elif lie == 3:
            extents = [(1, n & 3) for n in range(self._source.number(2) % 8192)]
        elif lie == 4:
            extents = []
        elif lie == 5:
            context = self._source.integer(32)
        elif lie == 6:
            extents = [(length, 0), (length, 2)]
        elif lie == 7:
            await send(_chunk(cookie, STATUS, self._source.take(13)))
            return True
        elif lie == 8:
            await send(_chunk(cookie, ERROR, struct.pack(">IH", 5, 0)))
            return True
        if not lie:
            extents = [extent for extent in extents if extent[0]]
        body = b"".join(struct.pack(">II", *extent) for extent in extents)
        await send(_chunk(cookie, STATUS, struct.pack(">I", context) + body))
        return True


def _chunk(cookie: bytes, kind: int, body: bytes, *, last: bool = True) -> bytes:
    flags = DONE if last else 0
    return struct.pack(">IHH8sI", STRUCTURED, flags, kind, cookie, len(body)) + body
