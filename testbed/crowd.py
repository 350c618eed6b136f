# SPDX-License-Identifier: Apache-2.0
"""A crowd of NBD clients that are too many, slow, silent or rude, and a guest beside them.

    python -m testbed.crowd SOCKET SECONDS

is the guest: it reads 4 KiB at a time, about a thousand times a second, and prints how long
each read took, in seconds, as JSON. The functions are the others. They connect to the Unix
socket of a server whose default export has at least 1 MiB, and survive whatever it does.
"""

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from nbdstream.server.constants import (
    GREETING,
    IHAVEOPT,
    OPTION,
    OPTION_REPLY,
    REQUEST,
    REQUEST_MAGIC,
    Command,
    Option,
    OptionReply,
)

_HELLO = (3).to_bytes(4, "big")
_GO = OPTION.pack(IHAVEOPT, Option.GO, 6) + bytes(6)
_READ = REQUEST.pack(REQUEST_MAGIC, 0, Command.READ, 1, 0, 4096)
_REPLY = 16 + 4096
_GONE = (trio.BrokenResourceError, EOFError, OSError)


async def _take(stream: trio.SocketStream, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = await stream.receive_some(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data


async def _go(stream: trio.SocketStream) -> int:
    """The handshake; its last reply."""
    await _take(stream, GREETING.size)
    await stream.send_all(_HELLO + _GO)
    while True:
        _, _, reply, length = OPTION_REPLY.unpack(await _take(stream, OPTION_REPLY.size))
        await _take(stream, length)
        if reply != OptionReply.INFO:
            return int(reply)


async def _many(count: int, each: Callable[[int], Awaitable[None]], at_once: int) -> None:
    places = trio.CapacityLimiter(at_once)

    async def one(number: int) -> None:
        async with places:
            await each(number)

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(one, number)


async def drop(path: Path, count: int, *, at_once: int = 16) -> None:
    """Open connections and drop them, at one stage or another."""

    async def each(number: int) -> None:
        try:
            async with await trio.open_unix_socket(str(path)) as stream:
                if number % 4 >= 1:
                    await _take(stream, GREETING.size)
                if number % 4 >= 2:
                    await stream.send_all(_HELLO + _GO)
                if number % 4 >= 3:
                    await stream.send_all(_READ * 8)
        except _GONE:
            pass

    await _many(count, each, at_once)


async def together(path: Path, count: int) -> Counter[str]:
    """Be so many clients at once, each of which reads something; how they fared: "served",
    "refused" in the handshake, or "dropped"."""
    outcomes: Counter[str] = Counter()

    async def each(_number: int) -> None:
        try:
            async with await trio.open_unix_socket(str(path)) as stream:
                if await _go(stream) != OptionReply.ACK:
                    outcomes["refused"] += 1
                    return
                await stream.send_all(_READ)
                await _take(stream, _REPLY)
                outcomes["served"] += 1
        except _GONE:
            outcomes["dropped"] += 1

    await _many(count, each, count)
    return outcomes


async def slow(path: Path, count: int) -> None:
    """Begin so many handshakes, a byte every now and then, until the server hangs up."""

    async def each(_number: int) -> None:
        try:
            async with await trio.open_unix_socket(str(path)) as stream:
                for byte in _HELLO + _GO * 1000:
                    await stream.send_all(bytes([byte]))
                    await trio.sleep(0.25)
        except _GONE:
            pass

    await _many(count, each, count)


async def deaf(path: Path, count: int) -> None:
    """Ask for data without end and read none of it; for ever."""

    async def each(_number: int) -> None:
        try:
            async with await trio.open_unix_socket(str(path)) as stream:
                await _go(stream)
                while True:
                    await stream.send_all(_READ * 64)
        except _GONE:
            pass

    await _many(count, each, count)


async def garbage(path: Path, count: int) -> None:
    """Send noise: at once, or where requests belong."""

    async def each(number: int) -> None:
        noise = random.Random(number).randbytes(4096)
        try:
            async with await trio.open_unix_socket(str(path)) as stream:
                if number % 2:
                    await _go(stream)
                await stream.send_all(noise)
                while await stream.receive_some():
                    pass
        except _GONE:
            pass

    await _many(count, each, 8)


async def guest(path: Path, seconds: float) -> list[float]:
    """Be the guest, in a process of its own; how long each read took, in seconds."""
    done = await trio.run_process(
        [sys.executable, "-m", __name__, str(path), str(seconds)], capture_stdout=True
    )
    latencies: list[float] = json.loads(done.stdout)
    return latencies


def percentile(values: list[float], percent: float) -> float:
    """The value that so many percent of the values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def _be_guest(path: str, seconds: float) -> None:
    import nbd

    handle = nbd.NBD()
    handle.connect_unix(path)
    latencies = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        offset = random.randrange(256) * 4096
        began = time.perf_counter()
        handle.pread(4096, offset)
        latencies.append(time.perf_counter() - began)
        time.sleep(0.001)
    handle.shutdown()
    print(json.dumps(latencies))


async def guest_beside(
    server: Path, crowded: Path, crowd: Callable[[Path], Awaitable[object]], seconds: float
) -> list[float]:
    """How long each of a guest's reads took, in seconds, while there was a crowd, again and
    again, at the server of the socket ``crowded``."""
    latencies: list[float] = []
    async with trio.open_nursery() as nursery:

        async def be_guest() -> None:
            latencies.extend(await guest(server, seconds))
            nursery.cancel_scope.cancel()

        nursery.start_soon(be_guest)
        while True:
            await crowd(crowded)
    return latencies


if __name__ == "__main__":
    _be_guest(sys.argv[1], float(sys.argv[2]))
