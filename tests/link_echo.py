# SPDX-License-Identifier: Apache-2.0
"""An echo server for tests of the emulated link, and a client of it."""

import contextlib
import socket
import socketserver
import time
from collections.abc import Iterator

from testbed.link.control import (
    Steering,
)

PATIENCE = 20.0


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        # A reset is the end of the conversation as well.
        with contextlib.suppress(ConnectionError):
            while data := self.request.recv(1 << 20):
                self.request.sendall(data)


class TcpServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64


class UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64


def connect(link: Steering) -> socket.socket:
    return link.address.connect(PATIENCE)


def receive(sock: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = sock.recv(length - len(data))
        assert piece, f"the connection ended after {len(data)} of {length} bytes"
        data += piece
    return bytes(data)


def ping(sock: socket.socket, data: bytes = b"x") -> float:
    """Seconds until `data` came back."""
    start = time.monotonic()
    sock.sendall(data)
    assert receive(sock, len(data)) == data
    return time.monotonic() - start


@contextlib.contextmanager
def connected(link: Steering, count: int = 1) -> Iterator[list[socket.socket]]:
    """Connections that have been used once, so that their set-up is over."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(link)) for _ in range(count)]
        for sock in socks:
            ping(sock)
        yield socks
