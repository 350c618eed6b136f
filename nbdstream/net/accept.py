# SPDX-License-Identifier: Apache-2.0
"""Accepts clients, for every server in this process, whatever goes wrong with one of them.

What must hold:

- At most ``limit`` clients are *unsettled* at any time. Which are is the server's choice:
  the NBD server settles a client whose handshake is done, the control socket settles none.
- A newcomer who finds no room waits for ``grace`` seconds at most. Then it gets the place
  of the client that has been silent the longest, if that is ``grace`` seconds or more;
  otherwise it is refused with ``refusal`` and closed. It never hangs without an answer.
- Without a free descriptor a newcomer is refused in the same way, by means of a descriptor
  that is held in reserve. A shortage of memory makes the accept loop pause.
- An exception ends the connection that raised it, with one entry in the log, and nothing
  else. Each kind of trouble is logged once for each episode.
"""

import errno
import itertools
import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import trio

from nbdstream.net.listeners import Listener, close_all

log = logging.getLogger(__name__)

# Seconds between attempts while the system has no memory for a client, or no descriptor.
PAUSE = 0.1
# An episode of trouble has ended when there was none for so many seconds.
EPISODE = 60.0

_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
_NO_MEMORY = (errno.ENOBUFS, errno.ENOMEM)
# accept(2): about that one client, which is gone already.
_ABOUT_ONE_CLIENT = (
    errno.ECONNABORTED,
    errno.EPERM,
    errno.EPROTO,
    errno.ENETDOWN,
    errno.ENOPROTOOPT,
    errno.EHOSTDOWN,
    errno.ENONET,
    errno.EHOSTUNREACH,
    errno.EOPNOTSUPP,
    errno.ENETUNREACH,
    errno.ECONNRESET,
    errno.EINVAL,  # setsockopt of one that is gone
)


class Episode:
    """Tells the first of a series of troubles from those that follow it."""

    def __init__(self) -> None:
        self._last = -math.inf

    def begins(self) -> bool:
        """Call it for each trouble; returns whether to log it."""
        now = trio.current_time()
        first = now - self._last >= EPISODE
        self._last = now
        return first


@dataclass(eq=False)
class Client:
    """An accepted connection.

    ``socket`` is non-blocking; the acceptor closes it. ``peer`` names the client in the log.
    """

    socket: socket.socket
    peer: str
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    last_active: float = field(default_factory=trio.current_time)

    def active(self) -> None:
        """The client did something: others are to be dropped before it."""
        self.last_active = trio.current_time()


class Acceptor:
    """Accepts the clients of one server.

    ``what``: what they are called in the log. ``serve``: serves one client, until the
    connection ends; cancelled when the client is dropped. ``limit``, ``grace`` in seconds,
    ``refusal``: see the module.
    """

    def __init__(
        self,
        what: str,
        serve: Callable[[Client], Awaitable[None]],
        *,
        limit: int,
        grace: float,
        refusal: bytes = b"",
    ) -> None:
        self._what = what
        self._handle = serve
        self._limit = limit
        self._grace = grace
        self._refusal = refusal
        self._unsettled: dict[Client, None] = {}
        self._left = trio.lowlevel.ParkingLot()  # unparked when a client leaves or settles
        self._numbers = itertools.count(1)  # to tell clients apart in the log
        self._reserve = -1
        self._full, self._shortage, self._broken = Episode(), Episode(), Episode()

    async def run(self, listeners: Sequence[Listener], clients: trio.Nursery) -> None:
        """Accept clients until cancelled; each is served by a task in ``clients``.

        Closes the listeners.
        """
        try:
            self._take_reserve()
            async with trio.open_nursery() as nursery:
                for listener in listeners:
                    nursery.start_soon(self._accept, listener, clients)
        finally:
            close_all(listeners)
            self._drop_reserve()

    def settle(self, client: Client) -> None:
        """The client no longer counts, and is not dropped for another."""
        self._unsettled.pop(client, None)
        self._left.unpark_all()

    async def _accept(self, listener: Listener, clients: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener.socket)
            try:
                if await self._room():
                    self._welcome(listener, clients)
                else:
                    self._refuse(listener)
            except BlockingIOError:
                pass  # the client left while it waited for room
            except OSError as error:
                await self._endure(error, listener)

    async def _room(self) -> bool:
        """Wait until a client may come in; False if it is to be refused."""
        deadline = trio.current_time() + self._grace
        while len(self._unsettled) >= self._limit:
            silent = min(self._unsettled, key=lambda client: client.last_active)
            patience = silent.last_active + self._grace
            now = trio.current_time()
            if patience <= now:
                self._log_full("the one that was silent the longest is dropped")
                silent.scope.cancel()
                self.settle(silent)
            elif deadline <= now:
                self._log_full("no more are let in")
                return False
            else:
                with trio.move_on_at(min(patience, deadline)):
                    await self._left.park()
        return True

    def _welcome(self, listener: Listener, clients: trio.Nursery) -> None:
        sock, address = listener.accept()
        client = Client(sock, f"{next(self._numbers)} ({address})")
        self._unsettled[client] = None
        # There is no checkpoint before the task has started, so nothing can get lost.
        clients.start_soon(self._serve, client)

    def _refuse(self, listener: Listener) -> None:
        """Let a client in only to say no."""
        sock, _ = listener.accept()
        with sock:
            try:
                sock.send(self._refusal)
            except OSError:
                pass  # it does not want to know

    async def _endure(self, error: OSError, listener: Listener) -> None:
        """Deal with an accept that failed, so that the next one may succeed."""
        if error.errno in _NO_DESCRIPTOR:
            if self._shortage.begins():
                log.warning(
                    "%ss are refused for want of file descriptors: %s", self._what, error.strerror
                )
            if not self._refuse_by_reserve(listener):
                await trio.sleep(PAUSE)
        elif error.errno in _NO_MEMORY:
            if self._shortage.begins():
                log.warning("cannot accept a %s now: %s", self._what, error.strerror)
            await trio.sleep(PAUSE)
        elif error.errno not in _ABOUT_ONE_CLIENT:
            if self._broken.begins():
                log.error("cannot accept %ss: %s", self._what, error)
            await trio.sleep(PAUSE)

    def _refuse_by_reserve(self, listener: Listener) -> bool:
        """Refuse one client in place of the descriptor held in reserve; whether it worked."""
        if self._reserve < 0:
            self._take_reserve()
            return False
        self._drop_reserve()
        try:
            self._refuse(listener)
        except OSError:
            return False
        finally:
            self._take_reserve()
        return True

    def _take_reserve(self) -> None:
        try:
            self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._reserve = -1

    def _drop_reserve(self) -> None:
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1

    async def _serve(self, client: Client) -> None:
        """Serve one client; whatever goes wrong, the others do not notice."""
        try:
            with client.scope:
                await self._handle(client)
        except* Exception as group:  # a cancellation beside it goes on
            log.exception(
                "%s %s: unexpected error; closing its connection",
                self._what,
                client.peer,
                exc_info=group if len(group.exceptions) > 1 else group.exceptions[0],
            )
        finally:
            client.socket.close()
            self.settle(client)

    def _log_full(self, consequence: str) -> None:
        if self._full.begins():
            log.warning("there are %d %ss already: %s", self._limit, self._what, consequence)
