# SPDX-License-Identifier: Apache-2.0
"""The client's side of NBD: a backing whose server lies (`fuzz.nbd_liar`).

A read returns what the server sent for those offsets, or raises a BackingError; block status
stays within what was asked for; nothing waits beyond its timeouts.
"""

import random
from collections.abc import Iterator

import trio
from trio.testing import MockClock

from fuzz.export import pattern
from fuzz.files import scratch
from fuzz.nbd_liar import Liar
from fuzz.source import Source
from fuzz.target import Target
from nbdstream.backing.base import Priority
from nbdstream.backing.connect import Endpoint, connect
from nbdstream.backing.identity import fingerprint
from nbdstream.backing.nbd import NbdBacking, open_nbd
from nbdstream.errors import BackingError
from nbdstream.net.address import NbdUri, UnixAddress

SIZE = 300_000
# Of the virtual clock. The first is the backing's own; it starts again with each failure.
TIMEOUT = 10.0
SECONDS = 300.0


def run(data: bytes) -> object:
    clock = MockClock(autojump_threshold=0.02)
    return trio.run(_talk, Source(data), clock=clock)


async def _talk(source: Source) -> object:
    path = scratch("liar")
    steps = source.take(8)
    liar = Liar(source, SIZE)
    name = str(NbdUri(UnixAddress(str(path)), "disk"))
    endpoint = Endpoint(name, name, bulk_connections=1)
    outcome: object = "read"
    async with trio.open_nursery() as nursery:
        await nursery.start(liar.listen, path)
        try:
            with trio.fail_after(SECONDS):
                first = await connect(endpoint, timeout=TIMEOUT)
                async with open_nbd(
                    endpoint, first, timeout=TIMEOUT, size=SIZE, identity=""
                ) as backing:
                    for step in steps:
                        await _step(backing, liar, step)
        except BackingError as error:
            assert str(error)
            outcome = type(error).__name__
        nursery.cancel_scope.cancel()
    return outcome


async def _step(backing: NbdBacking, liar: Liar, step: int) -> None:
    offset = step * 1171
    length = min(1 + (step % 7) * 30_000, SIZE - offset)
    if step % 5 == 4:
        found = await backing.extents(offset, length)
        at = offset
        assert found
        for extent in found:
            assert extent.offset == at and extent.length > 0
            at = extent.end
        assert at <= offset + length
        backing.known_zero(offset, length)
        return
    if step % 11 == 7:
        await fingerprint(backing)
        return
    view = memoryview(bytearray(b"\xee" * length))
    await backing.read(view, offset, Priority.DEMAND if step & 1 else Priority.STREAM)
    wanted = pattern(offset, length)
    if view == wanted:
        return
    for at, (got, right) in enumerate(zip(view, wanted, strict=True), start=offset):
        hole = any(start <= at < start + size for start, size in liar.holes)
        assert got == right or (hole and got == 0), f"wrong data at {at}: {got:#x}"


def seeds() -> Iterator[bytes]:
    steps = bytes([3, 4, 9, 17, 20, 7, 100, 206])
    yield steps
    for lie in range(160, 176):
        for before in (0, 1, 2, 3, 4, 8, 10, 12, 14, 16, 20):
            yield steps + bytes(before) + bytes([lie, 1, 7, 200, 9, 0, 0, lie, 3])
    chance = random.Random(1)
    for _ in range(20):
        yield steps + bytes(chance.choice((0, 0, 0, chance.randrange(256))) for _ in range(60))


TARGET = Target(
    "backing",
    run,
    (),
    seeds,
    seconds=20.0,
    memory=64 << 20,
    longest=256,
    examples=25,
    deterministic=False,  # sockets
)
