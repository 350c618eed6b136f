# SPDX-License-Identifier: Apache-2.0
"""The transmission phase from the client's side: `Transmission` takes any bytes, cut anywhere.

Accepts, or raises ProtocolError. Every reply parses and belongs to a request that was sent;
each request is answered exactly once; what is read is what the disk has, what was written is
what the client sent. The limits are scaled down, so that a short input reaches all of them.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from fuzz.export import PatternExport, finished
from fuzz.patches import Loud, patched
from fuzz.source import Source
from fuzz.target import Target
from nbdstream.server import execute as execute_module
from nbdstream.server import replies, requests, transmission
from nbdstream.server.constants import (
    CHUNK,
    CHUNK_DONE,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
    Error,
)
from nbdstream.server.contexts import CONTEXTS
from nbdstream.server.execute import execute
from nbdstream.server.handshake import Agreement, ProtocolError
from nbdstream.server.payloads import PayloadRoom, Share
from nbdstream.server.traffic import Traffic
from nbdstream.server.transmission import Transmission

INLINE = 2048
PAYLOAD = 16384
SKIPPED = 2 * PAYLOAD

LIMITS: dict[str, object] = {
    "MAX_INLINE": INLINE,
    "SEND_SOON": 1024,
    "MAX_SLOW_REQUESTS": 8,
    "MAX_SLOW_BYTES": 4 * PAYLOAD,
    "MAX_SKIPPED_PAYLOAD": SKIPPED,
    "_RECEIVE_BUFFER": INLINE + 512,
    "_REPLY_BUFFER": 1024 + INLINE + 4096 + 64,
}


class Sent(NamedTuple):
    """A whole request in what the client sent."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    payload: bytes = b""


def _agreement(source: Source) -> Agreement:
    kind = source.byte()
    export = PatternExport(source.choice((1, 511, 65536, 1 << 40)), read_only=bool(kind & 1))
    structured = bool(kind & 2)
    contexts = (CONTEXTS if kind & 4 else CONTEXTS[:1] if kind & 8 else ()) if structured else ()
    return Agreement(export, structured, contexts)


