# SPDX-License-Identifier: Apache-2.0
"""The emulated link itself: a proxy between sockets, driven by the model.

One thread, one edge-triggered epoll loop. It receives from whoever has something to send,
passes chunks through the model (`model`: FIFO queue, rate, delay, jitter), and sends
those that are due. Setting up a connection takes the three one-way delays of TCP's
handshake before the target is connected to, whatever kind of socket is used.

Where the queue is. As long as the link's queue has room, whatever arrives is taken out of
the sender's socket buffer at once and waits here, in one FIFO for all connections. When
it is full, reading stops (back-pressure), and room is given to the waiting connections in
turn, a chunk each; then the sender's socket buffer queues too, up to 208 KiB on a unix
socket, and for TCP no more than a small receive buffer here adds to it while a rate is
set. What is due and not taken by the receiver waits in its lane and holds up no other.

Time is frozen during a stall: nothing moves, and what was on its way goes on afterwards.

A cut drops what is on its way. `reset` closes connections and refuses new ones. A
`blackhole` leaves both ends with an open socket on which nothing will ever happen again,
even after `restore`, as a router does that lost its state: a peer finds out by its own
timeouts alone. New connections then wait in the listen queue until `restore`.

The properties can change at any time; small TCP buffers are set when a socket is made.
"""

import contextlib
import os
import queue
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from testbed.link.control import Address, Command, Steering, parse_command
from testbed.link.model import KIB, MIB, WINDOW, Direction, Lane, LinkClock, Shape, Slab

LISTEN_BACKLOG = 128
CONNECT_SECONDS = 5.0
ALIVE_SECONDS = 0.5
SEND_BUFFER = 4 * MIB
RATED_RECEIVE_BUFFER = 64 * KIB
MAX_GATHER = 64
# Closing sends RST instead of FIN: struct linger {on, 0 seconds}.
LINGER_RESET = struct.pack("ii", 1, 0)


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


