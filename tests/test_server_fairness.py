# SPDX-License-Identifier: Apache-2.0
"""No client keeps the event loop to itself: what a flood does in one turn is bounded."""

import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from nbdstream.export import Hit, StatusExtent
from nbdstream.server import execute as execute_module
from nbdstream.server import transmission as transmission_module
from nbdstream.server.constants import Command, Option
from nbdstream.server.contexts import CONTEXTS, Descriptors
from nbdstream.server.handshake import Agreement, Handshake
from nbdstream.server.payloads import PayloadRoom, Share
from nbdstream.server.replies import MAX_DESCRIPTORS
from nbdstream.server.traffic import Traffic
from nbdstream.server.transmission import BUDGET, COST_OF_OTHERS, Transmission
from tests.memory_export import MemoryExport
from tests.server_support import READ, WRITE, RawClient, info_data, option, request, serving

SIZE = 64 << 20


class CountingExport(MemoryExport):
    """Counts what the hot path was asked for, and how much was looked at in one go."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.hits = 0
        self.looked_at: list[int] = []

    def write_nowait(self, view: memoryview, offset: int) -> Hit:
        self.hits += 1
        return super().write_nowait(view, offset)

    def read_nowait(self, view: memoryview, offset: int) -> Hit:
        self.hits += 1
        return super().read_nowait(view, offset)

    async def block_status(self, offset: int, length: int, limit: int) -> list[StatusExtent]:
        await self._asked("block_status", offset, length)
        length = min(length, limit * self.granularity)
        extents = self._extents(offset, length)
        self.looked_at.append(len(extents))
        return extents


@pytest.mark.parametrize(
    ("message", "hit"),
    [
        (request(READ, 1, 1), True),
        (request(WRITE, 1, 1) + b"x", True),
        (request(READ, 0, 0), False),  # refused
        (request(Command.TRIM, 0, 1), False),  # set aside
        (request(WRITE, SIZE, 1) + b"x", False),  # refused, with a payload
    ],
    ids=["read", "write", "refused", "slow", "skipped"],
)
def test_one_turn_takes_a_bounded_number_of_requests(message: bytes, hit: bool) -> None:
    export = CountingExport(SIZE)
    session = Transmission(Agreement(export, True, ()), Share(PayloadRoom()), Traffic())
    flood = message * (8 * BUDGET)
    room = session.room()
    room[: len(flood)] = flood
    session.received(len(flood))
    assert not session.process()  # there is more to do
    if hit:
        assert export.hits == BUDGET
    else:
        replies = len(session.slow) or bytes(session.take_replies()).count(b"\x66\x8e\x33\xef")
        assert replies == BUDGET // COST_OF_OTHERS


def test_hits_and_others_by_turns_share_the_budget() -> None:
    export = CountingExport(SIZE)
    session = Transmission(Agreement(export, True, ()), Share(PayloadRoom()), Traffic())
    flood = (request(READ, 1, 1) + request(Command.FLUSH)) * BUDGET
    room = session.room()
    room[: len(flood)] = flood
    session.received(len(flood))
    assert not session.process()
    assert export.hits == pytest.approx(BUDGET / (COST_OF_OTHERS + 1), abs=2)


@asynccontextmanager
async def flooded(export: MemoryExport, flood: bytes) -> AsyncIterator[RawClient]:
    """A client that is served, beside one that sends a flood and reads all replies."""
    async with serving([export]) as (_, path):
        guest, rude = await RawClient.connect(path), await RawClient.connect(path)
        await guest.go(structured=False)
        await rude.go(contexts=[context.name.encode() for context in CONTEXTS])
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                while True:
                    await rude.send(flood)

            async def receive() -> None:
                while await rude.stream.receive_some():
                    pass

            nursery.start_soon(send)
            nursery.start_soon(receive)
            yield guest
            nursery.cancel_scope.cancel()
        await guest.aclose()
        await rude.aclose()


@pytest.mark.parametrize(
    "flood",
    [
        request(READ, 1, 1) * 4000,
        (request(WRITE, 1, 1) + b"x") * 4000,
        request(READ, 0, 0) * 2000,
        request(READ, 0, 1 << 20) * 50,
    ],
    ids=["reads", "writes", "refused", "large"],
)
async def test_a_guest_gets_its_turn_beside_a_flood(
    flood: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a guest's request and its reply the flood has a bounded number of turns."""
    export = CountingExport(SIZE)
    turns = 0
    process = Transmission.process

    def counted(session: Transmission) -> bool:
        nonlocal turns
        turns += 1
        return process(session)

    monkeypatch.setattr(Transmission, "process", counted)
    # Each turn ends after its first call, however fast this machine is.
    monkeypatch.setattr("nbdstream.server.connection.TURN", 0.0)
    async with flooded(export, flood) as guest:
        worst = 0
        for _ in range(50):
            before = turns
            await guest.send(request(READ, 1000, 100))
            await guest.reply(100)
            worst = max(worst, turns - before)
    assert worst <= 16


