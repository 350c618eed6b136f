# SPDX-License-Identifier: Apache-2.0
"""libcurl's event loop, in a thread of its own, for callers in any number of other threads.

All transfers share one thread, one cache of connections, of names and of TLS sessions. So a
connection that is idle is used by whichever request comes next, streams of HTTP/2 share one,
and Python's lock is taken where bytes are handed over, not where they are waited for.

Source: libcurl-multi(3), curl_multi_socket_action(3).
"""

import os
import select
import threading
from collections import deque
from typing import Any

import pycurl

from nbdstream.web.errors import LinkError, WebError

# Connections that are kept open though nothing goes over them.
IDLE_MOST = 64

# What is wrong with the request or with the server's certificate.
_LASTING = frozenset(
    {
        pycurl.E_URL_MALFORMAT,
        pycurl.E_PEER_FAILED_VERIFICATION,
        pycurl.E_SSL_CACERT_BADFILE,
        pycurl.E_SSL_CERTPROBLEM,
    }
)
# libcurl says that a socket is this, or may be that.
_AS_EPOLL = {
    pycurl.POLL_IN: select.EPOLLIN,
    pycurl.POLL_OUT: select.EPOLLOUT,
    pycurl.POLL_INOUT: select.EPOLLIN | select.EPOLLOUT,
}


class _Ticket:
    """A transfer under way; ``failure`` is valid once ``done`` is set."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.failure: tuple[int, str] | None = None


class Transfers:
    """Carries out transfers; `perform` may be called from any thread."""

    def __init__(self, connections: int = 0) -> None:
        """``connections``: how many to one host at the most; more transfers wait. 0: any."""
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        self._multi.setopt(pycurl.M_PIPELINING, pycurl.PIPE_MULTIPLEX)
        self._multi.setopt(pycurl.M_MAXCONNECTS, IDLE_MOST)
        self._multi.setopt(pycurl.M_MAX_HOST_CONNECTIONS, connections)
        self._shared = pycurl.CurlShare()
        for kind in (pycurl.LOCK_DATA_SSL_SESSION, pycurl.LOCK_DATA_COOKIE):
            self._shared.setopt(pycurl.SH_SHARE, kind)
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._watched: set[int] = set()
        self._timeout: float = -1
        self._waiting: deque[tuple[Any, _Ticket]] = deque()
        self._tickets: dict[Any, _Ticket] = {}

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="transfers", daemon=True).start()

    def perform(self, easy: Any) -> None:
        """Carry out the transfer of a handle, and close it.

        Raises LinkError if it ended early, WebError if another try would end the same way.
        """
        ticket = _Ticket()
        easy.setopt(pycurl.SHARE, self._shared)
        self._waiting.append((easy, ticket))
        os.eventfd_write(self._bell, 1)
        ticket.done.wait()
        if ticket.failure is not None:
            code, words = ticket.failure
            kind = WebError if code in _LASTING else LinkError
            raise kind(words or f"libcurl's error {code}")

    # -- the thread --------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            ready = self._epoll.poll(self._timeout)
            if not ready:
                self._timeout = -1
                self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
            for fd, events in ready:
                if fd == self._bell:
                    os.eventfd_read(fd)
                else:
                    self._multi.socket_action(fd, _as_libcurl(events))
            while self._waiting:
                easy, ticket = self._waiting.popleft()
                self._tickets[easy] = ticket
                self._multi.add_handle(easy)
            self._collect()

    def _collect(self) -> None:
        """End the transfers that are done."""
        while True:
            queued, good, bad = self._multi.info_read()
            for easy in good:
                self._end(easy, None)
            for easy, code, text in bad:
                self._end(easy, (code, text))
            if not queued:
                return

    def _end(self, easy: Any, failure: tuple[int, str] | None) -> None:
        self._multi.remove_handle(easy)
        ticket = self._tickets.pop(easy)
        ticket.failure = failure
        easy.close()
        ticket.done.set()

    def _watch(self, what: int, fd: int, _multi: object, _data: object) -> None:
        """libcurl says what it waits for on a socket."""
        if what == pycurl.POLL_REMOVE:
            self._watched.discard(fd)
            try:
                self._epoll.unregister(fd)
            except OSError:
                pass  # closed already, which has the same effect
        elif fd in self._watched:
            self._epoll.modify(fd, _AS_EPOLL[what])
        else:
            self._watched.add(fd)
            self._epoll.register(fd, _AS_EPOLL[what])

    def _set_timer(self, milliseconds: int) -> None:
        self._timeout = -1 if milliseconds < 0 else milliseconds / 1000


def _as_libcurl(events: int) -> int:
    found = pycurl.CSELECT_IN if events & (select.EPOLLIN | select.EPOLLHUP) else 0
    found |= pycurl.CSELECT_OUT if events & select.EPOLLOUT else 0
    return found | (pycurl.CSELECT_ERR if events & select.EPOLLERR else 0)
