# SPDX-License-Identifier: Apache-2.0
"""One client's connection, from the greeting to the end: the trio side of the codec.

One task receives, answers what can be answered at once, and sends; each request that
has to wait for something gets a task of its own, so that replies leave in the order in
which they become ready. What happens at the end depends on how it comes:

- NBD_CMD_DISC, or the server stops: every request in flight is finished and answered.
- The client is gone, which is noticed whatever its requests wait for: reads in flight are
  cancelled. Changes get `CHANGE_GRACE` to finish, then they are cancelled too: what waits
  for a backing that is out of reach could wait for ever. The client never got an answer to
  such a change, so all, a part or nothing of it may be on the disk; a block always holds
  either its old or its new content, because the disk stores a block in one step.
- The client breaks the protocol: the same, and one line in the log.
"""

import logging
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from nbdstream.export import Export
from nbdstream.server.certificates import Certificates
from nbdstream.server.execute import execute
from nbdstream.server.handshake import Agreement, Handshake, ProtocolError, Tls
from nbdstream.server.payloads import PayloadRoom, Share
from nbdstream.server.requests import is_change
from nbdstream.server.tls import TlsWire
from nbdstream.server.traffic import Traffic
from nbdstream.server.transmission import SlowRequest, Transmission
from nbdstream.server.wire import Wire

logger = logging.getLogger(__name__)

# Seconds that a client may take for its whole handshake.
HANDSHAKE_TIMEOUT = 10.0
# Seconds after which a busy connection lets other tasks run.
TURN = 0.001
# Seconds for changes in flight of a client that is gone.
CHANGE_GRACE = 10.0
# Seconds between looks whether the client is still there, while nothing is read from it.
HANG_UP_CHECK = 0.5

# What is received at a time in the handshake: a few dozen options at the most.
_HANDSHAKE_ROOM = 1024


@dataclass(frozen=True)
class TlsOffer:
    """What all connections share that may go through TLS."""

    certificates: Certificates
    # One handshake's arithmetic at a time: a crowd of newcomers takes one core at most.
    limiter: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(1))

    @property
    def mode(self) -> Tls:
        return Tls.REQUIRED if self.certificates.policy.required else Tls.ON


