# SPDX-License-Identifier: Apache-2.0
"""The emulated link itself: a proxy between sockets, driven by the model.

One thread, one edge-triggered epoll loop. It receives from each socket that has data,
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
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from testbed.link.control import Address, Command, Steering, parse_command
from testbed.link.flow import Connection, Flow, tune
from testbed.link.model import KIB, WINDOW, Direction, Lane, LinkClock, Shape, Slab

LISTEN_BACKLOG = 128
CONNECT_SECONDS = 5.0
ALIVE_SECONDS = 0.5
RATED_RECEIVE_BUFFER = 64 * KIB


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
        self._ignoring = False  # the listener is open, and nothing is accepted
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
        with contextlib.suppress(ConnectionError):  # it was closed before
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
        """Until the command `quit` was carried out."""
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
                if not flow.deliver(now):
                    self._reset(connection)
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
                flow.receive(now)
            if flow.readable:
                ready.append(flow)

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
        tune(client)
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
        tune(server)
        connection.server = connection.up.sink = connection.down.source = server
        self._watch_flow(server, source_of=connection.down, sink_of=connection.up)

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
        connection.reset_on_close()
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
