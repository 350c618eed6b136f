# SPDX-License-Identifier: Apache-2.0
"""A proxied connection's sockets: data from one into the model, and from the model into the other.

Sockets do not block. What epoll said of them is remembered here, since it says each thing once.
"""

import contextlib
import socket
import struct

from testbed.link.model import MIB, Direction, Lane

SEND_BUFFER = 4 * MIB
MAX_GATHER = 64
# Closing sends RST instead of FIN: struct linger {on, 0 seconds}.
LINGER_RESET = struct.pack("ii", 1, 0)


def tune(sock: socket.socket) -> None:
    """Let the emulated link alone decide how fast data goes."""
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Some systems default to a congestion control that paces even on loopback.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


class Flow:
    """A lane with its two sockets and what epoll last said of them."""

    def __init__(self, lane: Lane, direction: Direction) -> None:
        self.lane = lane
        self.direction = direction
        self.source: socket.socket | None = None
        self.sink: socket.socket | None = None
        self.readable = False
        self.hung_up = False  # the source's end or error may follow data already read
        self.ended = False  # the source has nothing more
        self.writable = False
        self.finished = False  # the sink was told so

    def receive(self, now: float) -> None:
        """Take one chunk from the source into the link's queue; or its end, or its reset."""
        assert self.source
        space = self.lane.space(self.direction.shape.chunk_size)
        try:
            length = self.source.recv_into(space)
        except BlockingIOError:
            self.readable = False
            return
        except OSError:  # a reset: it travels behind the data that came before it
            self.readable, self.ended = False, True
            self.direction.arrive(now, self.lane, None)
            return
        if length == 0:
            self.readable, self.ended = False, True
            self.direction.arrive(now, self.lane, memoryview(b""))
            return
        data, slab = self.lane.received(length)
        self.direction.arrive(now, self.lane, data, slab)
        # Less than asked for: drained, and what comes next is a new event. Only an end
        # that was announced together with this data is not announced again.
        if length < len(space) and not self.hung_up:
            self.readable = False

    def deliver(self, now: float) -> bool:
        """Send what is due, until the sink takes no more. False: the connection was reset."""
        in_flight = self.lane.in_flight
        while self.writable and in_flight and in_flight[0].due <= now:
            first = in_flight[0].data
            if first is None:
                return False
            assert self.sink
            try:
                if not first:
                    self.finished, self.writable = True, False
                    in_flight.popleft()
                    self.sink.shutdown(socket.SHUT_WR)
                    return True
                self.lane.delivered(self.sink.sendmsg(self._due_data(now)))
            except BlockingIOError:
                self.writable = False
            except OSError:  # the receiver is gone: the sender learns by a reset
                return False
        return True

    def _due_data(self, now: float) -> list[memoryview]:
        due: list[memoryview] = []
        for chunk in self.lane.in_flight:
            if chunk.due > now or not chunk.data or len(due) == MAX_GATHER:
                break
            due.append(chunk.data)
        return due


class Connection:
    """A client, and from `opens_at` on its own connection to the target."""

    def __init__(self, client: socket.socket, up: Flow, down: Flow, opens_at: float) -> None:
        self.client = client
        self.server: socket.socket | None = None
        self.up, self.down = up, down
        self.opens_at = opens_at
        up.source = down.sink = client

    @property
    def flows(self) -> tuple[Flow, Flow]:
        return self.up, self.down

    @property
    def sockets(self) -> list[socket.socket]:
        return [self.client, *([self.server] if self.server else [])]

    def reset_on_close(self) -> None:
        """Let closing the sockets send a reset, where they are TCP's."""
        for sock in self.sockets:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
