# SPDX-License-Identifier: Apache-2.0
"""Replies of the transmission phase as bytes, and the way from exceptions to NBD errors.

Without structured replies every reply is a simple one. With them, whatever carries data
or an error is structured, and plain success stays simple, which is 4 bytes shorter.
"""

import errno
import logging
from collections.abc import Sequence

from nbdstream.errors import NbdstreamError
from nbdstream.server.constants import (
    CHUNK,
    CHUNK_DONE,
    DATA_CHUNK,
    HOLE_CHUNK,
    MAX_STRING,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
    CommandFlag,
    Error,
)
from nbdstream.server.contexts import Descriptors
from nbdstream.server.requests import Refusal, Request

logger = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview

# A hole within a larger read gets a chunk of its own from this length on; below it the
# zeroes are cheaper than the two headers.
MIN_HOLE = 4096
# Descriptors for one context in one reply: far below the 2^20 that the protocol allows,
# enough that a query is not answered in crumbs.
MAX_DESCRIPTORS = 4096

_ERRNOS = {
    errno.EPERM: Error.EPERM,
    errno.EACCES: Error.EPERM,
    errno.EROFS: Error.EPERM,
    errno.EIO: Error.EIO,
    errno.ENOMEM: Error.ENOMEM,
    errno.EINVAL: Error.EINVAL,
    errno.ENOSPC: Error.ENOSPC,
    errno.EDQUOT: Error.ENOSPC,
    errno.EFBIG: Error.ENOSPC,
    errno.EOVERFLOW: Error.EOVERFLOW,
    errno.ENOTSUP: Error.ENOTSUP,
    errno.ESHUTDOWN: Error.ESHUTDOWN,
}


def refusal_of(error: Exception, request: Request) -> Refusal:
    """The NBD error for what an export raised ("Error values")."""
    if isinstance(error, OSError):
        number = _ERRNOS.get(error.errno or errno.EIO, Error.EIO)
        # Both are reserved for requests that ask for them.
        if number == Error.ENOTSUP and not request.flags & CommandFlag.FAST_ZERO:
            number = Error.EINVAL
        if number == Error.EOVERFLOW and request.command != Command.READ:
            number = Error.EINVAL
        return Refusal(number, error.strerror or str(error))
    if isinstance(error, NbdstreamError):
        return Refusal(Error.EIO, str(error))
    if isinstance(error, MemoryError) or "can't start new thread" in str(error):
        return Refusal(Error.ENOMEM, "the server is out of memory")
    # A bug. The guest gets an error for this one request; the log gets all there is.
    logger.error("unexpected error while serving %s", request, exc_info=error)
    return Refusal(Error.EIO, "internal error")


def success(request: Request) -> bytes:
    """The reply to a request that returns no data."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, request.cookie)


def failure(request: Request, refused: Refusal, *, structured: bool) -> bytes:
    """The reply that says no, and why if the client understands it."""
    if not structured:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, refused.error, request.cookie)
    # No character takes more than 4 bytes.
    message = refused.message[: MAX_STRING // 4].encode(errors="replace")
    payload = refused.error.to_bytes(4, "big") + len(message).to_bytes(2, "big") + message
    kind = Chunk.ERROR
    if refused.offset is not None and _has_place(refused.offset, request):
        kind = Chunk.ERROR_OFFSET
        payload += refused.offset.to_bytes(8, "big")
    return _chunk(request, kind, payload, last=True)


def read_data(
    request: Request,
    data: memoryview,
    zeroes: Sequence[tuple[int, int]],
    *,
    structured: bool,
) -> list[Buffer]:
    """The parts of the reply to a read: ``data`` is what was read, ``zeroes`` the sorted
    (offset, length) ranges of the disk within it that are known to be zeroes."""
    if not structured:
        return [success(request), data]
    if request.flags & CommandFlag.DF:
        zeroes = ()
    parts: list[Buffer] = []
    end = request.offset + request.length
    done = request.offset
    for offset, length in zeroes:
        if length < MIN_HOLE:
            continue
        if done < offset:
            parts += _data_chunk(request, data, done, offset, last=False)
        done = offset + length
        parts.append(_hole_chunk(request, offset, length, last=done == end))
    if done < end:
        parts += _data_chunk(request, data, done, end, last=True)
    return parts


def block_status(request: Request, found: Sequence[Descriptors]) -> list[Buffer]:
    """One chunk for each negotiated context."""
    return [
        _chunk(
            request,
            Chunk.BLOCK_STATUS,
            descriptors.context.id.to_bytes(4, "big") + descriptors.encode(),
            last=descriptors is found[-1],
        )
        for descriptors in found
    ]


def _has_place(offset: int, request: Request) -> bool:
    """Whether NBD_REPLY_TYPE_ERROR_OFFSET may name ``offset``, which must fit 64 bits."""
    return request.offset <= offset < min(request.offset + request.length, 1 << 64)


def _chunk(request: Request, kind: Chunk, payload: bytes, *, last: bool) -> bytes:
    flags = CHUNK_DONE if last else 0
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, len(payload)) + payload


def _data_chunk(
    request: Request, data: memoryview, start: int, end: int, *, last: bool
) -> list[Buffer]:
    header = DATA_CHUNK.pack(
        STRUCTURED_REPLY_MAGIC,
        CHUNK_DONE if last else 0,
        Chunk.OFFSET_DATA,
        request.cookie,
        8 + end - start,
        start,
    )
    return [header, data[start - request.offset : end - request.offset]]


def _hole_chunk(request: Request, offset: int, length: int, *, last: bool) -> bytes:
    return HOLE_CHUNK.pack(
        STRUCTURED_REPLY_MAGIC,
        CHUNK_DONE if last else 0,
        Chunk.OFFSET_HOLE,
        request.cookie,
        12,
        offset,
        length,
    )
