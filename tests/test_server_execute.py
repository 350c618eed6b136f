# SPDX-License-Identifier: Apache-2.0
"""Slow requests carried out: what reaches the disk, and what the replies look like."""

import errno
import logging

import pytest
import trio

from nbdstream.errors import BackingGoneError, LeafFormatError, NbdstreamError
from nbdstream.server.constants import (
    Chunk,
    Command,
    CommandFlag,
    Error,
)
from nbdstream.server.contexts import CONTEXTS
from nbdstream.server.execute import execute
from nbdstream.server.handshake import Agreement
from nbdstream.server.payloads import PayloadRoom, Share
from nbdstream.server.replies import refusal_of
from nbdstream.server.requests import Request
from nbdstream.server.traffic import Traffic
from nbdstream.server.transmission import (
    Transmission,
)
from tests.memory_export import MemoryExport
from tests.server_support import READ, WRITE, request
from tests.transmission_support import SIZE, chunks, feed, number, simple


async def perform(
    disk: MemoryExport, data: bytes, *, structured: bool = True, contexts: int = 0
) -> bytes:
    """The reply to one slow request."""
    agreement = Agreement(disk, structured, CONTEXTS[:contexts])
    session_ = Transmission(agreement, Share(PayloadRoom()), Traffic())
    assert feed(session_, data) == b""
    [slow] = session_.slow
    return b"".join(await execute(slow.request, slow.payload, agreement, Traffic()))


@pytest.mark.parametrize(
    ("data", "call"),
    [
        (request(WRITE, 8, 4, flags=1) + b"data", ("write", 8, 4, True)),
        (request(Command.FLUSH), ("flush",)),
        (request(Command.TRIM, 8, 4), ("trim", 8, 4, False)),
        (request(Command.TRIM, 8, 4, flags=1), ("trim", 8, 4, True)),
        (request(Command.CACHE, 8, 4), ("cache", 8, 4)),
        (request(Command.WRITE_ZEROES, 8, 4), ("zero", 8, 4, True, False, False)),
        (request(Command.WRITE_ZEROES, 0, 4096, flags=19), ("zero", 0, 4096, False, True, True)),
    ],
)
async def test_requests_reach_the_disk_with_their_flags(
    data: bytes, call: tuple[object, ...]
) -> None:
    disk = MemoryExport(SIZE)
    assert await perform(disk, data) == simple()
    assert disk.calls == [call]


async def test_a_slow_read_has_chunks_for_data_and_holes() -> None:
    disk = MemoryExport(SIZE)
    disk.misses = True
    disk.data[4096:12288] = bytes(8192)
    found = chunks(await perform(disk, request(READ, 1000, 15000)))
    pieces = []
    for cookie, kind, flags, payload in found:
        assert cookie == 1
        assert flags == (1 if payload is found[-1][3] else 0)
        offset = number(payload[:8])
        if kind == Chunk.OFFSET_HOLE:
            pieces.append((offset, bytes(number(payload[8:]))))
        else:
            assert kind == Chunk.OFFSET_DATA
            pieces.append((offset, payload[8:]))
    assert [offset for offset, _ in pieces] == [1000, 4096, 8192, 12288]
    assert b"".join(data for _, data in pieces) == disk.data[1000:16000]


async def test_a_slow_read_that_ends_in_a_hole_ends_with_its_chunk() -> None:
    disk = MemoryExport(SIZE)
    disk.misses = True
    disk.data[4096:8192] = bytes(4096)
    found = chunks(await perform(disk, request(READ, 0, 8192)))
    assert [(kind, flags) for _, kind, flags, _ in found] == [
        (Chunk.OFFSET_DATA, 0),
        (Chunk.OFFSET_HOLE, 1),
    ]


async def test_df_gets_one_chunk_whatever_is_in_it() -> None:
    disk = MemoryExport(SIZE)
    disk.data[4096:8192] = bytes(4096)
    [(_, kind, _, payload)] = chunks(
        await perform(disk, request(READ, 0, 16384, flags=CommandFlag.DF))
    )
    assert kind == Chunk.OFFSET_DATA
    assert payload[8:] == disk.data[:16384]


async def test_a_slow_read_without_structured_replies() -> None:
    disk = MemoryExport(SIZE)
    disk.misses = True
    reply = await perform(disk, request(READ, 5, 10000), structured=False)
    assert reply == simple() + disk.data[5:10005]


