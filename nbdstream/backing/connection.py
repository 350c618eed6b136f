# SPDX-License-Identifier: Apache-2.0
"""One NBD connection: libnbd's state machine, moved along by trio.

libnbd never blocks here: it is told when its socket is ready, and it says which way
it wants to go next (``aio_get_direction``). One task, `Connection.run`, does that for as
long as the connection lives; `Connection.read` and `Connection.block_status` may be
called from any number of tasks meanwhile. Payload goes from the socket straight into
the caller's buffer.

What must hold:

- A request ends in exactly one of: its data, `BackingReadError` (the server answered
  with an error, or with less than it was asked for), `ConnectionLostError`. Success is
  only ever taken from ``aio_command_completed``, which is where libnbd checks that the
  chunks of a structured reply add up to the request.
- **libnbd cannot take a request back.** A cancelled read therefore waits, shielded,
  until its buffer is no longer libnbd's: for `CANCEL_GRACE`, then the connection is
  given up, which ends all of its requests at once.
- A connection is given up (`kill`) by shutting its socket down and letting libnbd find
  that out, so that every buffer is released by the same path as always.
"""

import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import nbd
import trio

from nbdstream.errors import BackingReadError
from nbdstream.extents import BackingExtent, align_down, align_up

# Without a maximum block size from the server, 32 MiB is what the protocol deems safe
# ("Block size constraints"); we never ask for as much in one request.
DEFAULT_MAXIMUM = 32 << 20
# How long a cancelled read waits for its reply before it gives the connection up.
CANCEL_GRACE = 0.5
# How many replies are taken in a row before other tasks get their turn.
REPLIES_PER_TURN = 4
# NBD_CMD_BLOCK_STATUS has a 32-bit length; the last multiple of any block size below it.
BLOCK_STATUS_MAXIMUM = 1 << 31
# When a silent TCP peer is given up by the kernel: idle (keep-alive) or not.
TCP_SILENCE = 30
KEEPALIVE_INTERVAL = 10


class ConnectionLostError(Exception):
    """The connection ended before the reply came: the request may be sent on another."""


class Timing(NamedTuple):
    """When a request was handed to libnbd, and when its reply was complete (trio's clock)."""

    sent: float
    done: float


@dataclass(eq=False)
class _Request:
    """A command that libnbd has; ``error`` is valid once ``finished`` is set."""

    length: int
    sent: float
    done: float = 0.0
    error: Exception | None = None
    finished: trio.Event = field(default_factory=trio.Event)


