# SPDX-License-Identifier: Apache-2.0
"""How a link delays bytes: queue, rate, delay and jitter, without sockets.

A link has two directions, independent of each other. In each direction all connections
share one FIFO queue and one transmitter, so a byte waits behind every byte that any
connection sent before it (head-of-line queueing). What a connection sends is cut into
chunks (`Shape.chunk_size`), and for each chunk

    start     = max(arrival, the moment the transmitter is free)
    departure = start + size * 8 / rate
    due       = max(due of the connection's last chunk, departure + delay + random jitter)

Everything follows from these times and not from when the caller happens to look, so a
late wake-up of the emulator delays what it handles late and nothing after it.

Rates count the bytes of the connections' payload: no packet headers, no losses, and no
slow start or congestion control; a sender is held back by the queue limit alone.

Times are seconds on the link's own clock, which a stall stops; only `LinkClock` knows what
time it is, everything else is told `now`.
"""

import random
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

KIB = 1024
MIB = 1024 * KIB

# A chunk is what a link sends in a millisecond, within the size of an Ethernet packet and
# that of a large receive offload.
CHUNK_SECONDS = 0.001
CHUNK_MIN = 1460
CHUNK_MAX = 64 * KIB

# What one direction of one connection may have queued and in flight, as a TCP window has
# an end: enough for 2.5 GB/s at 200 ms round trip.
WINDOW = 256 * MIB

SLAB_SIZE = 1 * MIB
SPARE_SLABS = 64


@dataclass(frozen=True)
class Shape:
    """The properties of a link, the same in both directions.

    `rate` in bits per second, None for unlimited; `delay` and `jitter` in seconds, one
    way; `queue` in bytes that may wait for the transmitter, None for a second's worth and
    at least 1 MiB, more than routers commonly have.
    """

    rate: float | None = None
    delay: float = 0.0
    jitter: float = 0.0
    queue: int | None = None

    def __post_init__(self) -> None:
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate must be positive, not {self.rate}")
        if not (self.delay >= 0 and self.jitter >= 0):
            raise ValueError(f"delay {self.delay} and jitter {self.jitter} must not be negative")
        if self.queue is not None and self.queue < 1:
            raise ValueError(f"the queue must hold at least one byte, not {self.queue}")

    @property
    def chunk_size(self) -> int:
        """The most that is received at once; one recv() makes one chunk."""
        if self.rate is None:
            return SLAB_SIZE
        return int(min(max(self.rate / 8 * CHUNK_SECONDS, CHUNK_MIN), CHUNK_MAX))

    @property
    def queue_limit(self) -> int:
        if self.queue is not None:
            return self.queue
        return max(MIB, int(self.rate / 8)) if self.rate is not None else WINDOW


class LinkClock:
    """Monotonic seconds that stand still while the link is stalled."""

    def __init__(self) -> None:
        self._lost = 0.0
        self._frozen: float | None = None
        self._thaw_at: float | None = None

    def now(self) -> float:
        real = time.monotonic()
        if self._frozen is not None and self._thaw_at is not None and real >= self._thaw_at:
            self.thaw(self._thaw_at)
        return self._frozen if self._frozen is not None else real - self._lost

    @property
    def frozen(self) -> bool:
        return self._frozen is not None

    def until_thaw(self) -> float | None:
        """Seconds until the stall ends by itself; None if it does not."""
        return None if self._thaw_at is None else max(0.0, self._thaw_at - time.monotonic())

    def freeze(self, seconds: float | None) -> None:
        """Stop for `seconds`, or until thaw(); replaces a stall that is under way."""
        self._frozen = self.now()
        self._thaw_at = None if seconds is None else time.monotonic() + seconds

    def thaw(self, at: float | None = None) -> None:
        if self._frozen is not None:
            self._lost = (time.monotonic() if at is None else at) - self._frozen
            self._frozen = self._thaw_at = None


