# SPDX-License-Identifier: Apache-2.0
"""Connecting: several addresses, full backlogs, and resolvers that take their time while
guests are served."""

import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from nbdstream.backing.connect import Endpoint, connect
from nbdstream.errors import BackingGoneError
from nbdstream.net.address import TcpAddress, UnixAddress, VsockAddress
from nbdstream.net.connect import MAX_LOOKUPS, lookup_limiter, open_socket
from nbdstream.net.listeners import listen_unix
from testbed.peers import temporary_directory
from tests.test_net_accept import descriptors, no_descriptors_left


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A TCP socket on 127.0.0.1 that listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def port_of(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


class Resolver:
    """Stands for getaddrinfo(3): answers "slow" only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self.answer = threading.Event()
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, host: Any, *rest: Any, **more: Any) -> Any:
        if host != "slow":
            return self._real(host, *rest, **more)
        self.asked += 1
        self.answer.wait()  # in C, without the interpreter's lock, as the real one
        raise socket.gaierror(socket.EAI_AGAIN, "try again")


# --- addresses --------------------------------------------------------------------------


async def test_a_name_is_looked_up_and_nagle_is_off(listener: socket.socket) -> None:
    with await open_socket(TcpAddress("localhost", port_of(listener))) as sock:
        assert sock.getpeername() == listener.getsockname()
        assert not sock.getblocking()
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not os.get_inheritable(sock.fileno())


async def test_no_host_is_this_host(listener: socket.socket) -> None:
    with await open_socket(TcpAddress("", port_of(listener))):
        pass


async def test_the_next_address_is_tried_when_one_refuses_or_is_silent(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    with socket.socket() as refusing, socket.socket() as full:
        refusing.bind(("127.0.0.1", 0))
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        targets = [refusing.getsockname(), full.getsockname(), listener.getsockname()]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", target) for target in targets]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: found)
        with await open_socket(TcpAddress("host", 1)) as sock:
            assert sock.getpeername() == listener.getsockname()
        assert trio.current_time() < 10
        for filler in fillers:
            filler.close()


async def test_the_first_error_is_told_when_all_addresses_fail() -> None:
    with socket.socket() as refusing:
        refusing.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            await open_socket(TcpAddress("127.0.0.1", refusing.getsockname()[1]))
    with pytest.raises(FileNotFoundError):
        await open_socket(UnixAddress("/nowhere"))
    with pytest.raises(OSError):
        await open_socket(VsockAddress(1, 1))


async def test_a_unix_socket_whose_backlog_is_full_is_waited_for() -> None:
    with temporary_directory() as directory, socket.socket(socket.AF_UNIX) as listener:
        path = str(directory / "s")
        listener.bind(path)
        listener.listen(0)
        with await open_socket(UnixAddress(path)):
            with trio.move_on_after(0.1) as waiting:
                await open_socket(UnixAddress(path))
            assert waiting.cancelled_caught
            accepted, _ = listener.accept()
            with accepted, await open_socket(UnixAddress(path)) as second:
                assert second.getpeername() == path


async def test_a_hostile_path(tmp_path: Path) -> None:
    with temporary_directory() as directory:
        listener = listen_unix(directory / "a b\n?#%")
        with await open_socket(UnixAddress(str(directory / "a b\n?#%"))):
            pass
        listener.close()


async def test_cancelled_and_failed_attempts_leave_no_descriptor(listener: socket.socket) -> None:
    address = TcpAddress("127.0.0.1", port_of(listener))
    before = descriptors()
    for _ in range(20):
        with trio.CancelScope() as scope:
            scope.cancel()
            await open_socket(address)
        with trio.move_on_after(0), pytest.raises(FileNotFoundError):
            await open_socket(UnixAddress("/nowhere"))
    assert descriptors() == before


# --- the backing's connection -----------------------------------------------------------


async def test_a_backing_without_descriptors_is_out_of_reach_for_now() -> None:
    endpoint = Endpoint("nbd://127.0.0.1:1/", "the backing")
    with no_descriptors_left(), pytest.raises(BackingGoneError, match="Too many open files"):
        await connect(endpoint)


async def test_a_slow_resolver_stops_nothing_and_takes_no_thread_from_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolver = Resolver(monkeypatch)
    failures = []

    async def attempt() -> None:
        with pytest.raises(BackingGoneError) as caught:
            await connect(Endpoint("nbd://slow/", "far"), timeout=0.1)
        failures.append(str(caught.value))

    async with trio.open_nursery() as nursery:
        for _ in range(3 * MAX_LOOKUPS):
            nursery.start_soon(attempt)
    # All were given up in time, although not a single look-up has ended.
    assert failures == ["far: no answer in 0.1 s"] * 3 * MAX_LOOKUPS
    assert resolver.asked == MAX_LOOKUPS == lookup_limiter().borrowed_tokens
    default = trio.to_thread.current_default_thread_limiter()
    assert default.borrowed_tokens == 0
    resolver.answer.set()
    with pytest.raises(BackingGoneError, match="name cannot be looked up"):
        await connect(Endpoint("nbd://slow/", "far"), timeout=20)


# A process whose resolver asks a name server that never answers, and that serves a guest
# beside it. Prints the longest time between two answers to the guest, and what became of
# the backings.
_PROGRAM = """
import socket, sys, threading, time, trio
from nbdstream.backing.connect import Endpoint, connect
from nbdstream.errors import BackingGoneError
from tests.memory_export import MemoryExport
from tests.server_support import RawClient, request, serving

silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
silent.bind(("127.0.0.1", 53))

async def main():
    worst, ended = 0.0, []
    async def attempt(uri, timeout):
        began = time.monotonic()
        try:
            await connect(Endpoint(uri, "far"), timeout)
        except BackingGoneError as error:
            ended.append((round(time.monotonic() - began, 1), str(error)))
    async with serving([MemoryExport(1 << 20)]) as (_, path):
        guest = await RawClient.connect(path)
        await guest.go(structured=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(attempt, "nbd://slow.example/", 0.3)
            nursery.start_soon(attempt, "nbds://slow.example/", 0.3)
            nursery.start_soon(attempt, "nbd://slow.example/", 60)
            nursery.start_soon(attempt, "nbds://slow.example/", 60)
            answered = time.monotonic()
            while len(ended) < 4:
                await guest.send(request(0, 0, 512))
                await guest.reply(512)
                worst = max(worst, time.monotonic() - answered)
                answered = time.monotonic()
                await trio.sleep(0.001)
        await guest.aclose()
    print(worst, *ended, sep="\\n")

trio.run(main)
"""

_NAMESPACE = """
ip link set lo up
mount --bind "$1/resolv.conf" /etc/resolv.conf
mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
exec "$2" -c "$3"
"""


def test_a_name_server_that_never_answers_stops_no_guest() -> None:
    with temporary_directory() as directory:
        (directory / "resolv.conf").write_text(
            "nameserver 127.0.0.1\noptions timeout:1 attempts:2\n"
        )
        (directory / "nsswitch.conf").write_text("hosts: dns\n")
        done = subprocess.run(
            ["unshare", "-rmn", "sh", "-ec", _NAMESPACE, "sh", directory, sys.executable, _PROGRAM],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=Path(__file__).parent.parent,
        )
        assert done.returncode == 0, done.stderr
    worst, *ended = done.stdout.splitlines()
    assert float(worst) < 0.5  # the resolver took 2 s
    assert len(ended) == 4
    assert all("no answer in 0.3 s" in line for line in ended[:2])
    assert all("resolution" in line for line in ended[2:]), ended


async def test_a_path_that_is_too_long_has_an_error_with_words(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="longer than 107 bytes") as failed:
        await open_socket(UnixAddress(str(tmp_path / ("long" * 30))))
    assert failed.value.errno == errno.ENAMETOOLONG
