# SPDX-License-Identifier: Apache-2.0
"""The transmission phase without I/O: hits, misses, refusals, limits, and broken input."""

import errno
import logging

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.errors import BackingGoneError, LeafFormatError, NbdstreamError
from nbdstream.server.constants import (
    CHUNK,
    MAX_PAYLOAD,
    MAX_SKIPPED_PAYLOAD,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
    CommandFlag,
    Error,
)
from nbdstream.server.contexts import CONTEXTS
from nbdstream.server.execute import execute
from nbdstream.server.handshake import Agreement, ProtocolError
from nbdstream.server.replies import refusal_of
from nbdstream.server.requests import Request
from nbdstream.server.transmission import (
    MAX_INLINE,
    MAX_SLOW_BYTES,
    MAX_SLOW_REQUESTS,
    SEND_SOON,
    Transmission,
)
from tests.memory_export import MemoryExport
from tests.server_support import request

SIZE = 1 << 20
READ, WRITE, DISC = Command.READ, Command.WRITE, Command.DISC


def session(
    disk: MemoryExport | None = None, *, structured: bool = True, contexts: bool = False
) -> Transmission:
    agreement = Agreement(disk or MemoryExport(SIZE), structured, CONTEXTS if contexts else ())
    return Transmission(agreement)


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
    early = Transmission(Agreement(disk, False, ()), request(READ, 0, 4) + b"\x25")
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


# --- refusals ---------------------------------------------------------------------------

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


# --- slow requests carried out ----------------------------------------------------------


async def perform(
    disk: MemoryExport, data: bytes, *, structured: bool = True, contexts: int = 0
) -> bytes:
    """The reply to one slow request."""
    agreement = Agreement(disk, structured, CONTEXTS[:contexts])
    session_ = Transmission(agreement)
    assert feed(session_, data) == b""
    [slow] = session_.slow
    return b"".join(await execute(slow.request, slow.payload, agreement))


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
