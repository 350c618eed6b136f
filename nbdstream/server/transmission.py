# SPDX-License-Identifier: Apache-2.0
"""The transmission phase of one connection, without I/O: the hot path of the server.

The owner receives into `room`, says how much with `received`, and calls `process`, which
answers every complete request that the disk can answer at once (``…_nowait``) into one
reply buffer, fetched with `take_replies`. What cannot be answered at once lands in
``slow``, together with its payload, for the owner to run; `finished` reports it done.

What must hold:
- Per request on the hot path there are no tasks, no awaits and no copies but the disk's.
- Memory is bounded: two buffers, and for slow requests `MAX_SLOW_BYTES` plus the one
  request that crossed that line. When ``saturated``, nothing is parsed any more.
- A payload that is passed on as a view of the receive buffer is only used during the
  call; slow requests get payloads of their own.
"""

from typing import NamedTuple

from nbdstream.errors import NbdstreamError
from nbdstream.server.constants import (
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
from nbdstream.server.export import Hit
from nbdstream.server.handshake import Agreement, ProtocolError
from nbdstream.server.replies import failure
from nbdstream.server.requests import Request, refusal

# The longest read or write that is tried at once: what the event loop may be kept busy
# with by one plain call (a copy of 1 MiB takes about 0.2 ms).
MAX_INLINE = 1 << 20
# Replies are sent once there are so many bytes of them: more would leave the CPU's cache
# before the kernel copies them.
SEND_SOON = 256 << 10
# Slow requests of one connection at any time.
MAX_SLOW_REQUESTS = 1024
MAX_SLOW_BYTES = 64 << 20

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


class _Body:
    """The payload of a write too long for the receive buffer, received in place."""

    def __init__(self, request: Request, start: memoryview) -> None:
        self.request = request
        self.data = memoryview(bytearray(request.length))
        self.data[: len(start)] = start
        self.filled = len(start)


class Transmission:
    """One connection after its handshake."""

    def __init__(self, agreement: Agreement, unconsumed: bytes = b"") -> None:
        self.slow: list[SlowRequest] = []
        self.disconnected = False  # by NBD_CMD_DISC
        self._agreement = agreement
        self._size = agreement.export.size
        self._writable = not agreement.export.read_only
        self._read_nowait = agreement.export.read_nowait
        self._write_nowait = agreement.export.write_nowait
        self._structured = agreement.structured
        self._data_header = DATA_CHUNK.size if agreement.structured else SIMPLE_REPLY.size
        self._input = memoryview(bytearray(_RECEIVE_BUFFER))
        self._input[: len(unconsumed)] = unconsumed
        self._start, self._end = 0, len(unconsumed)
        self._replies = memoryview(bytearray(_REPLY_BUFFER))
        self._replies_end = 0
        self._slow_requests = 0
        self._slow_bytes = 0
        self._body: _Body | None = None
        # A refused write whose payload is being thrown away: what is left of it, and the
        # reply. (A reply that overtakes the payload would confuse clients.)
        self._skip = 0
        self._skip_reply = b""

    @property
    def saturated(self) -> bool:
        """Too much is in flight to take on more."""
        return self._slow_requests >= MAX_SLOW_REQUESTS or self._slow_bytes >= MAX_SLOW_BYTES

    def room(self) -> memoryview:
        """Where to receive the next bytes; never empty after `process` returned True."""
        if self._body:
            return self._body.data[self._body.filled :]
        waiting = self._end - self._start
        if not waiting:
            self._start = self._end = 0
        elif self._start and len(self._input) - self._end < MAX_INLINE // 4:
            self._input[:waiting] = self._input[self._start : self._end]
            self._start, self._end = 0, waiting
        return self._input[self._end :]

    def received(self, length: int) -> None:
        """The first ``length`` bytes of `room` are filled."""
        if self._body:
            self._body.filled += length
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
        self._slow_bytes -= _memory(done.request)

    def process(self) -> bool:
        """Answer complete requests; return whether more bytes are needed to go on.

        False means that it stopped early: there are replies to be sent, or too much is in
        flight, or the client disconnected. Raises ProtocolError if the client does not
        speak the protocol; there is no way on after that.
        """
        if not self._take_payload():
            return True
        while self._replies_end < SEND_SOON and not self.saturated and not self.disconnected:
            if self._end - self._start < REQUEST.size:
                return True
            magic, flags, command, cookie, offset, length = REQUEST.unpack_from(
                self._input, self._start
            )
            if magic != REQUEST_MAGIC:
                raise ProtocolError(f"bad magic {magic:#010x} instead of a request")
            if not flags and 0 < length <= MAX_INLINE and offset + length <= self._size:
                if command == _READ and self._read_now(cookie, offset, length):
                    continue
                if command == _WRITE and self._write_now(cookie, offset, length):
                    continue
            if not self._set_aside(Request(flags, command, cookie, offset, length)):
                return True
        return False

    def _read_now(self, cookie: int, offset: int, length: int) -> bool:
        """Answer a read from the disk straight into the reply buffer, if it can be."""
        header = self._replies_end
        data = header + self._data_header
        try:
            hit = self._read_nowait(self._replies[data : data + length], offset)
        except (OSError, NbdstreamError):
            return False  # the async method will raise it again, to be reported
        if hit is _MISS:
            return False
        end = data + length
        if not self._structured:
            if hit is _ZERO:
                self._replies[data:end] = _ZEROES[:length]
            SIMPLE_REPLY.pack_into(self._replies, header, SIMPLE_REPLY_MAGIC, 0, cookie)
        elif hit is _DONE:
            DATA_CHUNK.pack_into(
                self._replies,
                header,
                STRUCTURED_REPLY_MAGIC,
                CHUNK_DONE,
                _OFFSET_DATA,
                cookie,
                length + 8,
                offset,
            )
        else:
            end = header + HOLE_CHUNK.size
            HOLE_CHUNK.pack_into(
                self._replies,
                header,
                STRUCTURED_REPLY_MAGIC,
                CHUNK_DONE,
                _OFFSET_HOLE,
                cookie,
                12,
                offset,
                length,
            )
        self._replies_end = end
        self._start += REQUEST.size
        return True

    def _write_now(self, cookie: int, offset: int, length: int) -> bool:
        """Hand a complete write to the disk straight from the receive buffer, if it can be."""
        payload = self._start + REQUEST.size
        if not self._writable or self._end - payload < length:
            return False
        try:
            hit = self._write_nowait(self._input[payload : payload + length], offset)
        except (OSError, NbdstreamError):
            return False  # the async method will raise it again, to be reported
        if hit is _MISS:
            return False
        SIMPLE_REPLY.pack_into(self._replies, self._replies_end, SIMPLE_REPLY_MAGIC, 0, cookie)
        self._replies_end += SIMPLE_REPLY.size
        self._start = payload + length
        return True

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
            if payload_length > MAX_SKIPPED_PAYLOAD:
                raise ProtocolError(f"a write of {payload_length} bytes")
            self._start += REQUEST.size
            self._skip = payload_length
            self._skip_reply = failure(request, refused, structured=self._structured)
            return self._take_payload()
        payload = self._start + REQUEST.size
        if REQUEST.size + payload_length > len(self._input):
            self._body = _Body(request, self._input[payload : self._end])
            self._start = self._end
            self._account(request)
            return False
        if self._end - payload < payload_length:
            return False
        self._start = payload + payload_length
        self._account(request)
        # The receive buffer is about to be used again.
        self.slow.append(
            SlowRequest(request, memoryview(bytes(self._input[payload : self._start])))
        )
        return True

    def _take_payload(self) -> bool:
        """Go on with a payload that is received in place or thrown away, if there is one;
        return whether it is complete."""
        if self._body:
            if self._body.filled < len(self._body.data):
                return False
            self.slow.append(SlowRequest(self._body.request, self._body.data))
            self._body = None
        if self._skip_reply:
            skipped = min(self._skip, self._end - self._start)
            self._start += skipped
            self._skip -= skipped
            if self._skip:
                return False
            self._append_reply(self._skip_reply)
            self._skip_reply = b""
        return True

    def _append_reply(self, reply: bytes) -> None:
        end = self._replies_end + len(reply)
        self._replies[self._replies_end : end] = reply
        self._replies_end = end

    def _account(self, request: Request) -> None:
        self._slow_requests += 1
        self._slow_bytes += _memory(request)


def _memory(request: Request) -> int:
    """Bytes of memory that a slow request holds on to."""
    return request.length if request.command in (Command.READ, Command.WRITE) else 0
