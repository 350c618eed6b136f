# SPDX-License-Identifier: Apache-2.0
"""The transmission phase without sockets: bytes in, replies out, replies taken apart."""

from nbdstream.server.constants import (
    CHUNK,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
)
from nbdstream.server.contexts import CONTEXTS
from nbdstream.server.handshake import Agreement
from nbdstream.server.payloads import PayloadRoom, Share
from nbdstream.server.traffic import Traffic
from nbdstream.server.transmission import (
    Transmission,
)
from tests.memory_export import MemoryExport

SIZE = 1 << 20


def session(
    disk: MemoryExport | None = None, *, structured: bool = True, contexts: bool = False
) -> Transmission:
    agreement = Agreement(disk or MemoryExport(SIZE), structured, CONTEXTS if contexts else ())
    return Transmission(agreement, Share(PayloadRoom()), Traffic())


def feed(transmission: Transmission, data: bytes) -> bytes:
    """Pass all of ``data`` through; the replies. Slow requests stay in ``slow``."""
    sent = b""
    view = memoryview(data)
    while True:
        hungry = transmission.process()
        replies = transmission.take_replies()
        sent += bytes(replies)
        if not hungry and (transmission.saturated or transmission.disconnected):
            return sent
        if hungry:
            if not view:
                return sent
            room = transmission.room()[: len(view)]
            room[:] = view[: len(room)]
            transmission.received(len(room))
            view = view[len(room) :]


def chunks(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Structured replies taken apart: (cookie, type, flags, payload)."""
    found = []
    while data:
        magic, flags, kind, cookie, length = CHUNK.unpack_from(data)
        assert magic == STRUCTURED_REPLY_MAGIC
        end = CHUNK.size + length
        assert len(data) >= end
        found.append((cookie, kind, flags, data[CHUNK.size : end]))
        data = data[end:]
    return found


def simple(error: int = 0, cookie: int = 1) -> bytes:
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def number(data: bytes) -> int:
    return int.from_bytes(data, "big")
