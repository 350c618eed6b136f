# SPDX-License-Identifier: Apache-2.0
"""The wire between two namespaces: real TCP through one queue, at the rate and delay asked for."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import wire
from benchmarks.link_model import Shape
from wire import THERE, Wire

RATE, DELAY = 40e6, 0.010
PORTS = 4444, 10809
SIZE = 2 << 20

# Takes all that comes on each connection, and answers with one byte at its end.
SINK = """
import socket, sys, threading
def serve(listener):
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=drain, args=(connection,)).start()
def drain(connection):
    while connection.recv(1 << 16): pass
    connection.sendall(b".")
    connection.close()
listeners = [socket.create_server((sys.argv[1], int(port))) for port in sys.argv[2:]]
for listener in listeners:
    threading.Thread(target=serve, args=(listener,)).start()
print("ready", flush=True)
"""


@pytest.fixture
def joined() -> Iterator[Wire]:
    """A wire with a sink on each port at its far end."""
    if why := wire.missing():
        pytest.skip(f"no namespaces: {why}")
    with wire.wire(Shape(rate=RATE, delay=DELAY)) as made:
        command = [*made.prefix, sys.executable, "-c", SINK, THERE, *map(str, PORTS)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as sink:
            assert sink.stdout and sink.stdout.readline() == b"ready\n"
            yield made
            sink.kill()


def begin(port: int, size: int = SIZE) -> socket.socket:
    """Send so much to a port without waiting for its end."""
    connection = socket.create_connection((THERE, port), timeout=30)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size * 2)
    connection.sendall(bytes(size))
    connection.shutdown(socket.SHUT_WR)
    return connection


def end(connection: socket.socket) -> None:
    with connection:
        assert connection.recv(1) == b"."


def test_a_handshake_takes_the_round_trip(joined: Wire) -> None:
    began = time.monotonic()
    socket.create_connection((THERE, PORTS[0]), timeout=30).close()
    assert time.monotonic() - began >= 2 * DELAY


def test_connections_share_the_rate_and_are_counted_apart(joined: Wire) -> None:
    began = time.monotonic()
    both = begin(PORTS[0]), begin(PORTS[1], SIZE // 2)
    for connection in both:
        end(connection)
    took = time.monotonic() - began
    assert took >= 1.5 * SIZE * 8 / RATE
    for port, size in zip(PORTS, (SIZE, SIZE // 2), strict=True):
        # And one byte back; TCP may send a little again.
        assert size + 1 <= joined.moved(port) < 1.2 * size


def test_the_namespaces_are_gone_afterwards_and_this_thread_is_back() -> None:
    if why := wire.missing():
        pytest.skip(f"no namespaces: {why}")
    own = Path("/proc/thread-self/ns/net")
    before = own.readlink()
    with wire.wire(Shape(rate=RATE, delay=DELAY)) as made:
        assert own.readlink() != before
    assert own.readlink() == before
    left = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True)
    assert made.here not in left.stdout and made.there not in left.stdout


def test_payload_is_tcps_alone() -> None:
    tcp = bytes.fromhex("0050 1f90 00000000 00000000 5010 0000 0000 0000") + b"data"
    ip = bytes.fromhex("4500 002c 0000 0000 40 06 0000 0a000001 0a000002")
    assert wire.payload(ip + tcp) == {80: 4, 8080: 4}
    assert wire.payload(ip.replace(b"\x40\x06", b"\x40\x11") + tcp) == {}
    assert wire.payload(b"\x60" + bytes(60)) == {}
