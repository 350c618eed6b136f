# SPDX-License-Identifier: Apache-2.0
"""Requests that are refused, and what follows them: the session goes on, or ends."""

import pytest

from nbdstream.server.constants import (
    MAX_PAYLOAD,
    MAX_SKIPPED_PAYLOAD,
    Chunk,
    Command,
    CommandFlag,
    Error,
)
from nbdstream.server.handshake import ProtocolError
from tests.memory_export import MemoryExport
from tests.server_support import DISC, READ, WRITE, request
from tests.transmission_support import SIZE, chunks, feed, number, session, simple

REFUSED = [
    (request(9), Error.EINVAL),
    (request(0xFFFF, 0, 2**32 - 1), Error.EINVAL),
    (request(READ, 0, 512, flags=CommandFlag.REQ_ONE), Error.EINVAL),
    (request(READ, 0, 512, flags=1 << 7), Error.EINVAL),
    (request(WRITE, 0, 4, flags=CommandFlag.NO_HOLE) + b"data", Error.EINVAL),
    (request(READ, 0, 0), Error.EINVAL),
    (request(WRITE, 0, 0), Error.EINVAL),
    (request(Command.TRIM, 5, 0), Error.EINVAL),
    (request(READ, SIZE, 1), Error.EINVAL),
    (request(READ, SIZE - 1, 2), Error.EINVAL),
    (request(READ, 2**64 - 1, 2**32 - 1), Error.EINVAL),
    (request(WRITE, SIZE - 1, 2) + b"xy", Error.ENOSPC),
    (request(Command.WRITE_ZEROES, SIZE, 1), Error.ENOSPC),
    (request(Command.TRIM, SIZE, 1), Error.EINVAL),
    (request(Command.CACHE, SIZE, 1), Error.EINVAL),
    (request(Command.FLUSH, 1, 0), Error.EINVAL),
    (request(Command.FLUSH, 0, 1), Error.EINVAL),
    (request(Command.BLOCK_STATUS, 0, 512), Error.EINVAL),  # no context was chosen
]


@pytest.mark.parametrize(("data", "error"), REFUSED)
def test_what_makes_no_sense_is_refused_and_the_session_goes_on(data: bytes, error: Error) -> None:
    disk = MemoryExport(SIZE)
    before = bytes(disk.data)
    found = chunks(feed(session(disk), data + request(READ, 0, 1, cookie=2)))
    assert [cookie for cookie, *_ in found] == [1, 2]
    _, kind, flags, payload = found[0]
    assert kind in (Chunk.ERROR, Chunk.ERROR_OFFSET)
    assert flags == 1
    assert number(payload[:4]) == error
    assert payload[6 : 6 + number(payload[4:6])].decode()
    assert disk.data == before

    plain = feed(session(disk, structured=False), data)
    assert plain == simple(error)


def test_out_of_bounds_names_the_first_byte_beyond_the_end() -> None:
    [(_, kind, _, payload)] = chunks(feed(session(), request(READ, SIZE - 512, 1024)))
    assert kind == Chunk.ERROR_OFFSET
    assert number(payload[-8:]) == SIZE


def test_a_read_beyond_the_maximum_payload_overflows() -> None:
    disk = MemoryExport(MAX_PAYLOAD + 512)
    long = request(READ, 0, MAX_PAYLOAD + 1)
    [(_, _, _, payload)] = chunks(feed(session(disk), long))
    assert number(payload[:4]) == Error.EOVERFLOW
    assert feed(session(disk, structured=False), long) == simple(Error.EINVAL)


def test_df_needs_structured_replies() -> None:
    assert feed(session(structured=False), request(READ, 0, 512, flags=CommandFlag.DF)) == simple(
        Error.EINVAL
    )


@pytest.mark.parametrize(
    "data",
    [
        request(WRITE, 0, 4) + b"data",
        request(Command.TRIM, 0, 512),
        request(Command.WRITE_ZEROES, 0, 512),
    ],
)
def test_a_read_only_export_is_not_changed(data: bytes) -> None:
    disk = MemoryExport(SIZE, read_only=True)
    before = bytes(disk.data)
    assert feed(session(disk, structured=False), data) == simple(Error.EPERM)
    assert disk.data == before


def test_the_payload_of_a_refused_write_is_thrown_away_before_the_reply() -> None:
    session_ = session(structured=False)
    payload = request(READ, 0, 1) * 1000  # looks like requests
    header = request(WRITE, SIZE, len(payload))
    assert feed(session_, header + payload[:-1]) == b""
    assert feed(session_, payload[-1:]) == simple(Error.ENOSPC)


def test_a_write_beyond_the_maximum_payload_is_refused_or_ends_the_session() -> None:
    disk = MemoryExport(2 * MAX_SKIPPED_PAYLOAD)
    session_ = session(disk, structured=False)
    long = MAX_PAYLOAD + 1
    assert feed(session_, request(WRITE, 0, long) + bytes(long)) == simple(Error.EINVAL)
    with pytest.raises(ProtocolError, match=str(MAX_SKIPPED_PAYLOAD + 1)):
        feed(session_, request(WRITE, 0, MAX_SKIPPED_PAYLOAD + 1))


@pytest.mark.parametrize("garbage", [bytes(28), b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_bad_magic_ends_the_session(garbage: bytes) -> None:
    with pytest.raises(ProtocolError, match="magic"):
        feed(session(), request(READ, 0, 1) + garbage)


def test_nothing_is_served_behind_a_disconnect() -> None:
    session_ = session(structured=False)
    feed(session_, request(DISC) + request(READ, 0, 1))
    assert session_.disconnected
    assert not session_.process()
    assert not session_.take_replies()
