# SPDX-License-Identifier: Apache-2.0
"""The control socket: a QMP server on a Unix socket, for a few clients at once.

Each client has a task that reads and one that writes. Commands of one client are carried
out one after the other, as QEMU's monitor does; clients do not wait for each other. What
is to be sent lies in the client's backlog until the writer takes it:

- a reply may exceed the limit of the backlog, but the next command is only read when the
  backlog is below it again: a client that does not read its replies stalls itself alone;
- an event never waits: a client with a full backlog loses its connection instead, since
  a missed event is worse than a connection that is known to be gone.

Only the socket's owner may connect (mode 0600): any client can stop the server.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import trio

import nbdstream
from nbdstream.control.encoding import encode_in_turns
from nbdstream.control.table import CommandTable
from nbdstream.net.accept import Acceptor, Client
from nbdstream.net.listeners import Listener, listen_unix
from nbdstream.qmp.protocol import (
    Command,
    CommandError,
    Event,
    Failure,
    GenericError,
    JSONObject,
    QMPProtocolError,
    Return,
    ServerSession,
    encode,
)

log = logging.getLogger(__name__)

# Bytes to a client that it has not read yet: some thousands of events.
BACKLOG_LIMIT = 1 << 20
# Seconds for the last replies to reach a client (that of ``quit``, say) when the server
# ends, or the client has sent its last command.
GRACE = 2.0

# Clients at any time. One more takes the place of the client that has been silent the
# longest, if that is this many seconds; if all are busy, it is refused after that time.
MAX_CLIENTS = 16
SILENCE = 10.0

_REFUSAL = encode(Failure(GenericError(f"{MAX_CLIENTS} clients are connected; try again later")))
_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


def listen_control(path: Path) -> Listener:
    """Open a control socket, to be served later.

    Raises UsageError (the path is too long, is no socket, or another server listens
    there), OSError.
    """
    return listen_unix(path, mode=0o600)


def version() -> JSONObject:
    """QMP's VersionInfo. QMP has a member for QEMU's version alone; clients parse it."""
    major, minor, micro = (int(part) for part in nbdstream.__version__.split("."))
    return {
        "qemu": {"major": major, "minor": minor, "micro": micro},
        "package": f"nbdstream {nbdstream.__version__}",
    }


class ControlServer:
    """Serves a table of commands, and tells all clients of events.

    Attributes:
        table: groups of commands may be added to it.
    """

    def __init__(self, table: CommandTable) -> None:
        self.table = table
        self._clients: set[_Client] = set()

    def emit(self, name: str, data: Mapping[str, object]) -> None:
        """Send an event to every client that has negotiated; never waits, never fails."""
        event = encode(Event(name, dict(data)))
        for client in self._clients:
            client.notify(event)

    async def serve(self, listener: Listener) -> None:
        """Accept clients until cancelled; then close the listener.

        When cancelled, replies that are ready still reach clients that read them.
        """
        acceptor = Acceptor(
            "control client", self._serve, limit=MAX_CLIENTS, grace=SILENCE, refusal=_REFUSAL
        )
        async with trio.open_nursery() as clients:
            await acceptor.run([listener], clients)

    async def _serve(self, accepted: Client) -> None:
        client = _Client(accepted, self.table)
        self._clients.add(client)
        try:
            await client.run()
        finally:
            self._clients.remove(client)


class _Client:
    """One connection."""

    def __init__(self, accepted: Client, table: CommandTable) -> None:
        self._accepted = accepted
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(accepted.socket))
        self._table = table
        self._session = ServerSession(version())
        self._backlog = bytearray(self._session.greeting())
        self._changed = trio.lowlevel.ParkingLot()  # the backlog, or whether more will come
        self._ending = False
        self._connection = trio.CancelScope()
        # The writer outlives a cancelled reader for a moment: see GRACE.
        self._writing = trio.CancelScope(shield=True)

    def notify(self, event: bytes) -> None:
        """Send an event, or hang up if the client has too much to read already."""
        if not self._session.negotiated:
            return
        if len(self._backlog) >= BACKLOG_LIMIT:
            log.warning("hanging up on a control client that does not read its events")
            self._hang_up()
            return
        self._post(event)

    async def run(self) -> None:
        """Serve the client until it or the server hangs up; closes the stream."""
        with self._connection:
            async with self._stream, trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                try:
                    await self._read()
                except _BROKEN:
                    log.debug("a control client is gone")
                finally:
                    self._ending = True
                    self._writing.deadline = trio.current_time() + GRACE
                    self._wake()

    async def _read(self) -> None:
        while data := await self._stream.receive_some():
            try:
                for request in self._session.receive(data):
                    self._accepted.active()
                    await self._answer(request)
                    # Not every command waits for something, and one client's heap of them
                    # is not to keep the guests waiting.
                    await trio.lowlevel.checkpoint()
            except QMPProtocolError as error:
                self._post(encode(Failure(GenericError(str(error)))))
                return

    async def _answer(self, request: Command | Return | Failure) -> None:
        if isinstance(request, Command):
            try:
                result = await self._table.execute(request)
                reply = await encode_in_turns(Return(result, request.id))
            except CommandError as error:
                reply = encode(Failure(error, request.id))
        else:
            reply = encode(request)
        self._post(reply)
        while len(self._backlog) >= BACKLOG_LIMIT:
            await self._changed.park()

    async def _write(self) -> None:
        with self._writing:
            try:
                while self._backlog or not self._ending:
                    if not self._backlog:
                        await self._changed.park()
                        continue
                    data, self._backlog = self._backlog, bytearray()
                    self._wake()
                    await self._stream.send_all(data)
            except _BROKEN:
                self._hang_up()

    def _post(self, line: bytes) -> None:
        self._backlog += line
        self._wake()

    def _wake(self) -> None:
        self._changed.unpark_all()

    def _hang_up(self) -> None:
        self._connection.cancel()
        self._writing.cancel()
