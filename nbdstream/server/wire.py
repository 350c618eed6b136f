# SPDX-License-Identifier: Apache-2.0
"""Moves bytes between a connection and its socket, under trio.

Everything is tried at once first and waits only where the socket would block: a hot
connection passes through here without a single task switch.

What must hold: a message is never interleaved with another one, and a client that does
not read its replies stalls only itself.
"""

import select
import socket
from collections import deque
from itertools import islice

import trio

from nbdstream.server.replies import Buffer

_MAX_PARTS = 512  # for one sendmsg; IOV_MAX is 1024


class Wire:
    """A connected, non-blocking stream socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._turn = trio.Lock()  # held while a message is partly sent

    def receive_nowait(self, room: memoryview) -> int | None:
        """Receive what is there: its length, 0 if no more will come, None if nothing is
        there yet. Raises OSError if the connection is broken."""
        try:
            return self._socket.recv_into(room)
        except BlockingIOError:
            return None

    async def readable(self) -> None:
        """Wait until `receive_nowait` has something to say."""
        await trio.lowlevel.wait_readable(self._socket)

    async def send(self, *parts: Buffer) -> None:
        """Send one message, given in parts, behind those that other tasks are sending.

        Raises OSError if the connection is broken. Not a checkpoint if the socket takes
        everything at once. A cancelled call may leave half a message behind: the
        connection can only be closed then.
        """
        rest = deque(filter(len, parts))
        if self._turn.locked():
            await self._turn.acquire()
        elif self._send_some(rest):
            return
        else:
            self._turn.acquire_nowait()
        try:
            while not self._send_some(rest):
                await trio.lowlevel.wait_writable(self._socket)
        finally:
            self._turn.release()

    def _send_some(self, rest: deque[Buffer]) -> bool:
        """Send what the socket takes; return whether nothing is left in ``rest``."""
        while rest:
            try:
                sent = self._socket.sendmsg(islice(rest, _MAX_PARTS))
            except BlockingIOError:
                return False
            while sent >= len(rest[0]):
                sent -= len(rest.popleft())
                if not rest:
                    return True
            rest[0] = memoryview(rest[0])[sent:]
        return True

    def peer_gone(self) -> bool:
        """Whether the peer has hung up, although what it sent before may not be read yet."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)  # POLLHUP and POLLERR come unasked
        return bool(poll.poll(0))

    def say_goodbye(self) -> None:
        """Tell the client that nothing follows, where the wire's protocol has words for that."""

    def stop_receiving(self) -> None:
        """Have `receive_nowait` return 0 once it has given out what already arrived."""
        self._shut_down(socket.SHUT_RD)

    def hang_up(self) -> None:
        """End the connection in both directions, and wake the tasks that wait for it."""
        self._shut_down(socket.SHUT_RDWR)

    def _shut_down(self, how: int) -> None:
        try:
            self._socket.shutdown(how)
        except OSError:
            pass  # the client was faster
