# SPDX-License-Identifier: Apache-2.0
"""The wire between two namespaces: real TCP through one queue, at the rate and delay asked for."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from testbed.link import wire
from testbed.link.model import Shape
from testbed.link.wire import THERE, Wire

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

# Sends so many bytes to each port, all at once; prints the seconds that connecting to the
# first took, and everything.
SEND = """
import socket, sys, threading, time
def send(connection, size):
    with connection:
        connection.sendall(bytes(size))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"."
host, *wanted = sys.argv[1:]
began = time.monotonic()
connections = []
for port in wanted[::2]:
    connections.append(socket.create_connection((host, int(port)), timeout=30))
    if len(connections) == 1: print(time.monotonic() - began)
threads = [
    threading.Thread(target=send, args=(connection, int(size)))
    for connection, size in zip(connections, wanted[1::2])
]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(time.monotonic() - began)
"""


@pytest.fixture
def joined() -> Iterator[Wire]:
    """A wire with a sink on each port at its far end."""
    if why := wire.missing():
        pytest.skip(f"no namespaces: {why}")
    with wire.wire(Shape(rate=RATE, delay=DELAY)) as made:
        command = [*made.there, sys.executable, "-c", SINK, THERE, *map(str, PORTS)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as sink:
            assert sink.stdout and sink.stdout.readline() == b"ready\n"
            yield made
            sink.kill()


def send(joined: Wire, *sizes: int) -> tuple[float, float]:
    """Send so much to each of the ports: seconds for a handshake, and for all of it."""
    wanted = [str(each) for pair in zip(PORTS, sizes, strict=False) for each in pair]
    command = [*joined.here, sys.executable, "-c", SEND, THERE, *wanted]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    handshake, everything = map(float, done.stdout.split())
    return handshake, everything


def test_a_handshake_takes_the_round_trip(joined: Wire) -> None:
    handshake, _ = send(joined, 1)
    assert handshake >= 2 * DELAY


def test_connections_share_the_rate_and_are_counted_apart(joined: Wire) -> None:
    sizes = SIZE, SIZE // 2
    _, took = send(joined, *sizes)
    assert took >= sum(sizes) * 8 / RATE
    for port, size in zip(PORTS, sizes, strict=True):
        # And one byte back; TCP may send a little again.
        assert size + 1 <= joined.moved(port) < 1.2 * size


def test_the_namespaces_are_gone_afterwards() -> None:
    if why := wire.missing():
        pytest.skip(f"no namespaces: {why}")
    with wire.wire(Shape(rate=RATE, delay=DELAY)) as made:
        names = {made.here[-1], made.there[-1]}
        assert names <= namespaces()
    assert not names & namespaces()


def namespaces() -> set[str]:
    done = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True)
    return {line.split()[0] for line in done.stdout.splitlines()}


def test_payload_is_tcps_alone() -> None:
    tcp = bytes.fromhex("0050 1f90 00000000 00000000 5010 0000 0000 0000") + b"data"
    ip = bytes.fromhex("4500 002c 0000 0000 40 06 0000 0a000001 0a000002")
    assert wire.payload(ip + tcp) == {80: 4, 8080: 4}
    assert wire.payload(ip.replace(b"\x40\x06", b"\x40\x11") + tcp) == {}
    assert wire.payload(b"\x60" + bytes(60)) == {}
