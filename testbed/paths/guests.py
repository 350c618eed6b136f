# SPDX-License-Identifier: Apache-2.0
"""Guests: who reads what and when, as far as it misses.

Lengths are those of demand reads as they reach the backing: whole clusters, and no more
than 1 MiB each, so that a guest's read of 4 MiB is four of them.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from testbed.paths.client import Client, Read
from testbed.paths.events import Events

CLUSTER = 64 << 10
FETCH_MOST = 1 << 20
# Guests read in this part of the image, which the stream does not reach.
FAR = 1 << 40
FAR_SIZE = 64 << 30


def _random_offset(rng: random.Random, length: int) -> int:
    return FAR + rng.randrange(FAR_SIZE // length) * length


@dataclass(frozen=True)
class Request:
    """Bytes that a guest asks for, and how long after the request before, or, if
    ``waits``, after the answer to that."""

    pause: float
    offset: int
    length: int
    waits: bool = False


def small_random(rng: random.Random) -> Iterator[Request]:
    """20 reads a second, each in one cluster."""
    while True:
        yield Request(rng.expovariate(20), _random_offset(rng, CLUSTER), CLUSTER)


def random_512k(rng: random.Random) -> Iterator[Request]:
    """512 KiB, five times a second."""
    while True:
        yield Request(rng.expovariate(5), _random_offset(rng, 512 << 10), 512 << 10)


def random_4m(rng: random.Random) -> Iterator[Request]:
    """4 MiB, once in two seconds."""
    while True:
        yield Request(rng.expovariate(0.5), _random_offset(rng, 4 << 20), 4 << 20)


def sequential(rng: random.Random) -> Iterator[Request]:
    """128 KiB after 128 KiB, with a little thought in between."""
    offset = FAR
    while True:
        yield Request(rng.expovariate(100), offset, 128 << 10, waits=True)
        offset += 128 << 10


def bursts(rng: random.Random) -> Iterator[Request]:
    """Sixteen clusters at once, then nothing for a second or two."""
    while True:
        yield Request(rng.uniform(1, 3), _random_offset(rng, CLUSTER), CLUSTER)
        for _ in range(15):
            yield Request(0, _random_offset(rng, CLUSTER), CLUSTER)


def mixed_writes(rng: random.Random) -> Iterator[Request]:
    """Reads, and writes of parts of blocks, which fetch a block of 4 KiB first: 50 a second."""
    while True:
        length = 4096 if rng.random() < 0.5 else CLUSTER
        yield Request(rng.expovariate(50), _random_offset(rng, length), length)


def boot(rng: random.Random) -> Iterator[Request]:
    """Reads that wait for each other, of many sizes, in spells of work and of thought."""
    while True:
        for _ in range(rng.randrange(5, 60)):
            length = CLUSTER * rng.choice([1, 1, 1, 2, 2, 4, 8])
            yield Request(rng.expovariate(200), _random_offset(rng, length), length, waits=True)
        yield Request(rng.uniform(0.2, 2), _random_offset(rng, CLUSTER), CLUSTER, waits=True)


GUESTS: dict[str, Callable[[random.Random], Iterator[Request]]] = {
    "small random": small_random,
    "512 KiB random": random_512k,
    "4 MiB random": random_4m,
    "sequential": sequential,
    "bursts": bursts,
    "mixed writes": mixed_writes,
    "boot": boot,
}
# A guest that asks for more than it is given stops at so many reads at a time.
OUTSTANDING_MOST = 64


class Guest:
    """Makes a guest's requests on a client.

    Attributes:
        latencies: (began, seconds) of each request that was answered in full.
    """

    def __init__(self, events: Events, client: Client, kind: str, rng: random.Random) -> None:
        self.latencies: list[tuple[float, float]] = []
        self._events, self._client = events, client
        self._requests = GUESTS[kind](rng)
        self._parts: dict[Read, tuple[float, list[int]]] = {}
        self._next: Request | None = None
        client.on_answer = self._answered  # type: ignore[method-assign]

    def start(self) -> None:
        """Make the first request after its pause."""
        self._prepare()

    def _prepare(self) -> None:
        self._next = next(self._requests)
        if not (self._next.waits and self._parts):
            self._events.at(self._events.now + self._next.pause, self._ask, self._next)

    def _ask(self, request: Request) -> None:
        self._next = None
        if len(self._parts) < OUTSTANDING_MOST:
            began, left = self._events.now, [0]
            for offset in range(request.offset, request.offset + request.length, FETCH_MOST):
                length = min(FETCH_MOST, request.offset + request.length - offset)
                left[0] += 1
                self._parts[self._client.read(offset, length)] = (began, left)
        self._prepare()

    def _answered(self, read: Read) -> None:
        if not read.demand:
            return
        began, left = self._parts.pop(read)
        left[0] -= 1
        if left[0] == 0:
            self.latencies.append((began, self._events.now - began))
        if self._next is not None and self._next.waits and not self._parts:
            self._events.at(self._events.now + self._next.pause, self._ask, self._next)