def _stream(source: Source, size: int) -> bytes:
    """What the client sends: bytes as they are, or requests with headers that are right."""
    if source.flag():
        return source.rest()
    parts: list[bytes] = []
    while source.left:
        command = source.byte() % 9
        flags = source.byte() & source.byte() & 0x1F
        offset = source.integer(64) if source.byte() < 32 else source.number(2) % size
        length = source.integer(32) if source.byte() < 32 else source.number(2) % 4096
        parts.append(REQUEST.pack(REQUEST_MAGIC, flags, command, len(parts), offset, length))
        if command == Command.WRITE and length <= SKIPPED:
            parts.append((source.take(16) or b"?") * (length // 16 + 1))
            parts[-1] = parts[-1][:length].ljust(length, b".")
    return b"".join(parts)


def _sent(stream: bytes) -> tuple[list[Sent], bool]:
    """The whole requests in a stream up to its end, to NBD_CMD_DISC, or to where the protocol
    is broken; whether it is."""
    found: list[Sent] = []
    at = 0
    while at + REQUEST.size <= len(stream):
        magic, *fields = REQUEST.unpack_from(stream, at)
        if magic != REQUEST_MAGIC:
            return found, True
        at += REQUEST.size
        request = Sent(*fields)
        if request.command == Command.DISC:
            break
        if request.command == Command.WRITE:
            if request.length > SKIPPED:
                return found, True
            request = request._replace(payload=stream[at : at + request.length])
            at += request.length
            if at > len(stream):
                break
        found.append(request)
    return found, False


def run(data: bytes) -> object:
    with (
        patched(transmission, **LIMITS),
        patched(requests, MAX_PAYLOAD=PAYLOAD),
        # Nothing here runs under trio, so no request may take several turns.
        patched(execute_module, _EXTENTS_AT_ONCE=replies.MAX_DESCRIPTORS),
        patched(replies, logger=Loud()),
    ):
        return _run(Source(data))


def _run(source: Source) -> object:
    cuts = Source(source.take(8))
    agreement = _agreement(source)
    export = agreement.export
    stream = _stream(source, export.size)
    expected, broken = _sent(stream)
    output, error = _serve(agreement, stream, cuts)
    assert broken == bool(error), (broken, error)
    _check(agreement, expected, output, error)
    return output, error


def _serve(agreement: Agreement, stream: bytes, cuts: Source) -> tuple[bytes, str]:
    """Be the server's connection over a stream that ends; return all replies."""
    first = cuts.below(64)
    codec = Transmission(agreement, Share(PayloadRoom()), Traffic(), stream[:first])
    at = min(first, len(stream))
    output = bytearray()
    while True:
        try:
            hungry = codec.process()
        except ProtocolError as error:
            _finish(codec, agreement, output)
            return bytes(output), str(error)
        _finish(codec, agreement, output)
        assert not codec.saturated
        if codec.disconnected:
            break
        if hungry:
            room = codec.room()
            assert len(room) > 0
            piece = stream[at : at + min(len(room), cuts.byte() or len(room))]
            if not piece:
                break
            room[: len(piece)] = piece
            codec.received(len(piece))
            at += len(piece)
    return bytes(output), ""


def _finish(codec: Transmission, agreement: Agreement, output: bytearray) -> None:
    """Take the replies, and carry out what had to wait."""
    output += codec.take_replies()
    for slow in codec.slow:
        for part in finished(execute(slow.request, slow.payload, agreement, Traffic())):
            output += part
        codec.finished(slow)
    codec.slow.clear()


# -- what came back --------------------------------------------------------------------------


def _check(agreement: Agreement, expected: list[Sent], output: bytes, error: str) -> None:
    export = agreement.export
    assert isinstance(export, PatternExport)
    by_cookie: dict[int, list[Sent]] = {}
    for request in expected:
        by_cookie.setdefault(request.cookie, []).append(request)
    answered: Counter[int] = Counter()
    at = 0
    while at < len(output):
        cookie = int.from_bytes(output[at + 8 : at + 16], "big")
        candidates = by_cookie.get(cookie, ())
        # Cookies are the client's own: where it used one twice, one of the two was meant.
        ends = []
        for request in candidates:
            with contextlib.suppress(AssertionError):
                ends.append(_check_reply(agreement, export, request, output, at))
        assert ends, (candidates, output[at : at + 64])
        answered[cookie] += 1
        at = ends[0]
    sent = Counter(request.cookie for request in expected)
    # Where the protocol is broken the connection ends, and with it replies not yet taken.
    assert answered <= sent if error else answered == sent, (answered, sent, error)
    written = Counter(export.writes)
    possible = Counter((r.offset, r.payload) for r in expected if r.command == Command.WRITE)
    assert written <= possible


def _check_reply(
    agreement: Agreement, export: PatternExport, request: Sent, output: bytes, at: int
) -> int:
    """Check one whole reply; return where it ends."""
    magic = int.from_bytes(output[at : at + 4], "big")
    valid = request.length > 0 and request.offset + request.length <= export.size
    if magic == SIMPLE_REPLY_MAGIC:
        _, error, _ = SIMPLE_REPLY.unpack_from(output, at)
        at += SIMPLE_REPLY.size
        if error:
            assert not agreement.structured
            Error(error)
            return at
        if request.command != Command.READ:
            assert valid or request.command == Command.FLUSH
            assert not export.read_only or request.command in (Command.FLUSH, Command.CACHE)
            return at
        assert valid and not agreement.structured and not export.fails(request.offset)
        assert output[at : at + request.length] == export.content(request.offset, request.length)
        return at + request.length
    assert agreement.structured
    return _check_chunks(agreement, export, request, output, at)


def _check_chunks(
    agreement: Agreement, export: PatternExport, request: Sent, output: bytes, at: int
) -> int:
    data = bytearray()
    contexts = []
    while True:
        magic, flags, kind, cookie, length = CHUNK.unpack_from(output, at)
        assert magic == STRUCTURED_REPLY_MAGIC and cookie == request.cookie
        assert flags in (0, CHUNK_DONE)
        at += CHUNK.size
        body = output[at : at + length]
        assert len(body) == length
        at += length
        if kind in (Chunk.ERROR, Chunk.ERROR_OFFSET):
            Error(int.from_bytes(body[:4], "big"))
            size = int.from_bytes(body[4:6], "big")
            body[6 : 6 + size].decode()
            assert length == 6 + size + (8 if kind == Chunk.ERROR_OFFSET else 0)
            assert flags == CHUNK_DONE
            return at
        if kind == Chunk.BLOCK_STATUS:
            assert request.command == Command.BLOCK_STATUS
            contexts.append(_check_status(request, body))
        else:
            assert request.command == Command.READ
            assert int.from_bytes(body[:8], "big") == request.offset + len(data)
            data += (
                body[8:] if kind == Chunk.OFFSET_DATA else bytes(int.from_bytes(body[8:], "big"))
            )
        if flags == CHUNK_DONE:
            break
    if request.command == Command.READ:
        assert not export.fails(request.offset)
        assert data == export.content(request.offset, request.length)
    else:
        assert contexts == [context.id for context in agreement.contexts]
    return at


def _check_status(request: Sent, body: bytes) -> int:
    """The descriptors of one context are at least one, none empty, none beyond the request."""
    lengths = [int.from_bytes(body[i : i + 4], "big") for i in range(4, len(body), 8)]
    assert len(body) % 8 == 4 and lengths and all(lengths)
    assert sum(lengths) <= request.length
    return int.from_bytes(body[:4], "big")


def seeds() -> Iterator[bytes]:
    for kind in (0, 2, 6, 3):
        start = bytes(8) + bytes([kind, 2, 1])
        commands = [
            REQUEST.pack(REQUEST_MAGIC, flags, command, number, offset, length)
            + (b"w" * length if command == Command.WRITE else b"")
            for number, (flags, command, offset, length) in enumerate(
                (
                    (0, Command.READ, 0, 700),
                    (0, Command.WRITE, 512, 300),
                    (1, Command.WRITE, 2048, 40),
                    (0, Command.READ, 2048, 100),
                    (4, Command.READ, 1024, 4096),
                    (0, Command.FLUSH, 0, 0),
                    (0, Command.TRIM, 4096, 512),
                    (16, Command.WRITE_ZEROES, 100, 5),
                    (0, Command.BLOCK_STATUS, 0, 60000),
                    (8, Command.BLOCK_STATUS, 512, 60000),
                    (0, Command.CACHE, 0, 512),
                    (0, Command.READ, 65530, 7),
                    (0, 77, 0, 1),
                )
            )
        ]
        yield start + b"".join(commands)
        yield start + commands[0] + REQUEST.pack(REQUEST_MAGIC, 0, Command.DISC, 9, 0, 0)
    yield bytes(range(1, 9)) + b"\2\2\0" + bytes(range(40, 200)) * 2


TARGET = Target("transmission", run, (), seeds, longest=1024)
