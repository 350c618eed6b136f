# SPDX-License-Identifier: Apache-2.0
"""The transmission phase of one connection, without I/O: the hot path of the server.

The owner receives into `room`, says how much with `received`, and calls `process`, which
answers every complete request that the disk can answer at once (``…_nowait``) into one
reply buffer, fetched with `take_replies`. What cannot be answered at once lands in
``slow``, together with its payload, for the owner to run; `finished` reports it done.

What must hold:
- Per request on the hot path there are no tasks, no awaits and no copies but the disk's.
- Memory is bounded: two buffers, and for slow requests `MAX_SLOW_BYTES` plus the one
  request that crossed that line, as long as there is room in what all clients share. When
  ``saturated``, nothing is parsed any more.
- A payload that is passed on as a view of the receive buffer is only used during the
  call; slow requests get payloads of their own.
"""

from dataclasses import dataclass
from typing import NamedTuple

from nbdstream.errors import NbdstreamError
from nbdstream.export import Hit
from nbdstream.server.buffers import new_buffer
from nbdstream.server.constants import (
    CHUNK,
    CHUNK_DONE,
    DATA_CHUNK,
    HOLE_CHUNK,
    MAX_SKIPPED_PAYLOAD,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
)
from nbdstream.server.handshake import Agreement, ProtocolError
from nbdstream.server.payloads import Share
from nbdstream.server.replies import MAX_DESCRIPTORS, failure
from nbdstream.server.requests import Request, describe, refusal
from nbdstream.server.traffic import Traffic

# The longest read or write that is tried at once: what the event loop may be kept busy
# with by one plain call (a copy of 1 MiB takes about 0.2 ms).
MAX_INLINE = 1 << 20
# Replies are sent once there are so many bytes of them: more would leave the CPU's cache
# before the kernel copies them.
SEND_SOON = 256 << 10
# Requests that one call of `process` answers at the most, which takes about a millisecond;
# one that is refused or set aside counts as so many that are answered at once. Other tasks
# have their turn between two calls.
BUDGET = 256
COST_OF_OTHERS = 8
# Slow requests of one connection at any time. QEMU has 16, the Linux client 128.
MAX_SLOW_REQUESTS = 256
MAX_SLOW_BYTES = 64 << 20

_DESCRIPTOR = 8  # bytes of an extent in a reply to block status
_RECEIVE_BUFFER = MAX_INLINE + (64 << 10)
# Room for the longest reply behind SEND_SOON bytes of others.
_REPLY_BUFFER = SEND_SOON + MAX_INLINE + (64 << 10)

# In the hot loop globals are faster than attributes of enums.
_READ, _WRITE = int(Command.READ), int(Command.WRITE)
_OFFSET_DATA, _OFFSET_HOLE = int(Chunk.OFFSET_DATA), int(Chunk.OFFSET_HOLE)
_MISS, _DONE, _ZERO = Hit.MISS, Hit.DONE, Hit.ZERO
_ZEROES = memoryview(bytes(MAX_INLINE))


class SlowRequest(NamedTuple):
    """A request that has to wait for something; ``payload`` is empty unless it is a write."""

    request: Request
    payload: memoryview


# The state of a connection's payload: None between requests, else one of these two.


@dataclass(slots=True)
class _Receiving:
    """The payload of a write that is too long for the receive buffer comes in place."""

    request: Request
    data: memoryview
    filled: int


@dataclass(slots=True)
class _Skipping:
    """The payload of a refused write is thrown away. The reply goes out behind it: one that
    overtakes the payload would confuse clients."""

    left: int
    reply: bytes


