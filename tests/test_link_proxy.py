# SPDX-License-Identifier: Apache-2.0
"""The link emulator between real sockets.

Real time is bounded strictly from below (nothing may be early) and generously from above,
and where a rate is measured, the best of a few attempts counts: a busy machine makes
things late and never early.
"""

import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.link.control import (
    Address,
    link_process,
)
from testbed.link.model import Shape
from testbed.link.proxy import Link
from testbed.peers import temporary_directory
from testbed.processes import python_environment
from tests.link_echo import PATIENCE, Echo, TcpServer, UnixServer, connect, connected, ping, receive

MEGABIT = 1e6
COMMAND = [sys.executable, "-m", "testbed.link"]


def test_delay_is_added_in_each_direction(listen: str, echo: str) -> None:
    with Link(listen, echo, Shape(delay=0.02)) as link, connected(link) as (sock,):
        times = [ping(sock) for _ in range(15)]
    assert min(times) >= 0.04
    assert statistics.median(times) < 0.04 + 0.01


def test_a_connection_takes_a_handshake_to_open(listen: str, echo: str) -> None:
    with Link(listen, echo, Shape(delay=0.02)) as link, connect(link) as sock:
        assert ping(sock) >= 0.08


def test_rate_is_kept(listen: str, echo: str) -> None:
    size, rate = 625_000, 20 * MEGABIT
    expected = size * 8 / rate
    errors = []
    with Link(listen, echo, Shape(rate=rate)) as link, connected(link) as (sock,):
        for _ in range(3):
            start = time.monotonic()
            sender = threading.Thread(target=sock.sendall, args=(bytes(size),))
            sender.start()
            receive(sock, size)
            took = time.monotonic() - start
            sender.join()
            # Up and down overlap but for one chunk.
            assert took >= expected
            errors.append(took / expected - 1)
    assert min(errors) < 0.05, errors


def test_a_small_request_waits_behind_the_bulk_of_another_connection(
    listen: str, echo: str
) -> None:
    size, rate = 250_000, 10 * MEGABIT
    with Link(listen, echo, Shape(rate=rate)) as link, connected(link, 2) as (bulk, demand):
        idle = min(ping(demand) for _ in range(5))
        sender = threading.Thread(target=bulk.sendall, args=(bytes(size),))
        sender.start()
        while link.stats()["up"]["queued"] < 0.9 * size:
            time.sleep(0.001)
        waiting = link.stats()["up"]["queued"] * 8 / rate
        loaded = ping(demand)
        # Some of it left between the look and the ping.
        assert loaded > 0.5 * waiting
        assert loaded > 5 * idle
        assert len(receive(bulk, size)) == size
        sender.join()


def test_a_full_queue_holds_the_sender_back(listen: str, echo: str) -> None:
    shape = Shape(rate=1 * MEGABIT, queue=32 * 1024)
    with Link(listen, echo, shape) as link, connect(link) as sock:
        sock.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 16 << 20:
                sent += sock.send(bytes(65536))
        assert sent < 16 << 20
        while link.stats()["up"]["max_queued"] < 32 * 1024:
            time.sleep(0.001)
        assert link.stats()["up"]["max_queued"] <= 32 * 1024 + shape.chunk_size


def test_bytes_survive_any_chunking(listen: str, echo: str) -> None:
    """Several connections at once, random pieces, the shape changing under way."""

    def converse(sock: socket.socket, seed: int) -> None:
        numbers = random.Random(seed)
        data = numbers.randbytes(600_000)

        def feed() -> None:
            start = 0
            while start < len(data):
                end = start + numbers.choice((1, 28, 4096, 50_000, 300_000))
                sock.sendall(data[start:end])
                start = end
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=feed)
        sender.start()
        got = bytearray()
        while piece := sock.recv(numbers.choice((100, 5000, 1 << 20))):
            got += piece
        sender.join()
        same.append(got == data)

    same: list[bool] = []
    with Link(listen, echo, Shape(delay=0.002, jitter=0.003)) as link:
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(connect(link)) for _ in range(4)]
            threads = [
                threading.Thread(target=converse, args=(sock, seed))
                for seed, sock in enumerate(socks)
            ]
            for thread in threads:
                thread.start()
            link.set(Shape(rate=400 * MEGABIT, delay=0.001, queue=20_000))
            link.set(Shape(delay=0.001))
            for thread in threads:
                thread.join()
        assert same == [True] * 4
        assert link.stats()["up"]["bytes"] == link.stats()["down"]["bytes"] == 4 * 600_000


