# SPDX-License-Identifier: Apache-2.0
"""A wire through TLS: the same calls as `nbdstream.server.wire`, with records on the socket.

OpenSSL works on memory here and never sees the socket. So one system call receives as many
records as have come, and sends as many as a reply needs; with OpenSSL on the socket it would
take one or two for each record, which is 16 KiB at the most.

What must hold: records leave in the order in which they were made. They are made only by the
task that is sending (`Wire.send`), up to `_PLAIN_MOST` ahead of what the socket takes.
"""

import logging
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import trio

from nbdstream.server.certificates import Certificates
from nbdstream.server.replies import Buffer
from nbdstream.server.wire import Wire
from nbdstream.tasks import in_worker

log = logging.getLogger(__name__)

# What is received at a time, and what is encrypted ahead of the socket.
_RECORDS_ROOM = 256 << 10
_PLAIN_MOST = 256 << 10


class TlsWire(Wire):
    """A connected, non-blocking stream socket on which a TLS server speaks."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        # With a buffer given, it returns how much it has written there; typeshed knows it without.
        self._read = cast("Callable[[int, memoryview], int]", self._tls.read)
        self._room = memoryview(bytearray(_RECORDS_ROOM))
        self._records = memoryview(b"")  # made, and not taken by the socket yet

    @classmethod
    async def accept(
        cls, sock: socket.socket, certificates: Certificates, limiter: trio.CapacityLimiter
    ) -> "TlsWire":
        """Do the handshake. Its steps, some milliseconds of arithmetic, are done by a thread of
        ``limiter``.

        Raises:
            ssl.SSLError: the client gets no further; it has been told why.
            OSError: the connection is broken.
        """
        context = await in_worker(certificates.context, limiter=limiter)
        wire = cls(sock, context)
        done = False
        while not done:
            try:
                await in_worker(wire._tls.do_handshake, limiter=limiter)
                done = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                wire._send_some(deque())  # the alert
                raise
            await wire.send()
            if not done and not await wire._receive_records():
                raise ConnectionResetError("the client hung up during the TLS handshake")
        return wire

    @property
    def description(self) -> str:
        """The protocol's version, the cipher, and the names in the client's certificate."""
        cipher = self._tls.cipher()
        certificate: Any = self._tls.getpeercert() or {}
        subject = [pair for part in certificate.get("subject", ()) for pair in part]
        names = [f"{key}={value}" for key, value in subject]
        return ", ".join([str(self._tls.version()), cipher[0] if cipher else "", *names])

    async def _receive_records(self) -> bool:
        """Wait for what comes next in the handshake; False if nothing will."""
        while (length := super().receive_nowait(self._room)) is None:
            await self.readable()
        self._incoming.write(self._room[:length])
        return length > 0

    def receive_nowait(self, room: memoryview) -> int | None:
        filled = 0
        while True:
            try:
                while filled < len(room):
                    length = self._read(len(room) - filled, room[filled:])
                    if not length:  # the client said goodbye
                        break
                    filled += length
            except ssl.SSLWantReadError:
                received = super().receive_nowait(self._room)
                if not received:
                    return filled or received
                self._incoming.write(self._room[:received])
            else:
                return filled

    def _send_some(self, rest: deque[Buffer]) -> bool:
        while True:
            if not self._records:
                self._encrypt(rest)
                if not self._outgoing.pending:
                    return True
                self._records = memoryview(self._outgoing.read())
            try:
                sent = self._socket.send(self._records)
            except BlockingIOError:
                return False
            self._records = self._records[sent:]

    def _encrypt(self, rest: deque[Buffer]) -> None:
        """Make records of the next parts."""
        while rest and self._outgoing.pending < _PLAIN_MOST:
            part = memoryview(rest.popleft())
            written = self._tls.write(part[:_PLAIN_MOST])
            if written < len(part):
                rest.appendleft(part[written:])

    def say_goodbye(self) -> None:
        try:
            self._tls.unwrap()
        except OSError:
            pass  # it wants to see the client's goodbye too, which may never come
        try:
            if not self._records:
                self._send_some(deque())
        except OSError:
            pass  # the client was faster
