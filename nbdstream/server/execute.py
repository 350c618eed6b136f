# SPDX-License-Identifier: Apache-2.0
"""Carries out one request with the export's async methods, from request to reply.

Whatever the export raises becomes the reply; nothing but cancellation gets past.
"""

from collections.abc import Awaitable

import trio

from nbdstream.server.buffers import new_buffer
from nbdstream.server.constants import Command, CommandFlag
from nbdstream.server.contexts import Descriptors
from nbdstream.server.handshake import Agreement
from nbdstream.server.replies import (
    MAX_DESCRIPTORS,
    Buffer,
    block_status,
    failure,
    read_data,
    refusal_of,
    success,
)
from nbdstream.server.requests import Request
from nbdstream.server.traffic import Traffic

# Extents that are looked at before other tasks get their turn: about 0.5 ms.
_EXTENTS_AT_ONCE = 256
# Extents to look at where one descriptor is wanted: neighbours that differ for the disk
# may be one for the context asked for, and QEMU walks disks by such queries.
_EXTENTS_FOR_ONE = 64


async def execute(
    request: Request, payload: memoryview, agreement: Agreement, traffic: Traffic
) -> list[Buffer]:
    """Serve a request that `refusal` let pass, and count it; return the parts of its reply.

    A cancelled call leaves behind what a cancelled call of the export's method does.
    """
    try:
        if request.command == Command.READ:
            parts = await _read(request, agreement)
        elif request.command == Command.BLOCK_STATUS:
            parts = await _block_status(request, agreement)
        else:
            await _change(request, payload, agreement)
            parts = [success(request)]
    except Exception as error:
        traffic.failed[request.command] += 1
        refused = refusal_of(error, request)
        return [failure(request, refused, structured=agreement.structured)]
    traffic.add(request.command, request.length)
    return parts


async def _read(request: Request, agreement: Agreement) -> list[Buffer]:
    data = new_buffer(request.length)
    zeroes = await agreement.export.read(data, request.offset)
    return read_data(request, data, zeroes, structured=agreement.structured)


async def _block_status(request: Request, agreement: Agreement) -> list[Buffer]:
    """Look at the range in pieces, until a reply's worth of extents is known."""
    export, offset, end = agreement.export, request.offset, request.offset + request.length
    if request.flags & CommandFlag.REQ_ONE:
        found = [Descriptors(context, 1) for context in agreement.contexts]
        pieces, limit = 1, _EXTENTS_FOR_ONE
    else:
        found = [Descriptors(context, MAX_DESCRIPTORS) for context in agreement.contexts]
        pieces, limit = MAX_DESCRIPTORS // _EXTENTS_AT_ONCE, _EXTENTS_AT_ONCE
    for left in range(pieces, 0, -1):
        extents = await export.block_status(offset, end - offset, limit)
        for descriptors in found:
            descriptors.add(extents)
        offset = extents[-1].offset + extents[-1].length
        # Few extents mean that the export had a reason of its own to stop there.
        if offset >= end or len(extents) < limit // 2 or left == 1:
            break
        await trio.lowlevel.checkpoint()
    return block_status(request, found)


def _change(request: Request, payload: memoryview, agreement: Agreement) -> Awaitable[None]:
    """The requests whose reply has no data."""
    export = agreement.export
    _, command, _, offset, length = request
    fua = bool(request.flags & CommandFlag.FUA)
    if command == Command.WRITE:
        return export.write(payload, offset, fua=fua)
    if command == Command.WRITE_ZEROES:
        may_trim = not request.flags & CommandFlag.NO_HOLE
        fast_only = bool(request.flags & CommandFlag.FAST_ZERO)
        return export.zero(offset, length, may_trim=may_trim, fast_only=fast_only, fua=fua)
    if command == Command.TRIM:
        return export.trim(offset, length, fua=fua)
    if command == Command.CACHE:
        return export.cache(offset, length)
    assert command == Command.FLUSH, request
    return export.flush()
