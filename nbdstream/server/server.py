# SPDX-License-Identifier: Apache-2.0
"""The NBD server: accepts clients on its listeners, and serves its exports to them.

    async with trio.open_nursery() as nursery:
        server = Server([export])
        nursery.start_soon(server.run, listeners)
        ...
        server.stop()

`Server.run` returns when `Server.stop` was called, every request in flight was answered
and every connection is closed.
"""

import errno
import itertools
import logging
import socket
from collections.abc import Callable, Iterable, Sequence

import trio

from nbdstream.export import Export
from nbdstream.net.listeners import Listener, close_all
from nbdstream.server.connection import Connection
from nbdstream.server.wire import Wire

logger = logging.getLogger(__name__)

# Connections at any time; more have to wait in the listening sockets' queues.
MAX_CLIENTS = 128
# Seconds that requests in flight get when the server stops.
STOP_TIMEOUT = 30.0
# Seconds to wait when the system has no file descriptor or memory for one more client.
_OVERLOAD_PAUSE = 0.1
_OVERLOAD = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Server:
    """Serves ``exports`` (no two of the same name).

    ``clients_changed`` is called with the number of connected clients whenever it changes.
    """

    def __init__(
        self,
        exports: Iterable[Export],
        *,
        clients_changed: Callable[[int], None] | None = None,
    ) -> None:
        self._exports: Sequence[Export] = tuple(exports)
        names = [export.name for export in self._exports]
        assert len(set(names)) == len(names), names
        self._clients_changed = clients_changed
        self._connections: set[Connection] = set()
        self._numbers = itertools.count(1)  # to tell clients apart in the log
        self._vacancies = trio.Semaphore(MAX_CLIENTS)
        self._accepting = trio.CancelScope()
        self._serving = trio.CancelScope()

    @property
    def clients(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    async def run(self, listeners: Sequence[Listener]) -> None:
        """Serve until `stop`; the listeners, which accept connections already, are closed.

        Cancelling it drops all connections at once. At most once per Server.
        """
        with self._serving:
            async with trio.open_nursery() as clients:
                try:
                    with self._accepting:
                        async with trio.open_nursery() as acceptors:
                            for listener in listeners:
                                acceptors.start_soon(self._accept, listener, clients)
                finally:
                    close_all(listeners)
        if self._serving.cancelled_caught:
            logger.warning("requests in flight were dropped after %g s", STOP_TIMEOUT)

    def stop(self) -> None:
        """Accept nobody any more, finish what is in flight, then have `run` return.

        Requests that take longer than `STOP_TIMEOUT` are dropped.
        """
        self._accepting.cancel()
        self._serving.deadline = trio.current_time() + STOP_TIMEOUT
        for connection in self._connections:
            connection.stop()

    async def _accept(self, listener: Listener, clients: trio.Nursery) -> None:
        """Accept clients for ever."""
        while True:
            await self._vacancies.acquire()
            sock, address = await _next_client(listener)
            # There is no checkpoint before the task has started, so nothing can get lost.
            clients.start_soon(self._serve, sock, f"{next(self._numbers)} ({address})")

    async def _serve(self, sock: socket.socket, peer: str) -> None:
        """Serve one client; whatever goes wrong, the others do not notice."""
        connection = Connection(Wire(sock), peer, self._exports)
        self._connections.add(connection)
        self._report_clients()
        try:
            if self._accepting.cancel_called:
                connection.stop()
            await connection.run()
        except Exception:
            logger.exception("client %s: unexpected error; closing its connection", peer)
        finally:
            sock.close()
            self._connections.remove(connection)
            self._vacancies.release()
            self._report_clients()

    def _report_clients(self) -> None:
        if self._clients_changed:
            self._clients_changed(self.clients)


async def _next_client(listener: Listener) -> tuple[socket.socket, str]:
    """Wait for a client, through whatever may go wrong with one or for a moment."""
    while True:
        await trio.lowlevel.wait_readable(listener.socket)
        try:
            return listener.accept()
        except OSError as error:
            if error.errno in _OVERLOAD:
                logger.warning("cannot accept a client now: %s", error.strerror)
                await trio.sleep(_OVERLOAD_PAUSE)
            # Anything else is about that one client, which is gone already.
