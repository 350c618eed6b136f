# SPDX-License-Identifier: Apache-2.0
"""A backing whose server answers wrongly, late, or never."""

import errno

import pytest
import trio
import trio.testing

from nbdstream.backing import Priority, fingerprint, open_backing
from nbdstream.backing import connect as connect_module
from nbdstream.backing import pool as pool_module
from nbdstream.backing.identity import sample_ranges
from nbdstream.backing.pool import BULK_LEAST
from nbdstream.errors import (
    BackingGoneError,
)
from testbed.fake_nbd import Reply, data_chunk, error_chunk, fake_server
from tests.backing_support import MIB, read


async def _good(cookie: bytes, offset: int, length: int, send: Reply) -> None:
    await send(data_chunk(cookie, offset, bytes(length)))


async def test_a_reply_with_less_than_was_asked_for_is_an_error() -> None:
    async def script(number: int, cookie: bytes, offset: int, length: int, send: Reply) -> None:
        if number == 1:
            await send(data_chunk(cookie, offset, bytes(length // 2)))
        else:
            await _good(cookie, offset, length, send)

    async with fake_server(MIB, script) as uri, open_backing(uri) as backing:
        data = bytearray(b"x" * 4096)
        with trio.fail_after(10):
            await backing.read(memoryview(data), 0, Priority.DEMAND)
        assert data == bytes(4096)
        assert backing.statistics().retries == 1


async def test_nonsense_ends_the_connection_and_not_the_read() -> None:
    async def script(number: int, cookie: bytes, offset: int, length: int, send: Reply) -> None:
        if number == 1:
            await send(b"\0" * 100)
        elif number == 2:
            # More than was asked for, at the wrong place.
            await send(data_chunk(cookie, offset + 7, bytes(length + 512)))
        elif number == 3:
            await send(data_chunk(cookie, offset, bytes(length))[:-5])
            raise trio.BrokenResourceError
        elif number == 4:
            await send(error_chunk(cookie, errno.ESHUTDOWN))
        else:
            await _good(cookie, offset, length, send)

    async with fake_server(MIB, script) as uri, open_backing(uri) as backing:
        with trio.fail_after(20):
            assert await read(backing, 0, 4096) == bytes(4096)
        assert backing.statistics().retries == 4
        assert backing.statistics().reconnects >= 1


async def test_the_timeout_ends_reads_of_a_server_that_never_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It shakes hands each time, so the backing counts as connected throughout."""
    monkeypatch.setattr(pool_module, "PATIENCE_FIRST", 0.1)
    monkeypatch.setattr(pool_module, "PATIENCE_MOST", 0.1)
    monkeypatch.setattr(pool_module, "WATCH_INTERVAL", 0.02)
    monkeypatch.setattr(pool_module, "BACKOFF_FIRST", 0.01)
    monkeypatch.setattr(pool_module, "BACKOFF_MOST", 0.01)

    async def script(number: int, cookie: bytes, offset: int, length: int, send: Reply) -> None:
        pass

    async with fake_server(MIB, script) as uri, open_backing(uri, timeout=0.5) as backing:
        with (
            trio.fail_after(20),
            pytest.raises(BackingGoneError, match=r"failed for more than 0\.5 s"),
        ):
            await read(backing, 0, 4096)
        assert backing.statistics().retries >= 2


async def test_nothing_waits_for_connections_in_the_making() -> None:
    size = 2 * BULK_LEAST
    samples = sample_ranges(size)

    async def script(number: int, cookie: bytes, offset: int, length: int, send: Reply) -> None:
        # The second connection, and all after it, never gets to show what it serves.
        if number <= 2 * len(samples) or (offset, length) not in samples:
            await _good(cookie, offset, length, send)

    async with fake_server(size, script) as uri:
        async with open_backing(uri) as backing:
            identity = await fingerprint(backing)
        async with open_backing(uri, identity=identity) as backing:
            with trio.fail_after(connect_module.CONNECT_TIMEOUT / 2):
                await read(backing, 8192, 4096, Priority.STREAM)
                await read(backing, 8192, 4096, Priority.DEMAND)
            assert backing.statistics().connections == 1


async def connections_for(size: int, priority: Priority) -> int:
    """How many connections a backing of ``size`` bytes makes for two reads."""

    async def script(number: int, cookie: bytes, offset: int, length: int, send: Reply) -> None:
        await _good(cookie, offset, length, send)

    async with fake_server(size, script) as uri, open_backing(uri) as backing:
        for _ in range(2):
            await read(backing, 8192, 4096, priority)
        await trio.testing.wait_all_tasks_blocked(0.1)
        return backing.statistics().connections


async def test_bulk_connections_are_made_for_the_first_background_read() -> None:
    assert await connections_for(2 * BULK_LEAST, Priority.DEMAND) == 1
    assert await connections_for(2 * BULK_LEAST, Priority.STREAM) > 1


async def test_a_small_image_is_read_on_one_connection() -> None:
    assert await connections_for(BULK_LEAST, Priority.STREAM) == 1