def test_a_stall_freezes_and_goes_on(listen: str, echo: str) -> None:
    with Link(listen, echo, Shape(delay=0.005)) as link, connected(link) as (sock,):
        link.stall()
        sock.sendall(b"held")
        sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            sock.recv(4)
        sock.settimeout(PATIENCE)
        link.resume()
        assert receive(sock, 4) == b"held"
        link.stall(0.1)
        assert ping(sock) >= 0.1


def test_a_cut_resets_and_refuses(listen: str, echo: str) -> None:
    with Link(listen, echo, Shape(delay=0.005)) as link:
        with connected(link, 2) as (first, second):
            address = link.address
            link.cut("reset")
            for sock in (first, second):
                if not address.path:
                    with pytest.raises(ConnectionResetError):
                        sock.recv(1)
                else:  # a unix socket knows no reset: it ends
                    assert sock.recv(1) == b""
            with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
                connect(link)
        link.restore()
        assert link.address == address
        with connected(link):
            pass


def test_a_black_hole_swallows_and_forgets(listen: str, echo: str) -> None:
    with Link(listen, echo, Shape()) as link, connected(link) as (old,):
        link.cut("blackhole")
        old.sendall(b"lost")
        with connect(link) as waiting:
            waiting.sendall(b"late")
            old.settimeout(0.05)
            with pytest.raises(TimeoutError):
                old.recv(1)
            link.restore()
            assert receive(waiting, 4) == b"late"
        with connected(link):
            pass
        with pytest.raises(TimeoutError):
            old.recv(1)


@pytest.mark.parametrize("modes", [("reset", "blackhole"), ("blackhole", "reset")])
def test_one_cut_may_follow_another(listen: str, echo: str, modes: tuple[str, str]) -> None:
    with Link(listen, echo, Shape()) as link:
        for mode in modes:
            link.command(f"cut {mode}")
        link.restore()
        link.restore()
        with connected(link):
            pass


def test_an_unreachable_target_ends_the_connection(listen: str, directory: Path) -> None:
    with Link(listen, f"unix:{directory}/absent", Shape()) as link:
        try:
            with connect(link) as sock:
                assert sock.recv(1) == b""
        except ConnectionResetError:
            pass  # what TCP makes of it, during connect() even


def test_a_target_that_dies_reaches_the_client(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/target")
        listener.listen()
        with Link(f"unix:{directory}/link", f"unix:{directory}/target", Shape()) as link:
            with connect(link) as sock:
                served, _ = listener.accept()
                served.sendall(b"last words")
                served.close()
                assert receive(sock, 10) == b"last words"
                assert sock.recv(1) == b""


@pytest.fixture
def directory() -> Iterator[Path]:
    with temporary_directory() as path:
        yield path


@pytest.fixture(params=["unix", "tcp"])
def listen(request: pytest.FixtureRequest, directory: Path) -> str:
    """Where the link listens: both kinds of socket are tested."""
    return f"unix:{directory}/link" if request.param == "unix" else "127.0.0.1:0"


@pytest.fixture
def echo(listen: str, directory: Path) -> Iterator[str]:
    """An echo server behind the link, on the same kind of socket."""
    server: TcpServer | UnixServer
    if listen.startswith("unix:"):
        server = UnixServer(f"{directory}/echo", Echo)
    else:
        server = TcpServer(("127.0.0.1", 0), Echo)
    # The poll interval is how long shutdown() takes.
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield str(Address.of(server.socket))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_steering_a_process_is_the_same(listen: str, echo: str) -> None:
    with link_process(listen, echo, Shape(delay=0.01)) as link:
        with connected(link) as (sock,):
            assert ping(sock) >= 0.02
            link.set(Shape(delay=0.03))
            assert ping(sock) >= 0.06
            assert link.stats()["up"]["bytes"] == 3
        with pytest.raises(ValueError, match="no such command"):
            link.command("fly")
        assert link.processor_seconds() > 0


def test_the_command_takes_orders_on_its_control_socket(
    listen: str, echo: str, directory: Path
) -> None:
    control = directory / "control"
    options = ["--rate", "100M", "--delay", "15ms", "--control", str(control)]
    process = subprocess.Popen(
        [*COMMAND, "--listen", listen, "--to", echo, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=python_environment(),
    )
    try:
        assert process.stdout
        address = Address.parse(process.stdout.readline().strip())
        with address.connect(PATIENCE) as sock:
            ping(sock)
            assert ping(sock) >= 0.03
        with Address(path=str(control)).connect(PATIENCE) as steering:
            with steering.makefile("rw") as lines:
                lines.write("stats\nset rate=broken\nquit\n")
                lines.flush()
                replies = [json.loads(lines.readline()) for _ in range(3)]
        assert replies[0]["shape"]["rate"] == 100 * MEGABIT
        assert "broken" in replies[1]["error"]
        assert replies[2] == {}
        assert process.wait(PATIENCE) == 0
        assert not control.exists()
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