async def test_block_status_has_one_chunk_per_context() -> None:
    disk = MemoryExport(6 * 4096)
    disk.data[4096 : 3 * 4096] = bytes(8192)
    found = chunks(await perform(disk, request(Command.BLOCK_STATUS, 0, disk.size), contexts=3))
    assert [(kind, flags) for _, kind, flags, _ in found] == [
        (Chunk.BLOCK_STATUS, 0),
        (Chunk.BLOCK_STATUS, 0),
        (Chunk.BLOCK_STATUS, 1),
    ]
    maps = {number(payload[:4]): _descriptors(payload[4:]) for *_, payload in found}
    assert maps[1] == [(4096, 0), (8192, 3), (3 * 4096, 0)]
    assert maps[2] == [(4096, 1), (4096, 2)] * 3
    assert maps[3] == [(4096, 1), (4096, 0)] * 3


async def test_req_one_gets_one_descriptor_as_long_as_it_can_be() -> None:
    disk = MemoryExport(6 * 4096)
    disk.data[4 * 4096 :] = bytes(2 * 4096)
    query = request(Command.BLOCK_STATUS, 0, disk.size, flags=CommandFlag.REQ_ONE)
    found = chunks(await perform(disk, query, contexts=2))
    assert [_descriptors(payload[4:]) for *_, payload in found] == [[(4 * 4096, 0)], [(4096, 1)]]


def _descriptors(data: bytes) -> list[tuple[int, int]]:
    return [(number(data[i : i + 4]), number(data[i + 4 : i + 8])) for i in range(0, len(data), 8)]


async def test_an_error_of_the_disk_is_the_reply() -> None:
    disk = MemoryExport(SIZE)
    disk.error = OSError(errno.ENOSPC, "no room")
    [(_, kind, flags, payload)] = chunks(await perform(disk, request(WRITE, 0, 4) + b"data"))
    assert (kind, flags, number(payload[:4])) == (Chunk.ERROR, 1, Error.ENOSPC)
    assert payload[6:] == b"no room"
    reply = await perform(disk, request(READ, 0, 4), structured=False)
    assert reply == simple(Error.ENOSPC)


@pytest.mark.parametrize(
    ("number_", "command", "flags", "error"),
    [
        (errno.EPERM, WRITE, 0, Error.EPERM),
        (errno.EACCES, WRITE, 0, Error.EPERM),
        (errno.EROFS, WRITE, 0, Error.EPERM),
        (errno.EIO, READ, 0, Error.EIO),
        (errno.ENOMEM, READ, 0, Error.ENOMEM),
        (errno.EINVAL, READ, 0, Error.EINVAL),
        (errno.ENOSPC, WRITE, 0, Error.ENOSPC),
        (errno.EDQUOT, WRITE, 0, Error.ENOSPC),
        (errno.EFBIG, WRITE, 0, Error.ENOSPC),
        (errno.EOVERFLOW, READ, 0, Error.EOVERFLOW),
        (errno.EOVERFLOW, Command.TRIM, 0, Error.EINVAL),
        (errno.ENOTSUP, Command.WRITE_ZEROES, CommandFlag.FAST_ZERO, Error.ENOTSUP),
        (errno.ENOTSUP, Command.WRITE_ZEROES, 0, Error.EINVAL),
        (errno.ESHUTDOWN, READ, 0, Error.ESHUTDOWN),
        (errno.ENOENT, READ, 0, Error.EIO),
    ],
)
def test_errno_to_nbd_error(number_: int, command: int, flags: int, error: Error) -> None:
    refused = refusal_of(OSError(number_, "why"), Request(flags, command, 1, 0, 1))
    assert refused == (error, "why", None)


@pytest.mark.parametrize("error", [BackingGoneError("gone"), LeafFormatError("gone"), OSError()])
def test_other_errors_are_io_errors(error: NbdstreamError | OSError) -> None:
    assert refusal_of(error, Request(0, READ, 1, 0, 1)).error == Error.EIO


async def test_a_bug_is_an_error_of_one_request_and_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = MemoryExport(SIZE)
    disk.error = ZeroDivisionError("oops")
    with caplog.at_level(logging.ERROR):
        [(_, _, _, payload)] = chunks(await perform(disk, request(Command.TRIM, 0, 4)))
    assert number(payload[:4]) == Error.EIO
    assert caplog.records[0].exc_info


def test_long_messages_are_cut() -> None:
    disk = MemoryExport(SIZE)
    disk.error = OSError(errno.EIO, "\N{SNOWMAN}" * 5000)
    [(_, _, _, payload)] = chunks(trio.run(perform, disk, request(Command.TRIM, 0, 4)))
    assert 1000 < number(payload[4:6]) <= 4096
    assert set(payload[6:].decode()) == {"\N{SNOWMAN}"}