async def test_block_status_looks_at_a_disk_in_pieces() -> None:
    export = CountingExport(SIZE)
    async with serving([export]) as (_, path):
        each = await RawClient.connect(path)
        await each.go(contexts=[context.name.encode() for context in CONTEXTS])
        await each.send(request(Command.BLOCK_STATUS, 0, SIZE))
        for context in CONTEXTS:
            _, kind, data = await each.reply()
            assert kind == 5 and int.from_bytes(data[:4], "big") == context.id
            lengths = [int.from_bytes(data[i : i + 4], "big") for i in range(4, len(data), 8)]
            assert sum(lengths) == MAX_DESCRIPTORS * export.granularity
        await each.aclose()
    assert len(export.looked_at) == 16 and max(export.looked_at) == 256


async def test_few_extents_end_a_reply_to_block_status() -> None:
    """What the export itself cut short (a slow backing, say) is not asked for again."""

    class Short(CountingExport):
        async def block_status(self, offset: int, length: int, limit: int) -> list[StatusExtent]:
            return await super().block_status(offset, min(length, 3 * self.granularity), limit)

    export = Short(SIZE)
    async with serving([export]) as (_, path):
        each = await RawClient.connect(path)
        await each.go(contexts=[b"nbdstream:local"])
        await each.send(request(Command.BLOCK_STATUS, 0, SIZE))
        _, _, data = await each.reply()
        assert len(data) == 4 + 3 * 8
        await each.aclose()
    assert export.looked_at == [3]


def test_descriptors_are_the_same_however_the_extents_come() -> None:
    disk = MemoryExport(1 << 20)
    disk.data[1 << 18 : 1 << 19] = bytes(1 << 18)
    extents = disk._extents(0, 1 << 20)
    for context in CONTEXTS:
        for limit in (1, 2, 7, 1000):
            whole = Descriptors(context, limit)
            whole.add(extents)
            for piece in (1, 3, 64):
                parts = Descriptors(context, limit)
                for start in range(0, len(extents), piece):
                    parts.add(extents[start : start + piece])
                assert parts.encode() == whole.encode()
            assert len(whole.encode()) <= 8 * limit


def test_the_budget_is_for_floods_and_not_for_guests() -> None:
    # QEMU has 16 requests in flight, the Linux client 128: one turn takes them all.
    assert BUDGET > 128
    assert transmission_module.MAX_SLOW_REQUESTS > 128
    assert execute_module._EXTENTS_AT_ONCE * 16 == MAX_DESCRIPTORS


async def test_a_crowd_of_newcomers_takes_one_step_of_a_handshake_in_a_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many have something to say, the clients that are served come between."""
    turn = 0
    steps: Counter[int] = Counter()
    receive = Handshake.receive

    def counted(handshake: Handshake, data: bytes) -> bytes:
        steps[turn] += 1
        return receive(handshake, data)

    monkeypatch.setattr(Handshake, "receive", counted)

    async def count_turns() -> None:
        nonlocal turn
        while True:
            await trio.lowlevel.checkpoint()
            turn += 1

    async with serving([MemoryExport(SIZE)]) as (server, path):
        newcomers = [await RawClient.connect(path) for _ in range(40)]
        while server.clients < len(newcomers):
            await trio.lowlevel.checkpoint()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(count_turns)
            hello = (3).to_bytes(4, "big") + option(Option.GO, info_data(b""))
            for each in newcomers:  # all in one turn of ours
                assert os.write(each.stream.socket.fileno(), hello) == len(hello)
            for each in newcomers:
                await each.take(100)
            nursery.cancel_scope.cancel()
        for each in newcomers:
            await each.aclose()
    assert steps.total() >= len(newcomers)
    assert max(steps.values()) <= 2