class Connection:
    """Serves one client.

    ``peer`` names it in the log. ``admit`` is called when the client has chosen an export;
    it returns why the client is not served, or "" if it is. ``turn`` is shared by all
    connections: a step of a handshake is taken with it held. A trio lock is passed on once
    in each pass of the event loop, so a crowd of newcomers delays the clients that are
    served by one step at a time, not by all steps in a row. ``room`` is the memory that all
    connections share for requests that wait; ``traffic`` counts for all of them. ``tls``: how
    TLS is offered, None for not at all.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        exports: Sequence[Export],
        admit: Callable[[], str],
        turn: trio.Lock,
        room: PayloadRoom,
        traffic: Traffic,
        tls: TlsOffer | None = None,
    ) -> None:
        self._socket = sock
        self._wire = Wire(sock)
        self._tls = tls
        self._peer = peer
        self._exports = exports
        self._admit = admit
        self._turn = turn
        self._room = room
        self._traffic = traffic
        self._stopping = False
        self._finished = trio.lowlevel.ParkingLot()  # unparked by every slow request's end
        self._changes = trio.CancelScope()
        self.export: Export | None = None  # once the client has chosen one
        self.lingering = False  # the client is gone, and changes of it are not finished

    def stop(self) -> None:
        """Take no further requests, finish those in flight, and end."""
        self._stopping = True
        self._wire.stop_receiving()

    def drop(self) -> None:
        """Give up the changes of a client that is gone."""
        self._changes.cancel()

    async def run(self) -> None:
        """Serve the client until the connection ends. The caller closes the socket.

        A cancelled call leaves the connection in the middle of anything.
        """
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT):
                handshake = await self._shake_hands()
        except (ProtocolError, OSError, trio.TooSlowError) as error:
            self._log_end(error)
            return
        if isinstance(handshake.outcome, Agreement):
            await self._serve(handshake.outcome, handshake.unconsumed)
        self._wire.say_goodbye()

    async def _shake_hands(self) -> Handshake:
        handshake = Handshake(self._exports, self._admit, self._tls.mode if self._tls else Tls.OFF)
        room = memoryview(bytearray(_HANDSHAKE_ROOM))
        await self._wire.send(handshake.greeting())
        while not handshake.outcome:
            length = self._wire.receive_nowait(room)
            if length is None:
                await self._wire.readable()
            elif length:
                async with self._turn:
                    replies = handshake.receive(bytes(room[:length]))
                if isinstance(handshake.outcome, Agreement):
                    self.export = handshake.outcome.export
                await self._wire.send(replies)
                if handshake.starting_tls:
                    await self._start_tls()
                    handshake.secured()
            else:
                break
        return handshake

    async def _start_tls(self) -> None:
        """Go on through TLS. Raises ProtocolError, OSError."""
        assert self._tls is not None
        try:
            wire = await TlsWire.accept(self._socket, self._tls.certificates, self._tls.limiter)
        except ssl.SSLError as error:
            raise ProtocolError(f"TLS handshake failed: {error.reason or error}") from error
        self._wire = wire
        if self._stopping:
            wire.stop_receiving()
        logger.info("client %s: %s", self._peer, wire.description)

    async def _serve(self, agreement: Agreement, unconsumed: bytes) -> None:
        async with self._turn:
            share = Share(self._room)
            transmission = Transmission(agreement, share, self._traffic, unconsumed)
        try:
            await self._serve_requests(transmission, agreement)
        finally:
            share.close()

    async def _serve_requests(self, transmission: Transmission, agreement: Agreement) -> None:
        with self._changes:
            async with trio.open_nursery() as changes, trio.open_nursery() as queries:

                def start(slow: SlowRequest) -> None:
                    nursery = changes if is_change(slow.request) else queries
                    nursery.start_soon(self._execute, slow, transmission, agreement)

                try:
                    finish_all = await self._transmit(transmission, start)
                    while finish_all and (changes.child_tasks or queries.child_tasks):
                        finish_all = await self._wait(self._finished)
                except (ProtocolError, OSError) as error:
                    self._log_end(error)
                    finish_all = False
                if not finish_all:
                    # A cancelled task may leave half a reply behind: nothing may follow it.
                    self._wire.hang_up()
                    queries.cancel_scope.cancel()
                    self._changes.deadline = trio.current_time() + CHANGE_GRACE
                    self.lingering = True
        if self._changes.cancelled_caught:
            logger.warning(
                "client %s: it is gone, and changes that it got no answer to are dropped",
                self._peer,
            )

    async def _transmit(
        self, transmission: Transmission, start: Callable[[SlowRequest], None]
    ) -> bool:
        """Serve requests until no more come; return whether those in flight still matter."""
        turn_end = time.perf_counter() + TURN
        while not self._stopping:
            hungry = transmission.process()
            if transmission.slow:
                for slow in transmission.slow:
                    start(slow)
                transmission.slow.clear()
                turn_end = 0.0  # let them begin
            replies = transmission.take_replies()
            if replies:
                await self._wire.send(replies)
            if transmission.disconnected:
                return True
            if transmission.saturated:
                more = self._room.freed if transmission.crowded_out else self._finished
                if not await self._wait(more):
                    return False
                turn_end = time.perf_counter() + TURN
            elif hungry:
                length = self._wire.receive_nowait(transmission.room())
                if length is None:
                    await self._wire.readable()
                    turn_end = time.perf_counter() + TURN
                elif length:
                    transmission.received(length)
                else:
                    return self._stopping
            if time.perf_counter() > turn_end:
                await trio.lowlevel.checkpoint()
                turn_end = time.perf_counter() + TURN
        return True

    async def _wait(self, lot: trio.lowlevel.ParkingLot) -> bool:
        """Wait in the lot until what it stands for has happened, or the server stops; False
        if the client is gone."""
        while True:
            with trio.move_on_after(HANG_UP_CHECK):
                await lot.park()
                return True
            # A connection that was shut down to stop looks as if its client were gone.
            if self._stopping:
                return True
            if self._wire.peer_gone():
                return False

    async def _execute(
        self, slow: SlowRequest, transmission: Transmission, agreement: Agreement
    ) -> None:
        """Carry out one slow request, and send its reply."""
        try:
            parts = await execute(slow.request, slow.payload, agreement, self._traffic)
            await self._wire.send(*parts)
        except OSError:
            self._wire.hang_up()  # and the receiving task says why
        finally:
            transmission.finished(slow)
            self._finished.unpark_all()

    def _log_end(self, error: Exception) -> None:
        """One line; a client that went away without a word is nothing to warn of."""
        if isinstance(error, OSError):
            logger.info("client %s: connection lost: %s", self._peer, error)
        elif isinstance(error, trio.TooSlowError):
            logger.warning("client %s: no handshake in %g s", self._peer, HANDSHAKE_TIMEOUT)
        else:
            logger.warning("client %s: %s; closing its connection", self._peer, error)