class Transmission:
    """One connection after its handshake. The owner closes ``share`` at its end. ``traffic``
    counts what it answers or refuses itself."""

    def __init__(
        self, agreement: Agreement, share: Share, traffic: Traffic, unconsumed: bytes = b""
    ) -> None:
        self.slow: list[SlowRequest] = []
        self.disconnected = False  # by NBD_CMD_DISC
        self._agreement = agreement
        self._size = agreement.export.size
        self._writable = not agreement.export.read_only
        self._read_nowait = agreement.export.read_nowait
        self._write_nowait = agreement.export.write_nowait
        self._structured = agreement.structured
        self._data_header = DATA_CHUNK.size if agreement.structured else SIMPLE_REPLY.size
        self._input = new_buffer(_RECEIVE_BUFFER)
        self._input[: len(unconsumed)] = unconsumed
        self._start, self._end = 0, len(unconsumed)
        self._replies = new_buffer(_REPLY_BUFFER)
        self._replies_end = 0
        self._slow_requests = 0
        self._share = share
        self._traffic = traffic
        self._wanted = 0  # memory that the next request waits for
        self._payload: _Receiving | _Skipping | None = None

    @property
    def saturated(self) -> bool:
        """Too much is in flight to take on more."""
        full = self._slow_requests >= MAX_SLOW_REQUESTS or self._share.held >= MAX_SLOW_BYTES
        return full or self.crowded_out

    @property
    def crowded_out(self) -> bool:
        """The next request waits for memory that other clients hold."""
        return self._wanted > 0 and not self._share.fits(self._wanted)

    def room(self) -> memoryview:
        """Where to receive the next bytes; never empty after `process` returned True."""
        payload = self._payload
        if isinstance(payload, _Receiving):
            return payload.data[payload.filled :]
        waiting = self._end - self._start
        if not waiting:
            self._start = self._end = 0
        elif self._start and len(self._input) - self._end < MAX_INLINE // 4:
            self._input[:waiting] = self._input[self._start : self._end]
            self._start, self._end = 0, waiting
        return self._input[self._end :]

    def received(self, length: int) -> None:
        """The first ``length`` bytes of `room` are filled."""
        payload = self._payload
        if isinstance(payload, _Receiving):
            payload.filled += length
        else:
            self._end += length

    def take_replies(self) -> memoryview:
        """The replies made by `process`; to be sent before it is called again."""
        replies = self._replies[: self._replies_end]
        self._replies_end = 0
        return replies

    def finished(self, done: SlowRequest) -> None:
        """A request from ``slow`` needs no memory any more."""
        self._slow_requests -= 1
        self._share.give_back(self._memory(done.request))

    def process(self) -> bool:
        """Answer complete requests; return whether more bytes are needed to go on.

        False means that it stopped early: there are replies to be sent, or too much is in
        flight, or the client disconnected, or it is time to let others have their turn.
        Raises ProtocolError if the client does not speak the protocol; there is no way on
        after that.
        """
        if self._payload is not None and not self._take_payload():
            return True
        budget = BUDGET
        while not self.saturated and not self.disconnected:
            budget = self._answer_hits(budget)
            if self._replies_end >= SEND_SOON or budget <= 0:
                return False
            if self._end - self._start < REQUEST.size:
                return True
            fields = REQUEST.unpack_from(self._input, self._start)
            if not self._set_aside(Request._make(fields[1:])):
                return True
            budget -= COST_OF_OTHERS
        return False

    def _answer_hits(self, budget: int) -> int:
        """Answer up to ``budget`` requests, up to the first that cannot be answered at once.
        Returns what is left of the budget.

        One long loop over local names on purpose: at 100,000 requests per second each
        attribute and each call made here is seen in the rate.
        """
        received, replies = self._input, self._replies
        start, end, used = self._start, self._end, self._replies_end
        read, write, size = self._read_nowait, self._write_nowait, self._size
        writable, structured, data_header = self._writable, self._structured, self._data_header
        unpack_request, header_size = REQUEST.unpack_from, REQUEST.size
        pack_data, pack_simple = DATA_CHUNK.pack_into, SIMPLE_REPLY.pack_into
        writes = read_bytes = written_bytes = 0
        for left in range(budget, 0, -1):  # noqa: B007 - it is what is returned
            if used >= SEND_SOON or end - start < header_size:
                break
            magic, flags, command, cookie, offset, length = unpack_request(received, start)
            if magic != REQUEST_MAGIC:
                raise ProtocolError(f"bad magic {magic:#010x} instead of a request")
            if flags or not 0 < length <= MAX_INLINE or offset + length > size:
                break
            try:
                if command == _READ:
                    data = used + data_header
                    hit = read(replies[data : data + length], offset)
                    if hit is _MISS:
                        break
                    if hit is _DONE and structured:
                        pack_data(
                            replies,
                            used,
                            STRUCTURED_REPLY_MAGIC,
                            CHUNK_DONE,
                            _OFFSET_DATA,
                            cookie,
                            length + 8,
                            offset,
                        )
                        used = data + length
                    else:
                        used = self._pack_read(used, hit, cookie, offset, length)
                    start += header_size
                    read_bytes += length
                elif command == _WRITE and writable and end - start >= header_size + length:
                    payload = start + header_size
                    if write(received[payload : payload + length], offset) is _MISS:
                        break
                    pack_simple(replies, used, SIMPLE_REPLY_MAGIC, 0, cookie)
                    used += SIMPLE_REPLY.size
                    start = payload + length
                    writes += 1
                    written_bytes += length
                else:
                    break
            except (OSError, NbdstreamError):
                break  # the async method will raise it again, to be reported
        else:
            left = 0
        self._start, self._replies_end = start, used
        done, size_of = self._traffic.done, self._traffic.bytes
        done[_READ] += budget - left - writes
        done[_WRITE] += writes
        size_of[_READ] += read_bytes
        size_of[_WRITE] += written_bytes
        return left

    def _pack_read(self, used: int, hit: Hit, cookie: int, offset: int, length: int) -> int:
        """Write the reply to a read that is no chunk of data; return where it ends."""
        replies = self._replies
        if self._structured:  # a hole
            HOLE_CHUNK.pack_into(
                replies,
                used,
                STRUCTURED_REPLY_MAGIC,
                CHUNK_DONE,
                _OFFSET_HOLE,
                cookie,
                HOLE_CHUNK.size - CHUNK.size,
                offset,
                length,
            )
            return used + HOLE_CHUNK.size
        SIMPLE_REPLY.pack_into(replies, used, SIMPLE_REPLY_MAGIC, 0, cookie)
        end = used + SIMPLE_REPLY.size + length
        if hit is _ZERO:
            replies[end - length : end] = _ZEROES[:length]
        return end

    def _set_aside(self, request: Request) -> bool:
        """Take any request out of the input: refuse it, or add it to ``slow``.

        Returns False if its payload has not arrived yet.
        """
        if request.command == Command.DISC:
            self.disconnected = True
            return True
        payload_length = request.length if request.command == Command.WRITE else 0
        refused = refusal(request, self._agreement)
        if refused:
            self._traffic.refuse(request.command)
            if payload_length > MAX_SKIPPED_PAYLOAD:
                raise ProtocolError(
                    f"{describe(request)}: no more than {MAX_SKIPPED_PAYLOAD} bytes are skipped"
                )
            self._start += REQUEST.size
            reply = failure(request, refused, structured=self._structured)
            self._payload = _Skipping(payload_length, reply)
            return self._take_payload()
        payload = self._start + REQUEST.size
        in_place = REQUEST.size + payload_length > len(self._input)
        if not in_place and self._end - payload < payload_length:
            return False
        self._wanted = self._memory(request)
        if not self._share.take(self._wanted):
            return True  # and it stays in the input
        self._wanted = 0
        self._slow_requests += 1
        if in_place:
            data = new_buffer(request.length)
            filled = self._end - payload
            data[:filled] = self._input[payload : self._end]
            self._payload = _Receiving(request, data, filled)
            self._start = self._end
            return False
        self._start = payload + payload_length
        # The receive buffer is about to be used again.
        self.slow.append(
            SlowRequest(request, memoryview(bytes(self._input[payload : self._start])))
        )
        return True

    def _take_payload(self) -> bool:
        """Go on with a payload that is received in place or thrown away, if there is one;
        return whether it is complete."""
        payload = self._payload
        if isinstance(payload, _Receiving):
            if payload.filled < len(payload.data):
                return False
            self.slow.append(SlowRequest(payload.request, payload.data))
        elif payload is not None:
            skipped = min(payload.left, self._end - self._start)
            self._start += skipped
            payload.left -= skipped
            if payload.left:
                return False
            self._append_reply(payload.reply)
        self._payload = None
        return True

    def _append_reply(self, reply: bytes) -> None:
        end = self._replies_end + len(reply)
        self._replies[self._replies_end : end] = reply
        self._replies_end = end

    def _memory(self, request: Request) -> int:
        """Bytes of memory that a slow request holds on to, until its reply is sent."""
        if request.command in (Command.READ, Command.WRITE):
            return request.length
        if request.command == Command.BLOCK_STATUS:
            return len(self._agreement.contexts) * MAX_DESCRIPTORS * _DESCRIPTOR
        return 0