class Slab:
    """A reused receive buffer, filled from its start; chunks are views of it."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(SLAB_SIZE))
        self.used = 0
        self.chunks = 0  # those not yet delivered


class Chunk(NamedTuple):
    """Bytes on their way. `data` is empty for the end of the stream, None for a reset."""

    due: float
    data: memoryview | None
    slab: Slab | None


class Lane:
    """One direction of one connection: its chunks in flight, in order, and their memory."""

    def __init__(self, spare: list[Slab]) -> None:
        self.in_flight: deque[Chunk] = deque()
        self.buffered = 0  # bytes in the direction's queue and in flight
        self._last_due = 0.0
        self._spare = spare  # shared by the lanes of a link
        self._slab = Slab()

    def space(self, limit: int) -> memoryview:
        """Where the next at most `limit` bytes are to be received."""
        if SLAB_SIZE - self._slab.used < min(limit, CHUNK_MAX):
            full = self._slab
            self._slab = self._spare.pop() if self._spare else Slab()
            self._recycle(full)
        start = self._slab.used
        return self._slab.view[start : min(start + limit, SLAB_SIZE)]

    def received(self, length: int) -> tuple[memoryview, Slab]:
        """Claim the first `length` bytes of the last `space()`."""
        slab = self._slab
        data = slab.view[slab.used : slab.used + length]
        slab.used += length
        slab.chunks += 1
        self.buffered += length
        return data, slab

    def fly(self, due: float, data: memoryview | None, slab: Slab | None) -> None:
        self._last_due = max(due, self._last_due)
        self.in_flight.append(Chunk(self._last_due, data, slab))

    def delivered(self, length: int) -> None:
        """Forget `length` bytes at the head of what is in flight."""
        self.buffered -= length
        while length:
            chunk = self.in_flight.popleft()
            assert chunk.data and chunk.slab
            if length < len(chunk.data):
                self.in_flight.appendleft(chunk._replace(data=chunk.data[length:]))
                return
            length -= len(chunk.data)
            chunk.slab.chunks -= 1
            self._recycle(chunk.slab)

    def _recycle(self, slab: Slab) -> None:
        if slab.chunks == 0:
            slab.used = 0
            # The current slab stays: an idle lane goes on in memory that is still warm.
            if slab is not self._slab and len(self._spare) < SPARE_SLABS:
                self._spare.append(slab)


class Direction:
    """One direction of a link: the FIFO queue and the transmitter."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.queued = 0  # bytes waiting for the transmitter
        self.max_queued = 0
        self.sent = 0  # bytes transmitted since the link began
        self._free_at = 0.0
        self._waiting: deque[tuple[float, Lane, memoryview | None, Slab | None]] = deque()
        # Seeded: a run with jitter can be repeated.
        self._random = random.Random(0)

    @property
    def has_room(self) -> bool:
        return self.queued < self.shape.queue_limit

    def arrive(
        self, now: float, lane: Lane, data: memoryview | None, slab: Slab | None = None
    ) -> None:
        """Queue a chunk: received bytes, the stream's end (no bytes) or a reset (None)."""
        if data:
            self.queued += len(data)
            self.max_queued = max(self.max_queued, self.queued)
        self._waiting.append((now, lane, data, slab))
        self.advance(now)

    def advance(self, now: float) -> None:
        """Transmit every chunk whose turn has come by `now`."""
        shape = self.shape
        while self._waiting and self._free_at <= now:
            arrival, lane, data, slab = self._waiting.popleft()
            size = len(data) if data else 0
            departure = max(arrival, self._free_at)
            if shape.rate is not None:
                departure += size * 8 / shape.rate
            self._free_at = departure
            self.queued -= size
            self.sent += size
            jitter = self._random.random() * shape.jitter if shape.jitter else 0.0
            lane.fly(departure + shape.delay + jitter, data, slab)

    def next_turn(self) -> float | None:
        """When the transmitter takes the next chunk; None while the queue is empty."""
        return self._free_at if self._waiting else None

    def drop(self) -> None:
        """Lose what is queued, as a cut does."""
        self._waiting.clear()
        self.queued = 0
