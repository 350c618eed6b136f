# SPDX-License-Identifier: Apache-2.0
"""Requests judged and replies packed, for any fields, extents and error messages.

Never raises: `refusal` judges all headers, and every reply parses.
"""

import errno
from collections.abc import Iterator

from fuzz.export import PatternExport
from fuzz.source import Source
from fuzz.target import Target
from nbdstream.errors import NbdstreamError
from nbdstream.export import StatusExtent
from nbdstream.server.constants import CHUNK, CHUNK_DONE, SIMPLE_REPLY, Error
from nbdstream.server.contexts import CONTEXTS, Descriptors, list_matches, set_matches
from nbdstream.server.handshake import Agreement
from nbdstream.server.replies import MAX_DESCRIPTORS, block_status, failure, read_data, refusal_of
from nbdstream.server.requests import Request, is_change, refusal


def run(data: bytes) -> object:
    source = Source(data)
    structured = source.flag()
    export = PatternExport(1 + source.integer(32), read_only=source.flag())
    agreement = Agreement(export, structured, CONTEXTS[: source.byte() % 4])
    request = Request(
        source.number(2),
        source.byte() % 12,
        source.number(8),
        source.integer(64),
        source.integer(32),
    )
    is_change(request)
    refused = refusal(request, agreement)
    if refused is None and request.command != 3:
        assert request.length > 0 and request.offset + request.length <= export.size
    outcome: list[bytes] = []
    if refused is not None:
        outcome.append(_check_failure(failure(request, refused, structured=structured), structured))
    outcome.append(_status(source, request))
    outcome.append(_read(source, request))
    text = source.rest().decode("utf-8", "surrogateescape")
    names = text.split(",")
    assert {c.id for c in set_matches(names)} <= {c.id for c in list_matches(names)}
    for error in (
        OSError(source.byte() or errno.EIO, text),
        OSError(text),
        NbdstreamError(text),
    ):
        reply = failure(request, refusal_of(error, request), structured=structured)
        outcome.append(_check_failure(reply, structured))
    return outcome


def _check_failure(reply: bytes, structured: bool) -> bytes:
    if not structured:
        assert len(reply) == SIMPLE_REPLY.size
        Error(SIMPLE_REPLY.unpack(reply)[1])
        return reply
    _, flags, kind, _, length = CHUNK.unpack_from(reply)
    assert flags == CHUNK_DONE and kind >> 15
    body = reply[CHUNK.size :]
    size = int.from_bytes(body[4:6], "big")
    assert len(body) == length and size <= 4096
    assert length == 6 + size + (8 if kind & 2 else 0)
    body[6 : 6 + size].decode()
    Error(int.from_bytes(body[:4], "big"))
    return reply


def _status(source: Source, request: Request) -> bytes:
    """Any extents that an export may report become chunks that parse."""
    extents = []
    offset = 0
    for _ in range(1 + source.byte() % 8):
        length = 1 + source.integer(24)
        bits = source.byte()
        extents.append(
            StatusExtent(offset, length, bool(bits & 1), bool(bits & 2), bool(bits & 4), bits % 3)
        )
        offset += length
    found = [Descriptors(context, MAX_DESCRIPTORS) for context in CONTEXTS]
    half = len(extents) // 2
    for descriptors in found:
        descriptors.add(extents[:half])
        descriptors.add(extents[half:])
    reply = b"".join(block_status(request, found))
    at = 0
    for context in CONTEXTS:
        length = CHUNK.unpack_from(reply, at)[4]
        body = reply[at + CHUNK.size :][:length]
        assert int.from_bytes(body[:4], "big") == context.id
        total = sum(int.from_bytes(body[i : i + 4], "big") for i in range(4, length, 8))
        assert 0 < total <= offset
        at += CHUNK.size + length
    assert at == len(reply)
    return reply


def _read(source: Source, request: Request) -> bytes:
    """Data with zero ranges anywhere in it comes back as the same data."""
    length = 1 + source.below(20000)
    request = request._replace(length=length, offset=request.offset % (1 << 62))
    content = bytearray(b"x" * length)
    zeroes: list[tuple[int, int]] = []
    at = source.below(length)
    while at < length and len(zeroes) < 8:
        size = min(1 + source.below(9000), length - at)
        zeroes.append((request.offset + at, size))
        content[at : at + size] = bytes(size)
        at += size + source.below(3000)
    parts = read_data(request, memoryview(content), zeroes, structured=True)
    reply = b"".join(parts)
    back = bytearray()
    at, flags = 0, 0
    while at < len(reply):
        assert not flags
        _, flags, kind, _, size = CHUNK.unpack_from(reply, at)
        body = reply[at + CHUNK.size :][:size]
        assert int.from_bytes(body[:8], "big") == request.offset + len(back)
        back += body[8:] if kind == 1 else bytes(int.from_bytes(body[8:], "big"))
        at += CHUNK.size + size
    assert flags == CHUNK_DONE and back == content
    return reply


def seeds() -> Iterator[bytes]:
    yield bytes(60)
    yield bytes(range(200))
    yield b"\1" + bytes(range(255, 100, -1)) + "base:allocation,qemu:,é".encode()


TARGET = Target("replies", run, (), seeds)
