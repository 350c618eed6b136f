# SPDX-License-Identifier: Apache-2.0
"""The NBD server: accepts clients on its listeners, and serves its exports to them.

    async with trio.open_nursery() as nursery:
        server = Server([export])
        nursery.start_soon(server.run, listeners)
        ...
        server.stop()

`Server.run` returns when `Server.stop` was called, every request in flight was answered
and every connection is closed.

Two limits hold clients apart that want different things. `MAX_HANDSHAKES` is for those
that have not chosen an export yet: who is slow there cannot crowd out others, because the
oldest of them makes room (`nbdstream.net.accept`). `MAX_CLIENTS` is for those that have.
One more is told so in the handshake, unless a client that has hung up is still there
because of a change that cannot be finished: that one makes room.
"""

import logging
from collections.abc import Callable, Iterable, Sequence

import trio

from nbdstream.export import Export
from nbdstream.net.accept import Acceptor, Client, Episode
from nbdstream.net.listeners import Listener
from nbdstream.server.certificates import Certificates
from nbdstream.server.connection import Connection, TlsOffer
from nbdstream.server.payloads import PayloadRoom
from nbdstream.server.traffic import Traffic

logger = logging.getLogger(__name__)

# Clients in the transmission phase at any time.
MAX_CLIENTS = 128
# Clients that have not finished their handshake, and seconds that the oldest of them is
# given if another client waits.
MAX_HANDSHAKES = 64
HANDSHAKE_GRACE = 1.0
# Seconds that requests in flight get when the server stops.
STOP_TIMEOUT = 30.0


class Server:
    """Serves ``exports`` (no two of the same name).

    ``tls``: certificates for TLS, None to offer none. ``clients_changed`` is called with the number
    of connected clients whenever it changes; ``max_clients`` may be in the transmission phase at
    any time. It may be changed; clients that are served stay. ``traffic`` counts what all
    clients asked for.
    """

    def __init__(
        self,
        exports: Iterable[Export],
        *,
        tls: Certificates | None = None,
        clients_changed: Callable[[int], None] | None = None,
        max_clients: int = MAX_CLIENTS,
    ) -> None:
        self._exports: list[Export] = []
        for export in exports:
            self.add_export(export)
        self._tls = TlsOffer(tls) if tls is not None else None
        self._clients_changed = clients_changed
        self.max_clients = max_clients
        self._connections: set[Connection] = set()
        self._admitted: dict[Connection, None] = {}  # those that count, in order of admission
        self._left = trio.lowlevel.ParkingLot()  # unparked when a connection ends
        self._full = Episode()
        self._acceptor = Acceptor(
            "client", self._serve, limit=MAX_HANDSHAKES, grace=HANDSHAKE_GRACE
        )
        self._handshake_turn = trio.Lock()
        self._room = PayloadRoom()
        self.traffic = Traffic()
        self._accepting = trio.CancelScope()
        self._serving = trio.CancelScope()

    @property
    def clients(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    def add_export(self, export: Export) -> None:
        """Serve another export from now on; no other has its name."""
        assert export.name not in {each.name for each in self._exports}, export.name
        self._exports.append(export)

    def clients_of(self, export: Export) -> int:
        """How many clients have chosen an export."""
        return sum(connection.export is export for connection in self._connections)

    async def remove_export(self, export: Export) -> None:
        """Offer an export no more. Its clients' requests in flight are finished, then they are
        hung up on; returns when they are gone."""
        self._exports.remove(export)
        for connection in self._connections:
            if connection.export is export:
                connection.stop()
        while self.clients_of(export):
            await self._left.park()

    async def run(self, listeners: Sequence[Listener]) -> None:
        """Serve until `stop`; the listeners, which accept connections already, are closed.

        Cancelling it drops all connections at once. At most once per Server.
        """
        with self._serving:
            async with trio.open_nursery() as clients:
                with self._accepting:
                    await self._acceptor.run(listeners, clients)
        if self._serving.cancelled_caught:
            logger.warning("requests in flight were dropped after %g s", STOP_TIMEOUT)

    def stop(self) -> None:
        """Accept no more clients, finish what is in flight, then have `run` return.

        Requests that take longer than `STOP_TIMEOUT` are dropped.
        """
        self._accepting.cancel()
        self._serving.deadline = min(self._serving.deadline, trio.current_time() + STOP_TIMEOUT)
        for connection in self._connections:
            connection.stop()

    async def _serve(self, client: Client) -> None:
        """Serve one client until its connection ends."""

        def admit() -> str:
            refusal = self._admit(connection)
            if not refusal:
                self._acceptor.settle(client)
            return refusal

        connection = Connection(
            client.socket,
            client.peer,
            self._exports,
            admit,
            self._handshake_turn,
            self._room,
            self.traffic,
            self._tls,
        )
        self._connections.add(connection)
        self._report_clients()
        try:
            if self._accepting.cancel_called:
                connection.stop()
            await connection.run()
        finally:
            self._connections.remove(connection)
            self._left.unpark_all()
            self._admitted.pop(connection, None)
            self._report_clients()

    def _admit(self, connection: Connection) -> str:
        """Why the connection may not go on to the transmission phase, or "" if it may."""
        most = self.max_clients
        if len(self._admitted) >= most:
            gone = next((each for each in self._admitted if each.lingering), None)
            if gone is None:
                if self._full.begins():
                    logger.warning("%d clients are connected: no more are served", most)
                return f"{most} clients are connected, and no more are served at once"
            gone.drop()
            self._admitted.pop(gone)
        self._admitted[connection] = None
        return ""

    def _report_clients(self) -> None:
        if self._clients_changed is None:
            return
        try:
            self._clients_changed(self.clients)
        except Exception:
            logger.exception("unexpected error in what follows the number of clients")
