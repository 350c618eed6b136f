# SPDX-License-Identifier: Apache-2.0
"""The accept loop that all servers share: too many clients, too few descriptors, bugs."""

import errno
import fcntl
import os
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from nbdstream.net.accept import Acceptor, Client
from nbdstream.net.listeners import Listener, listen_unix
from testbed.peers import temporary_directory

FULL = b"full\n"


async def echo(client: Client) -> None:
    """Serve a client by sending back what it sends, until it hangs up."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(client.socket))
    while data := await stream.receive_some():
        client.active()
        await stream.send_all(data)


@asynccontextmanager
async def accepting(
    serve: Callable[[Client], Awaitable[None]] = echo, *, limit: int = 2, grace: float = 5.0
) -> AsyncIterator[Path]:
    """An acceptor on a Unix socket, for the length of the block."""
    with temporary_directory() as directory:
        acceptor = Acceptor("guest", serve, limit=limit, grace=grace, refusal=FULL)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(acceptor.run, [listen_unix(directory / "s")], nursery)
            yield directory / "s"
            nursery.cancel_scope.cancel()


async def check(stream: trio.SocketStream) -> None:
    """The client is being served."""
    await stream.send_all(b"hello")
    assert await stream.receive_some() == b"hello"


async def rest(stream: trio.SocketStream) -> bytes:
    """What the server sends until it hangs up."""
    received = b""
    try:
        while data := await stream.receive_some():
            received += data
    except trio.BrokenResourceError:
        pass
    return received


def descriptors() -> set[int]:
    """Which this process has open."""
    return {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Within the block this process cannot open one more file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(descriptors())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    taken = []
    try:
        while True:
            try:
                taken.append(os.open(os.devnull, os.O_RDONLY))
            except OSError as error:
                assert error.errno == errno.EMFILE
                break
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


# --- too many ---------------------------------------------------------------------------


async def test_a_newcomer_gets_the_place_of_the_one_that_was_silent_the_longest(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with accepting() as path:
        first, second = [await trio.open_unix_socket(str(path)) for _ in range(2)]
        await check(first)
        await trio.sleep(3)
        await check(second)
        await trio.sleep(3)
        began = trio.current_time()
        third = await trio.open_unix_socket(str(path))
        await check(third)
        assert trio.current_time() - began < 0.1  # the first had been silent for 6 s
        assert await rest(first) == b""
        await check(second)
        for each in (first, second, third):
            await each.aclose()
    assert caplog.messages == [
        "there are 2 guests already: the one that was silent the longest is dropped"
    ]


async def test_a_newcomer_waits_until_a_client_was_silent_for_long_enough(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with accepting() as path:
        old = [await trio.open_unix_socket(str(path)) for _ in range(2)]
        for each in old:
            await check(each)
        began = trio.current_time()
        newcomer = await trio.open_unix_socket(str(path))
        await check(newcomer)
        assert trio.current_time() - began == pytest.approx(5.0, abs=0.1)
        for each in (*old, newcomer):
            await each.aclose()


async def test_a_newcomer_is_told_if_all_are_busy(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with accepting() as path, trio.open_nursery() as nursery:

        async def keep_busy() -> None:
            async with await trio.open_unix_socket(str(path)) as stream:
                while True:
                    await check(stream)
                    await trio.sleep(1)

        nursery.start_soon(keep_busy)
        nursery.start_soon(keep_busy)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(2):
            newcomer = await trio.open_unix_socket(str(path))
            assert await rest(newcomer) == FULL
            await newcomer.aclose()
        nursery.cancel_scope.cancel()
    assert caplog.messages == ["there are 2 guests already: no more are let in"]


async def test_a_newcomer_takes_a_place_that_becomes_free() -> None:
    async with accepting() as path:
        first, second = [await trio.open_unix_socket(str(path)) for _ in range(2)]
        await check(first)
        await check(second)
        async with trio.open_nursery() as nursery:
            newcomer = await trio.open_unix_socket(str(path))
            nursery.start_soon(check, newcomer)
            await trio.testing.wait_all_tasks_blocked()
            await first.aclose()
        for each in (second, newcomer):
            await each.aclose()


async def test_who_has_settled_does_not_count() -> None:
    async def serve(client: Client) -> None:
        acceptor.settle(client)
        await echo(client)

    with temporary_directory() as directory:
        acceptor = Acceptor("guest", serve, limit=1, grace=5.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(acceptor.run, [listen_unix(directory / "s")], nursery)
            streams = [await trio.open_unix_socket(str(directory / "s")) for _ in range(5)]
            for stream in streams:
                await check(stream)
            for stream in streams:
                await stream.aclose()
            nursery.cancel_scope.cancel()


# --- too little -------------------------------------------------------------------------


async def test_without_descriptors_newcomers_are_refused_and_guests_are_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with accepting(limit=8) as path:
        guest = await trio.open_unix_socket(str(path))
        await check(guest)
        newcomers = [trio.socket.socket(socket.AF_UNIX) for _ in range(5)]
        with no_descriptors_left():
            for newcomer in newcomers:
                await newcomer.connect(str(path))
                assert await newcomer.recv(100) == FULL
                assert await newcomer.recv(100) == b""
                await check(guest)
        late = await trio.open_unix_socket(str(path))
        await check(late)
        await guest.aclose()
        await late.aclose()
        for newcomer in newcomers:
            newcomer.close()
    assert caplog.messages == [
        "guests are refused for want of file descriptors: Too many open files"
    ]


@pytest.mark.parametrize("code", [errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EBADMSG])
async def test_other_shortages_are_waited_out_without_a_busy_loop(
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    accept = Listener.accept
    attempts = 0
    until = trio.current_time() + 20

    def failing(listener: Listener) -> tuple[socket.socket, str]:
        nonlocal attempts
        attempts += 1
        if trio.current_time() < until:
            raise OSError(code, os.strerror(code))
        return accept(listener)

    monkeypatch.setattr(Listener, "accept", failing)
    async with accepting() as path:
        patient = await trio.open_unix_socket(str(path))
        await check(patient)
        await patient.aclose()
    assert 10 < attempts < 1000
    assert len(caplog.messages) == 1 and os.strerror(code) in caplog.messages[0]


async def test_a_client_that_is_gone_before_it_is_accepted_is_no_trouble(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accept = Listener.accept
    failures = [ConnectionAbortedError(errno.ECONNABORTED, "gone"), BlockingIOError()]

    def failing(listener: Listener) -> tuple[socket.socket, str]:
        if failures:
            raise failures.pop()
        return accept(listener)

    monkeypatch.setattr(Listener, "accept", failing)
    async with accepting() as path:
        client = await trio.open_unix_socket(str(path))
        await check(client)
        await client.aclose()
    assert not failures and not caplog.messages


# --- bugs -------------------------------------------------------------------------------


async def _plain_bug(_client: Client) -> None:
    raise ZeroDivisionError("oops")


async def _bugs_in_a_nursery(_client: Client) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_plain_bug, _client)
        nursery.start_soon(_plain_bug, _client)
        await trio.sleep_forever()


@pytest.mark.parametrize("serve", [_plain_bug, _bugs_in_a_nursery])
async def test_a_bug_ends_the_connection_and_nothing_else(
    serve: Callable[[Client], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    async def first_fails(client: Client) -> None:
        await (serve if client.peer.startswith("1 ") else echo)(client)

    async with accepting(first_fails) as path:
        unlucky = await trio.open_unix_socket(str(path))
        assert await rest(unlucky) == b""
        lucky = await trio.open_unix_socket(str(path))
        await check(lucky)
        await unlucky.aclose()
        await lucky.aclose()
    [record] = caplog.records
    assert record.levelname == "ERROR" and record.exc_info is not None
    assert "guest 1 (unix): unexpected error" in record.getMessage()


async def test_a_bug_beside_a_cancellation_does_not_get_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A task that fails while everything is being cancelled."""
    started = trio.Event()

    async def fails_when_cancelled(_client: Client) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            started.set()
            try:
                await trio.sleep_forever()
            finally:
                raise ZeroDivisionError("oops")

    async with accepting(fails_when_cancelled) as path:
        client = await trio.open_unix_socket(str(path))
        await started.wait()
        await client.aclose()
    assert len(caplog.records) == 1


async def test_descriptors_are_closed_and_not_inherited() -> None:
    before = descriptors()

    async def serve(client: Client) -> None:
        assert fcntl.fcntl(client.socket, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        await echo(client)

    async with accepting(serve, limit=200) as path:
        for _ in range(20):
            client = await trio.open_unix_socket(str(path))
            await check(client)
            await client.aclose()
    assert descriptors() == before
