# SPDX-License-Identifier: Apache-2.0
"""The memory that waiting requests of all clients may hold together."""

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.server import server as server_module
from nbdstream.server.constants import Command
from nbdstream.server.contexts import CONTEXTS
from nbdstream.server.handshake import Agreement
from nbdstream.server.payloads import RESERVE, PayloadRoom, Share
from nbdstream.server.traffic import Traffic
from nbdstream.server.transmission import Transmission
from tests.memory_export import MemoryExport
from tests.server_support import READ, WRITE, RawClient, clients_gone, request, serving
from tests.transmission_support import feed

MIB = 1 << 20
SHARED = 4 * MIB
SIZE = 16 * MIB


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-4, 4)), max_size=60))
def test_what_clients_hold_is_bounded_and_given_back(steps: list[tuple[int, int]]) -> None:
    room = PayloadRoom(SHARED)
    shares = [Share(room) for _ in range(4)]
    for who, units in steps:
        share, length = shares[who], abs(units) * RESERVE // 2
        if units < 0:
            share.give_back(min(length, share.held))
        else:
            within_reserve = share.held + length <= RESERVE
            fitted, held = share.fits(length), share.held
            assert share.take(length) == fitted
            assert share.held == held + (length if fitted else 0)
            assert fitted or not within_reserve
        assert sum(max(0, each.held - RESERVE) for each in shares) == SHARED - room.left <= SHARED
    for share in shares:
        share.close()
    assert room.left == SHARED


def test_a_request_that_finds_no_room_waits_until_there_is() -> None:
    disk = MemoryExport(SIZE)
    disk.misses = True
    room = PayloadRoom(SHARED)
    hog = Share(room)
    assert hog.take(SHARED + RESERVE)
    session = Transmission(Agreement(disk, False, ()), Share(room), Traffic())
    # What is longer than a client's reserve waits; nothing behind it is looked at.
    feed(session, request(READ, 0, 2 * MIB) + request(READ, 0, 512))
    assert (session.slow, session.saturated, session.crowded_out) == ([], True, True)
    hog.give_back(2 * MIB)
    assert not session.saturated
    assert session.process()
    assert [slow.request.length for slow in session.slow] == [2 * MIB, 512]


def test_replies_to_block_status_count() -> None:
    disk = MemoryExport(SIZE)
    share = Share(PayloadRoom(SHARED))
    session = Transmission(Agreement(disk, True, CONTEXTS[:2]), share, Traffic())
    feed(session, request(Command.BLOCK_STATUS, 0, MIB))
    assert share.held == 2 * 4096 * 8
    session.finished(session.slow[0])
    assert share.held == 0


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> PayloadRoom:
    """A server's room for payloads, and not much of it."""
    room = PayloadRoom(SHARED)
    monkeypatch.setattr(server_module, "PayloadRoom", lambda: room)
    return room


async def test_a_guest_is_served_while_others_hold_all_the_memory(
    little_room: PayloadRoom,
) -> None:
    disk = MemoryExport(SIZE)
    disk.misses = True
    disk.gate = trio.Event()
    async with serving([disk]) as (server, path), trio.open_nursery() as nursery:
        hog, guest = await RawClient.connect(path), await RawClient.connect(path)
        await hog.go(structured=False)
        await hog.send(request(READ, 0, MIB) * 20)
        asked = (SHARED + RESERVE) // MIB
        while len(disk.calls) < asked:
            await trio.lowlevel.checkpoint()
        assert little_room.left == 0
        # A guest's request of usual size waits for the disk, and not for memory.
        await guest.go()
        await guest.send(request(READ, 512, MIB))
        while len(disk.calls) == asked:
            await trio.lowlevel.checkpoint()
        # A longer one comes when there is room: here, because the hog goes.
        nursery.start_soon(guest.send, request(WRITE, 4 * MIB, 2 * MIB, cookie=2) + bytes(2 * MIB))
        await hog.aclose()
        while len(disk.calls) == asked + 1:
            await trio.lowlevel.checkpoint()
        disk.gate.set()
        replies = {cookie: data for cookie, _, data in [await guest.reply() for _ in range(2)]}
        assert replies == {1: (512).to_bytes(8, "big") + disk.data[512 : 512 + MIB], 2: b""}
        await guest.aclose()
        await clients_gone(server)
    assert little_room.left == SHARED


@pytest.mark.parametrize("end", ["client", "server"])
async def test_all_of_it_is_given_back_when_a_connection_ends(
    little_room: PayloadRoom, end: str
) -> None:
    """In the middle of a payload, and while a request waits for room."""
    disk = MemoryExport(SIZE)
    disk.misses = True
    disk.gate = trio.Event()
    async with serving([disk]) as (server, path):
        hog, waiting = await RawClient.connect(path), await RawClient.connect(path)
        await hog.go(structured=False)
        await hog.send(request(READ, 0, MIB) * 3 + request(WRITE, 0, 2 * MIB) + bytes(MIB))
        while little_room.left:
            await trio.lowlevel.checkpoint()
        await waiting.go(structured=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiting.send, request(WRITE, 0, 2 * MIB) + bytes(2 * MIB))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        if end == "server":
            server.stop()
        await hog.aclose()
        await waiting.aclose()
        disk.gate.set()
        with trio.fail_after(20):
            await clients_gone(server)
    assert little_room.left == SHARED
