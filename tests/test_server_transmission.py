# SPDX-License-Identifier: Apache-2.0
"""The transmission phase without I/O: hits, misses, refusals, limits, and broken input."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.server.constants import (
    MAX_PAYLOAD,
    Chunk,
    Command,
    CommandFlag,
)
from nbdstream.server.handshake import Agreement, ProtocolError
from nbdstream.server.payloads import PayloadRoom, Share
from nbdstream.server.requests import Request
from nbdstream.server.traffic import Traffic
from nbdstream.server.transmission import (
    MAX_INLINE,
    MAX_SLOW_BYTES,
    MAX_SLOW_REQUESTS,
    SEND_SOON,
    Transmission,
)
from tests.memory_export import MemoryExport
from tests.server_support import READ, WRITE, request
from tests.transmission_support import SIZE, chunks, feed, number, session, simple

# --- hits -------------------------------------------------------------------------------


def test_a_read_is_answered_with_its_data() -> None:
    disk = MemoryExport(SIZE)
    [(cookie, kind, flags, payload)] = chunks(feed(session(disk), request(READ, 512, 1000)))
    assert (cookie, kind, flags) == (1, Chunk.OFFSET_DATA, 1)
    assert number(payload[:8]) == 512
    assert payload[8:] == disk.data[512:1512]


def test_zeroes_are_a_hole_chunk_or_plain_zeroes() -> None:
    disk = MemoryExport(SIZE)
    disk.data[4096:8192] = bytes(4096)
    [(_, kind, flags, payload)] = chunks(feed(session(disk), request(READ, 4096, 4096)))
    assert (kind, flags) == (Chunk.OFFSET_HOLE, 1)
    assert (number(payload[:8]), number(payload[8:])) == (4096, 4096)
    plain = session(disk, structured=False)
    feed(plain, request(READ, 0, 4096))  # leaves data in the reply buffer
    assert feed(plain, request(READ, 4096, 4096)) == simple() + bytes(4096)


def test_simple_replies_without_structured_ones() -> None:
    disk = MemoryExport(SIZE)
    data = feed(session(disk, structured=False), request(READ, 3, 5))
    assert data == simple() + disk.data[3:8]


def test_a_write_is_stored_and_acknowledged() -> None:
    disk = MemoryExport(SIZE)
    before = bytes(disk.data)
    assert feed(session(disk), request(WRITE, 100, 5) + b"hello") == simple()
    assert disk.data == before[:100] + b"hello" + before[105:]


def test_many_requests_in_one_buffer_are_answered_in_one() -> None:
    disk = MemoryExport(SIZE)
    session_ = session(disk)
    batch = b"".join(request(READ, i * 512, 512, cookie=i) for i in range(100))
    room = session_.room()
    room[: len(batch)] = batch
    session_.received(len(batch))
    assert session_.process()
    assert [cookie for cookie, *_ in chunks(bytes(session_.take_replies()))] == list(range(100))


def test_replies_are_sent_before_they_pile_up() -> None:
    session_ = session()
    length = SEND_SOON // 4
    batch = b"".join(request(READ, 0, length, cookie=i) for i in range(10))
    session_.room()[: len(batch)] = batch
    session_.received(len(batch))
    cookies = []
    hungry = False
    while not hungry:
        hungry = session_.process()
        replies = bytes(session_.take_replies())
        assert len(replies) < SEND_SOON + 2 * length
        cookies += [cookie for cookie, *_ in chunks(replies)]
    assert cookies == list(range(10))


def _mixed(disk: MemoryExport) -> bytes:
    disk.data[8192:16384] = bytes(8192)
    return b"".join(
        [
            request(READ, 0, 4096, cookie=1),
            request(WRITE, 4096, 3000, cookie=2) + bytes(range(250)) * 12,
            request(99, cookie=3),
            request(READ, 8192, 4096, cookie=4),
            request(WRITE, SIZE - 1, 2, cookie=5) + b"xy",
            request(READ, 4096, 3000, cookie=6),
        ]
    )


@pytest.mark.parametrize("piece", [1, 7, 27, 28, 29, 3000])
def test_a_session_is_the_same_in_pieces_of_every_size(piece: int) -> None:
    whole, pieces = MemoryExport(SIZE), MemoryExport(SIZE)
    data = _mixed(whole)
    expected = feed(session(whole), data)
    assert _mixed(pieces) == data
    session_ = session(pieces)
    sent = b"".join(feed(session_, data[i : i + piece]) for i in range(0, len(data), piece))
    assert sent == expected
    assert pieces.data == whole.data


def test_what_arrived_with_the_handshake_is_not_lost() -> None:
    disk = MemoryExport(SIZE)
    early = Transmission(
        Agreement(disk, False, ()), Share(PayloadRoom()), Traffic(), request(READ, 0, 4) + b"\x25"
    )
    assert feed(early, b"") == simple() + disk.data[:4]


# --- misses and slow requests -----------------------------------------------------------


def test_a_miss_is_set_aside_and_hits_go_on() -> None:
    disk = MemoryExport(SIZE)
    disk.slow = [range(4096, 8192)]
    session_ = session(disk)
    batch = request(READ, 4096, 512, cookie=1) + request(READ, 0, 512, cookie=2)
    assert [cookie for cookie, *_ in chunks(feed(session_, batch))] == [2]
    assert [slow.request for slow in session_.slow] == [Request(0, READ, 1, 4096, 512)]


def test_a_write_that_is_set_aside_keeps_its_payload() -> None:
    disk = MemoryExport(SIZE)
    disk.misses = True
    session_ = session(disk)
    feed(session_, request(WRITE, 0, 4) + b"kept")
    disk.misses = False
    feed(session_, request(WRITE, 0, 4) + b"next")  # reuses the receive buffer
    assert [bytes(slow.payload) for slow in session_.slow] == [b"kept"]


@pytest.mark.parametrize(
    "flagged",
    [
        request(READ, 0, 512, flags=CommandFlag.DF),
        request(READ, 0, 512, flags=CommandFlag.FUA),
        request(WRITE, 0, 4, flags=CommandFlag.FUA) + b"data",
        request(Command.FLUSH),
        request(Command.TRIM, 0, 512),
        request(Command.CACHE, 0, 512),
        request(Command.WRITE_ZEROES, 0, 512, flags=1 | 2 | 16),
        request(Command.BLOCK_STATUS, 0, 512, flags=8),
        request(Command.TRIM, 0, SIZE),
    ],
)
def test_everything_but_plain_reads_and_writes_is_set_aside(flagged: bytes) -> None:
    session_ = session(contexts=True)
    assert feed(session_, flagged) == b""
    assert len(session_.slow) == 1


def test_a_long_write_is_received_in_place() -> None:
    disk = MemoryExport(MAX_PAYLOAD)
    session_ = session(disk)
    payload = bytes(range(256)) * (2 * MAX_INLINE // 256)
    data = request(WRITE, 0, len(payload)) + payload + request(READ, 0, 4, cookie=2)
    assert chunks(feed(session_, data))[0][0] == 2
    [slow] = session_.slow
    assert slow.payload == payload


def test_errors_of_the_hot_path_are_left_to_the_slow_one() -> None:
    disk = MemoryExport(SIZE)
    disk.error = OSError(errno.EIO, "broken")
    session_ = session(disk)
    assert feed(session_, request(READ, 0, 4) + request(WRITE, 0, 4) + b"data") == b""
    assert len(session_.slow) == 2


def test_a_flood_of_slow_requests_stops_the_parsing_until_one_is_finished() -> None:
    disk = MemoryExport(SIZE)
    disk.misses = True
    session_ = session(disk)
    feed(session_, request(READ, 0, 1) * (MAX_SLOW_REQUESTS + 10))
    assert session_.saturated
    assert len(session_.slow) == MAX_SLOW_REQUESTS
    assert not session_.process()
    session_.finished(session_.slow[0])
    assert not session_.process()
    assert len(session_.slow) == MAX_SLOW_REQUESTS + 1


def test_the_bytes_of_slow_requests_are_bounded() -> None:
    disk = MemoryExport(MAX_PAYLOAD)
    disk.misses = True
    session_ = session(disk)
    feed(session_, request(READ, 0, MAX_PAYLOAD) * 10)
    assert session_.saturated
    assert sum(slow.request.length for slow in session_.slow) == MAX_SLOW_BYTES
    for slow in list(session_.slow):
        session_.finished(slow)
    assert not session_.saturated


# --- anything at all --------------------------------------------------------------------

_COMMANDS = st.sampled_from([*map(int, Command), 8, 200])
_OFFSETS = st.sampled_from([0, 1, 511, 4096, SIZE - 1, SIZE, 2**63, 2**64 - 1])
_LENGTHS = st.sampled_from([0, 1, 28, 512, 5000, SIZE, 2**31, 2**32 - 1])
_FLAGS = st.one_of(st.just(0), st.integers(0, 31), st.just(1 << 15))


def _request(command: int, offset: int, length: int, flags: int, payload: bytes) -> bytes:
    header = request(command, offset, length, flags=flags)
    return header + payload[: min(length, 5000)] if command == WRITE else header


@given(
    st.lists(
        st.one_of(
            st.builds(_request, _COMMANDS, _OFFSETS, _LENGTHS, _FLAGS, st.just(bytes(5000))),
            st.binary(max_size=60),
        ),
        max_size=10,
    ),
    st.integers(1, 100),
    st.booleans(),
)
def test_fuzz_any_input_is_answered_or_a_protocol_error(
    requests: list[bytes], piece: int, structured: bool
) -> None:
    data = b"".join(requests)
    whole, pieces = MemoryExport(SIZE), MemoryExport(SIZE)
    outcomes = []
    for disk, step in ((whole, len(data) or 1), (pieces, piece)):
        session_ = session(disk, structured=structured, contexts=structured)
        sent = b""
        broken = False
        try:
            for i in range(0, len(data), step):
                sent += feed(session_, data[i : i + step])
        except ProtocolError:
            broken = True
        asked = [(slow.request, bytes(slow.payload)) for slow in session_.slow]
        outcomes.append((broken, asked, disk.data, None if broken else sent))
    assert outcomes[0] == outcomes[1]