class Connection:
    """An open, negotiated connection to one export.

    Attributes:
        size: the export's size in bytes.
        multi_conn: the server allows several connections at once.
        minimum_block, maximum_block: what every request must be a multiple of, and may
            be at the most.
        takes_hints: the server can be told what will be read soon (NBD_CMD_CACHE).
        has_block_status: the server answers block status for ``base:allocation``.
        in_flight: bytes asked for and not yet received in full.
        last_progress: when bytes last came, or an idle connection was last given work.
        lost: why the connection ended, or "" while it lives.
    """

    def __init__(self, handle: nbd.NBD) -> None:
        """Use `connect`; ``handle`` has been negotiated."""
        self._handle = handle
        self._socket = socket.socket(fileno=os.dup(handle.aio_get_fd()))
        _watch_silence(self._socket)
        self._requests: dict[int, _Request] = {}
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        # What `run` waits in; cancelled when it should wait for something else.
        self._waiting = trio.CancelScope()
        self.size: int = handle.get_size()
        self.multi_conn: bool = handle.can_multi_conn()
        self.minimum_block: int = handle.get_block_size(nbd.SIZE_MINIMUM) or 1
        self.maximum_block = align_down(
            min(handle.get_block_size(nbd.SIZE_MAXIMUM) or DEFAULT_MAXIMUM, DEFAULT_MAXIMUM),
            self.minimum_block,
        )
        self.takes_hints: bool = handle.can_cache()
        self.has_block_status: bool = handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        self.in_flight = 0
        self.last_progress = trio.current_time()
        self.lost = ""

    # -- life --------------------------------------------------------------------------

    async def run(self) -> None:
        """Move data until the connection ends; returns then, with `lost` set.

        Cancelled: the connection is closed and all of its requests end.
        """
        try:
            while not self.lost:
                with trio.CancelScope() as self._waiting:
                    while not self.lost:
                        await self._turn()
        except nbd.Error as error:
            self.kill(plain(error))
        except OSError as error:
            self.kill(str(error))
        finally:
            self.kill("closed")
            self._bury()

    def kill(self, reason: str) -> None:
        """Give the connection up; `run` ends soon, and every request with it."""
        if not self.lost:
            self.lost = reason
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the peer was first
            self._waiting.cancel()

    def _bury(self) -> None:
        """Have libnbd see the end of its socket, which releases all buffers; never blocks."""
        handle = self._handle
        # After `kill` the socket is readable up to its end. Where it is not, no end will come.
        while not (handle.aio_is_dead() or handle.aio_is_closed()) and self._poll.poll(0):
            try:
                handle.aio_notify_read()
            except nbd.Error:
                break  # says again why it died
        self._collect()
        # Requests that never reached libnbd's queue of finished commands do not exist,
        # but a waiter left behind would wait for ever.
        for request in self._requests.values():
            self._finish(request, ConnectionLostError(self.lost))
        self._requests.clear()
        self._socket.close()

    async def _turn(self) -> None:
        """Wait for the socket once; take what replies are there."""
        handle = self._handle
        if not self._requests:
            await self._idle()
        writable = await wait_ready(handle)
        self.last_progress = trio.current_time()
        if writable:
            handle.aio_notify_write()
            return
        # Each call takes one reply, or what is there of it, and must not be made in vain:
        # libnbd then begins to wait for a reply and sends nothing until one comes.
        for _ in range(REPLIES_PER_TURN):
            handle.aio_notify_read()
            if handle.aio_is_closed():
                self.kill("the server closed the connection")
            if not self._collect() or not self._poll.poll(0):
                break

    async def _idle(self) -> None:
        """Return when the peer hangs up; `_submit` ends the wait otherwise.

        What comes unasked (session tickets of TLS 1.3) is left for the next reader, for
        the reason given in `_turn`.
        """
        await trio.lowlevel.wait_readable(self._handle.aio_get_fd())
        try:
            if self._socket.recv(1, socket.MSG_PEEK):
                await trio.sleep_forever()
        except OSError:
            pass  # libnbd will find out and say it

    def _collect(self) -> bool:
        """End the requests that libnbd has finished; whether there were any."""
        handle, found = self._handle, False
        while self._requests:
            try:
                cookie = handle.aio_peek_command_completed()
            except nbd.Error:
                break  # nothing in flight as far as libnbd knows
            if not cookie:
                break
            found = True
            error: Exception | None = None
            try:
                handle.aio_command_completed(cookie)
            except nbd.Error as reply:
                error = self._reply_error(reply)
            self._finish(self._requests.pop(cookie), error)
        return found

    def _reply_error(self, error: nbd.Error) -> Exception:
        """What libnbd says of a failed command: the server's answer, or the link's end?"""
        if error.errnum in (errno.ENOTCONN, errno.ESHUTDOWN):
            self.kill(plain(error))
        if self.lost:
            return ConnectionLostError(self.lost)
        answer = BackingReadError(f"the backing server answered with an error: {plain(error)}")
        answer.errno = error.errnum or 0
        return answer

    def _finish(self, request: _Request, error: Exception | None) -> None:
        request.error = error
        request.done = trio.current_time()
        request.finished.set()
        self.in_flight -= request.length

    # -- requests ----------------------------------------------------------------------

    async def read(self, view: memoryview, offset: int) -> Timing:
        """Fill ``view`` from ``offset``, in as many requests as the server's limits ask for.

        Raises ConnectionLostError or BackingReadError. Cancelled or failed: nothing more is
        written to ``view`` after the call.
        """
        start = align_down(offset, self.minimum_block)
        # A size that is no multiple of the block size leaves a tail that only an odd
        # request reaches; most servers answer it.
        end = min(align_up(offset + len(view), self.minimum_block), self.size)
        if (start, end - start) != (offset, len(view)):
            bounce = memoryview(bytearray(end - start))
            timing = await self._read_aligned(bounce, start)
            view[:] = bounce[offset - start : offset - start + len(view)]
            return timing
        return await self._read_aligned(view, offset)

    async def _read_aligned(self, view: memoryview, offset: int) -> Timing:
        requests: list[_Request] = []
        try:
            for start in range(0, len(view), self.maximum_block):
                requests.append(
                    self._send_read(view[start : start + self.maximum_block], offset + start)
                )
        finally:
            await self._wait_all(requests)
        for request in requests:
            if request.error is not None:
                raise request.error
        return Timing(requests[0].sent, max(request.done for request in requests))

    async def cache(self, offset: int, length: int) -> Timing:
        """Have the server make the range local (NBD_CMD_CACHE); returns when it is. Only if
        ``takes_hints``. Raises ConnectionLostError or BackingReadError."""
        request = self._submit(length, lambda: self._handle.aio_cache(length, offset))
        await self._wait_all([request])
        if request.error is not None:
            raise request.error
        return Timing(request.sent, request.done)

    async def block_status(self, offset: int, length: int) -> list[BackingExtent]:
        """What the server says of the range: at least one extent, from ``offset`` on.

        May cover less than ``length``, never more. Raises as `read` does.
        """
        end = offset + length
        start = align_down(offset, self.minimum_block)
        ask_end = min(align_up(end, self.minimum_block), self.size, start + BLOCK_STATUS_MAXIMUM)
        found: list[int] = []

        def take(context: str, _offset: int, entries: list[int], _error: object) -> int:
            if context == nbd.CONTEXT_BASE_ALLOCATION:
                found.extend(entries)
            return 0

        request = self._submit(
            0, lambda: self._handle.aio_block_status(ask_end - start, start, take)
        )
        await self._wait_all([request])
        if request.error is not None:
            raise request.error
        extents: list[BackingExtent] = []
        for size, flags in zip(found[::2], found[1::2], strict=True):
            first, last = max(start, offset), min(start + size, end)
            if first < last:
                extents.append(BackingExtent(first, last - first, bool(flags & nbd.STATE_ZERO)))
            start += size
        if not extents:
            raise BackingReadError("the backing server answered block status with no extents")
        return extents

    def hint(self, offset: int, length: int) -> None:
        """Tell the server that the range is needed now (NBD_CMD_CACHE), and wait for nothing.
        Does nothing if the server does not take hints, or the connection is lost."""
        if self.takes_hints:
            with contextlib.suppress(ConnectionLostError):
                self._submit(0, lambda: self._handle.aio_cache(length, offset))

    def _send_read(self, view: memoryview, offset: int) -> _Request:
        return self._submit(len(view), lambda: self._handle.aio_pread(view, offset))

    def _submit(self, length: int, command: Callable[[], int]) -> _Request:
        """Hand a command to libnbd. Raises ConnectionLostError if it will not take it."""
        if self.lost:
            raise ConnectionLostError(self.lost)
        now = trio.current_time()
        try:
            cookie = command()
        except nbd.Error as error:
            self.kill(plain(error))
            raise ConnectionLostError(self.lost) from error
        if not self._requests:
            self.last_progress = now
            self._waiting.cancel()
        elif self._handle.aio_get_direction() != nbd.AIO_DIRECTION_READ:
            # Requests are small and go out at once, unless the socket is full of them.
            self._waiting.cancel()
        request = _Request(length, now)
        self._requests[cookie] = request
        self.in_flight += length
        return request

    async def _wait_all(self, requests: list[_Request]) -> None:
        """Return when libnbd holds none of the requests' buffers any more; see the module."""
        try:
            for request in requests:
                await request.finished.wait()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                with trio.move_on_after(CANCEL_GRACE):
                    for request in requests:
                        await request.finished.wait()
                if not all(request.finished.is_set() for request in requests):
                    self.kill("a read was cancelled")
                for request in requests:
                    await request.finished.wait()
            raise

    def stalled_for(self, now: float) -> float:
        """Seconds for which nothing has come although something was asked for."""
        return now - self.last_progress if self._requests else 0.0