class Link(Steering):
    """A running link between `listen` and `target`, in a thread of this process.

    A context manager. `address` is where clients connect, `uri()` the same for NBD. Steer
    it with the methods of `Steering`; each returns when it has taken effect.
    """

    def __init__(self, listen: Address | str, target: Address | str, shape: Shape) -> None:
        self._target = Address.parse(target)
        self._shape = shape
        self._up, self._down = Direction(shape), Direction(shape)
        self._clock = LinkClock()
        self._connections: list[Connection] = []
        self._silent: list[Connection] = []  # black holes: open, never touched again
        self._accepted = 0
        self._ready: dict[Direction, deque[Flow]] = {self._up: deque(), self._down: deque()}
        self._spare: list[Slab] = []
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._epoll = select.epoll()
        self._listener: socket.socket | None = None
        self._ignoring = False  # the listener is open, and nobody accepts
        self.address = Address.parse(listen)
        self._listen()
        self._commands: queue.SimpleQueue[tuple[str, Future[dict[str, Any]]]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watch(self._wake, select.EPOLLIN, self._on_wake)
        self._closing = False
        # Not Thread.join(): a signal that interrupts it makes the thread count as ended.
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def __enter__(self) -> "Link":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ConnectionError):  # somebody said so before
            self.command("quit")
        self.wait_closed()
        os.close(self._wake)

    def command(self, line: str) -> dict[str, Any]:
        """Carry out one line of the protocol (`control`), from any thread."""
        result: Future[dict[str, Any]] = Future()
        self._commands.put((line, result))
        os.eventfd_write(self._wake, 1)
        while True:
            try:
                return result.result(timeout=ALIVE_SECONDS)
            except TimeoutError:
                if self._closed.is_set():
                    raise ConnectionError("the link emulator has ended") from None

    def _on_wake(self, _: int) -> None:
        os.eventfd_read(self._wake)
        self._obey()

    def wait_closed(self) -> None:
        """Until somebody said `quit`."""
        self._closed.wait()

    # --- the loop

    def _run(self) -> None:
        try:
            while not self._closing:
                now = self._clock.now()
                busy = not self._clock.frozen and self._step(now)
                for fd, events in self._poll(0.0 if busy else self._idle_seconds()):
                    # A handler before this one may have closed that connection.
                    if fd in self._handlers:
                        self._handlers[fd](events)
        finally:
            self._close_all()
            self._closed.set()

    def _step(self, now: float) -> bool:
        """Move what can move at `now`. True when there is more to do at once."""
        for connection in self._connections.copy():
            if connection.server is None and connection.opens_at <= now:
                self._open(connection)
        for direction, ready in self._ready.items():
            self._receive_round(direction, ready, now)
            direction.advance(now)
        for connection in self._connections.copy():
            for flow in connection.flows:
                self._deliver(connection, flow, now)
                if connection not in self._connections:  # it was found reset
                    break
            else:
                if connection.up.finished and connection.down.finished:
                    self._close(connection)
        return any(
            direction.has_room and any(flow.lane.buffered < WINDOW for flow in ready)
            for direction, ready in self._ready.items()
        )

    def _idle_seconds(self) -> float | None:
        """How long nothing is to be done unless a socket says so; None: for ever."""
        if self._clock.frozen:
            return self._clock.until_thaw()
        times = [turn for d in self._ready if (turn := d.next_turn()) is not None]
        for connection in self._connections:
            if connection.server is None:
                times.append(connection.opens_at)
            for flow in connection.flows:
                if flow.writable and flow.lane.in_flight:
                    times.append(flow.lane.in_flight[0].due)
        return max(0.0, min(times) - self._clock.now()) if times else None

    def _poll(self, timeout: float | None) -> list[tuple[int, int]]:
        if timeout:
            # epoll counts in milliseconds, select in microseconds.
            select.select([self._epoll], [], [], timeout)
            timeout = 0.0
        return self._epoll.poll(timeout)

    # --- data

    def _receive_round(self, direction: Direction, ready: deque[Flow], now: float) -> None:
        """One chunk from each flow that has one, in turn, while the queue has room."""
        for _ in range(len(ready)):
            if not direction.has_room:
                return
            flow = ready.popleft()
            if flow.lane.buffered < WINDOW:
                self._receive(flow, now)
            if flow.readable:
                ready.append(flow)

    def _receive(self, flow: Flow, now: float) -> None:
        assert flow.source
        space = flow.lane.space(flow.direction.shape.chunk_size)
        try:
            length = flow.source.recv_into(space)
        except BlockingIOError:
            flow.readable = False
            return
        except OSError:  # a reset: it travels behind the data that came before it
            flow.readable, flow.ended = False, True
            flow.direction.arrive(now, flow.lane, None)
            return
        if length == 0:
            flow.readable, flow.ended = False, True
            flow.direction.arrive(now, flow.lane, memoryview(b""))
            return
        data, slab = flow.lane.received(length)
        flow.direction.arrive(now, flow.lane, data, slab)
        # Less than asked for: drained, and what comes next is a new event. Only an end
        # that was announced together with this data is not announced again.
        if length < len(space) and not flow.hung_up:
            flow.readable = False

    def _deliver(self, connection: Connection, flow: Flow, now: float) -> None:
        """Send what is due, until the sink takes no more."""
        in_flight = flow.lane.in_flight
        while flow.writable and in_flight and in_flight[0].due <= now:
            first = in_flight[0].data
            if first is None:
                self._reset(connection)
                return
            assert flow.sink
            try:
                if not first:
                    flow.finished, flow.writable = True, False
                    in_flight.popleft()
                    flow.sink.shutdown(socket.SHUT_WR)
                    return
                flow.lane.delivered(flow.sink.sendmsg(self._due_data(flow.lane, now)))
            except BlockingIOError:
                flow.writable = False
            except OSError:  # the receiver is gone: the sender learns by a reset
                self._reset(connection)
                return

    @staticmethod
    def _due_data(lane: Lane, now: float) -> list[memoryview]:
        due: list[memoryview] = []
        for chunk in lane.in_flight:
            if chunk.due > now or not chunk.data or len(due) == MAX_GATHER:
                break
            due.append(chunk.data)
        return due

    # --- connections

    def _listen(self) -> None:
        """Bind and listen; a port chosen by the kernel is kept for later."""
        listener = self.address.listen(
            LISTEN_BACKLOG, None if self._shape.rate is None else RATED_RECEIVE_BUFFER
        )
        self._listener = listener
        self.address = Address.of(listener)
        self._watch_listener(listener)

    def _watch_listener(self, listener: socket.socket) -> None:
        self._ignoring = False
        self._watch(listener.fileno(), select.EPOLLIN, lambda _: self._accept(listener))

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        self._tune(client)
        self._accepted += 1
        up = Flow(Lane(self._spare), self._up)
        down = Flow(Lane(self._spare), self._down)
        connection = Connection(client, up, down, self._clock.now() + 3 * self._shape.delay)
        self._connections.append(connection)
        self._watch_flow(client, source_of=up, sink_of=down)

    def _open(self, connection: Connection) -> None:
        """Connect to the target: on the same machine, so waiting for it is no loss."""
        try:
            server = self._target.connect(
                CONNECT_SECONDS, None if self._shape.rate is None else RATED_RECEIVE_BUFFER
            )
        except OSError:
            self._reset(connection)
            return
        self._tune(server)
        connection.server = connection.up.sink = connection.down.source = server
        self._watch_flow(server, source_of=connection.down, sink_of=connection.up)

    def _tune(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Some systems default to a congestion control that paces even on loopback.
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")

    def _watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def _watch_flow(self, sock: socket.socket, source_of: Flow, sink_of: Flow) -> None:
        def handle(events: int) -> None:
            ends = events & (select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR)
            source_of.hung_up |= bool(ends)
            if (ends or events & select.EPOLLIN) and not (source_of.readable or source_of.ended):
                source_of.readable = True
                self._ready[source_of.direction].append(source_of)
            if (ends or events & select.EPOLLOUT) and not sink_of.finished:
                sink_of.writable = True

        everything = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
        self._watch(sock.fileno(), everything, handle)

    def _unwatch(self, sock: socket.socket) -> None:
        del self._handlers[sock.fileno()]
        self._epoll.unregister(sock)

    def _forget(self, connection: Connection) -> None:
        """Take a connection out of everything but its sockets, which stay open."""
        for sock in connection.sockets:
            self._unwatch(sock)
        for flow in connection.flows:
            with contextlib.suppress(ValueError):
                self._ready[flow.direction].remove(flow)
        self._connections.remove(connection)

    def _close(self, connection: Connection) -> None:
        self._forget(connection)
        for sock in connection.sockets:
            sock.close()

    def _reset(self, connection: Connection) -> None:
        """Close both ends; over TCP with an RST, as a unix socket has none."""
        for sock in connection.sockets:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        self._close(connection)

    def _ignore_listener(self) -> None:
        self._restore_listener()
        assert self._listener
        self._unwatch(self._listener)
        self._ignoring = True

    def _restore_listener(self) -> None:
        if self._listener is None:
            self._listen()
        elif self._ignoring:
            self._watch_listener(self._listener)

    def _close_listener(self) -> None:
        if self._listener is not None:
            if not self._ignoring:
                self._unwatch(self._listener)
            self._listener.close()
            self._listener = None
            self.address.unlink()

    def _close_all(self) -> None:
        self._close_listener()
        for connection in self._connections.copy():
            self._reset(connection)
        self._close_silent()
        self._epoll.close()

    def _close_silent(self) -> None:
        for connection in self._silent:
            for sock in connection.sockets:
                sock.close()
        self._silent.clear()

    # --- steering, in the loop's thread

    def _obey(self) -> None:
        while not self._closing:
            try:
                line, result = self._commands.get_nowait()
            except queue.Empty:
                return
            try:
                result.set_result(self._execute(parse_command(line, self._shape)))
            except (ValueError, OSError) as error:
                result.set_exception(error)

    def _execute(self, command: Command) -> dict[str, Any]:
        match command.verb:
            case "set":
                assert command.shape
                self._shape = self._up.shape = self._down.shape = command.shape
            case "stall":
                self._clock.freeze(command.seconds)
            case "resume":
                self._clock.thaw()
            case "cut":
                self._cut(command.mode)
            case "restore":
                self._restore_listener()
            case "quit":
                self._closing = True
        return self._statistics() if command.verb == "stats" else {}

    def _cut(self, mode: str) -> None:
        if mode == "reset":
            self._close_listener()
            self._close_silent()
        else:
            self._ignore_listener()
        for connection in self._connections.copy():
            if mode == "reset":
                self._reset(connection)
            else:
                self._forget(connection)
                self._silent.append(connection)
        self._up.drop()
        self._down.drop()

    def _statistics(self) -> dict[str, Any]:
        directions = {"up": self._up, "down": self._down}
        return {
            "time": time.monotonic(),
            "shape": asdict(self._shape),
            "connections": len(self._connections),
            "accepted": self._accepted,
            **{
                name: {"bytes": d.sent, "queued": d.queued, "max_queued": d.max_queued}
                for name, d in directions.items()
            },
        }
