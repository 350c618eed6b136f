# SPDX-License-Identifier: Apache-2.0
"""A far server, reached by libnbd, that fails once: at one of its replies, or of its messages in
the handshake; or goes away at one of its replies, and fails in the next handshakes as well.

It runs in the event loop of the life (`scenario`), on its virtual clock, so the same point is
always the same moment. What it sends as data is never wrong: NBD does not prove content, and
nothing could be said of what a guest sees then.
"""

import errno
import random
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from nbdstream.backing.base import Backing
from nbdstream.backing.connect import Endpoint, connect
from nbdstream.backing.nbd import open_nbd
from nbdstream.tasks import open_background_nursery
from testbed.fake_nbd import (
    DISTURBANCES,
    NONE,
    SIMPLE,
    Reply,
    chunk,
    data_chunk,
    disturbed,
    error_chunk,
    fake_server,
    status_chunk,
)
from testbed.faults.backing import ROUND_TRIP
from testbed.faults.shim import Shim

BLOCK = 4096
STATUS_MOST = 16384
ERRORS = ("EIO", "ENOMEM", "ESHUTDOWN", "EINVAL")
AWAY = "away"
AWAY_FOR = 5  # handshakes
ANYWHERE = (*DISTURBANCES, *ERRORS, AWAY, "lost", "cookie", "empty", "unknown")
FAR_FAULTS = {
    "far-handshake": DISTURBANCES,
    "far-read": (*ANYWHERE, "short", "long", "beyond", "twice", "reordered", "late", "simple"),
    "far-status": (*ANYWHERE, "nothing", "long", "context", "unasked"),
}


def failing_once(content: bytes, shim: Shim) -> Callable[[], AbstractAsyncContextManager[Backing]]:
    """Opens a backing of this content, whose server fails as ``shim`` says."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Backing]:
        async with open_background_nursery() as nursery:
            server = _Server(content, shim, nursery)
            async with fake_server(
                len(content),
                server.read,
                status=server.status,
                block=BLOCK,
                disturb=server.disturbance,
            ) as uri:
                endpoint = Endpoint(uri, uri)
                first = await connect(endpoint)
                async with open_nbd(
                    endpoint, first, timeout=None, size=len(content), identity=""
                ) as backing:
                    await backing.pin()
                    yield backing

    return opened


class _Server:
    """Answers each request after a round trip, several at a time."""

    def __init__(self, content: bytes, shim: Shim, nursery: trio.Nursery) -> None:
        self._content = content
        self._shim = shim
        self._nursery = nursery
        self._away = 0

    def disturbance(self) -> str:
        """What becomes of the next message of a handshake."""
        if self._away:
            self._away -= 1
            return DISTURBANCES[self._away % len(DISTURBANCES)]
        return self._shim.due("far-handshake")

    async def read(
        self, _number: int, cookie: bytes, offset: int, length: int, send: Reply
    ) -> None:
        data = self._content[offset : offset + length]
        honest = data_chunk(cookie, offset, data)
        fault = self._shim.due("far-read")
        await self._answer(send, _false_read(fault, cookie, offset, data), honest, fault)

    async def status(
        self, _number: int, cookie: bytes, _offset: int, length: int, send: Reply
    ) -> None:
        length = min(length, STATUS_MOST)  # a server may say less than it is asked
        honest = status_chunk(cookie, (length, 0))
        fault = self._shim.due("far-status")
        await self._answer(send, _false_status(fault, cookie, length), honest, fault)

    async def _answer(self, send: Reply, false: bytes | None, honest: bytes, fault: str) -> None:
        if fault == AWAY:
            self._away = AWAY_FOR
            raise trio.BrokenResourceError
        if fault in DISTURBANCES:
            await disturbed(send, honest, fault)
        elif fault != "lost":
            self._nursery.start_soon(_later, send, honest if false is None else false)


async def _later(send: Reply, words: bytes) -> None:
    await trio.sleep(ROUND_TRIP)
    try:
        await send(words)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # the client has hung up


def _false_anyway(fault: str, cookie: bytes) -> bytes | None:
    """A wrong reply to any request; None if the fault is none of these."""
    if fault in ERRORS:
        return error_chunk(cookie, getattr(errno, fault))
    if fault == "cookie":
        return chunk(bytes(reversed(cookie)), NONE)
    if fault == "empty":
        return chunk(cookie, NONE)
    if fault == "unknown":
        return chunk(cookie, 99, random.Random(fault).randbytes(40))
    return None


def _false_read(fault: str, cookie: bytes, offset: int, data: bytes) -> bytes | None:
    half = len(data) // 2
    first = data_chunk(cookie, offset, data[:half], flags=0)
    second = data_chunk(cookie, offset + half, data[half:], flags=0)
    done = chunk(cookie, NONE)
    return {
        "short": first + done,
        "long": data_chunk(cookie, offset, data + bytes(512)),
        "beyond": data_chunk(cookie, offset + len(data), data),
        "twice": first + first + second + done,
        "reordered": second + first + done,
        "late": first + error_chunk(cookie, errno.EIO),
        "simple": struct.pack(">II8s", SIMPLE, 0, cookie) + data,
    }.get(fault, _false_anyway(fault, cookie))


def _false_status(fault: str, cookie: bytes, length: int) -> bytes | None:
    return {
        "nothing": status_chunk(cookie),
        "long": status_chunk(cookie, (length + BLOCK, 0)),
        "context": status_chunk(cookie, (length, 0), context=99),
        "unasked": status_chunk(cookie, (length, 0)) * 2,
    }.get(fault, _false_anyway(fault, cookie))