async def wait_ready(handle: nbd.NBD) -> bool:
    """Wait until libnbd can go on; whether that is because its socket is writable."""
    fd, direction = handle.aio_get_fd(), handle.aio_get_direction()
    if direction == nbd.AIO_DIRECTION_READ:
        await trio.lowlevel.wait_readable(fd)
        return False
    if direction == nbd.AIO_DIRECTION_WRITE:
        await trio.lowlevel.wait_writable(fd)
        return True
    readable = False
    async with trio.open_nursery() as nursery:

        async def wait_readable() -> None:
            nonlocal readable
            await trio.lowlevel.wait_readable(fd)
            readable = True
            nursery.cancel_scope.cancel()

        nursery.start_soon(wait_readable)
        await trio.lowlevel.wait_writable(fd)
        nursery.cancel_scope.cancel()
    # Replies first: a server that waits for us to take them may read no requests.
    return not readable


def plain(error: nbd.Error) -> str:
    """libnbd's message without the name of the call that said it."""
    text: str = error.string or "unknown error"
    return text.removeprefix("nbd_").split(": ", 1)[-1]


def _watch_silence(sock: socket.socket) -> None:
    """Have the kernel notice a TCP peer that is gone, whether we wait for it or not."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_SILENCE * 1000)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, TCP_SILENCE // KEEPALIVE_INTERVAL)
