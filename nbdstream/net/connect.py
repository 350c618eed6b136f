# SPDX-License-Identifier: Apache-2.0
"""From a socket address to a connected socket; the event loop never waits for it.

Names are looked up by getaddrinfo(3) in worker threads, because it blocks for as long as a
resolver pleases, which may be minutes. These threads have a limiter of their own, so that
look-ups that hang take no thread from those that read a guest's data.
"""

import errno
import os
import socket
from typing import Any

import trio

from nbdstream.net.address import (
    UNIX_PATH_MOST,
    SocketAddress,
    TcpAddress,
    UnixAddress,
    VsockAddress,
)
from nbdstream.tasks import in_worker

# Look-ups at a time. One that was given up still counts until the resolver lets go of it.
MAX_LOOKUPS = 4
# Seconds that an address gets before the next one is tried beside it (RFC 8305).
HEAD_START = 0.25
# Seconds between attempts to connect to a Unix socket whose backlog is full.
UNIX_RETRY = 0.02

_lookups: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("lookups")


def lookup_limiter() -> trio.CapacityLimiter:
    """The limiter of threads that may hang in a resolver."""
    try:
        return _lookups.get()
    except LookupError:
        limiter = trio.CapacityLimiter(MAX_LOOKUPS)
        _lookups.set(limiter)
        return limiter


async def open_socket(address: SocketAddress | VsockAddress) -> socket.socket:
    """A connected, non-blocking stream socket.

    Raises:
        OSError: no connection to any of the host's addresses; the error is the first one.
        socket.gaierror: the host has no address, as far as the resolver can tell.
    """
    if isinstance(address, UnixAddress):
        return await _open_unix(address.path)
    if isinstance(address, VsockAddress):
        return await _open_first([(socket.AF_VSOCK, (address.cid, address.port))])
    return await _open_first(await _look_up(address))


async def _look_up(address: TcpAddress) -> list[tuple[int, Any]]:
    """The family and the address of each way to reach a host, best first."""
    found = await in_worker(
        lambda: socket.getaddrinfo(
            address.host or "localhost", address.port, type=socket.SOCK_STREAM
        ),
        limiter=lookup_limiter(),
        abandon_on_cancel=True,
    )
    return [(family, target) for family, _, _, _, target in found]


async def _open_first(targets: list[tuple[int, Any]]) -> socket.socket:
    """Connect to the first of the targets that answers; each gets a head start."""
    opened: list[socket.socket] = []
    errors: list[OSError] = []
    async with trio.open_nursery() as attempts:

        async def attempt(family: int, target: Any, failed: trio.Event) -> None:
            try:
                sock = await _open(family, target)
            except OSError as error:
                errors.append(error)
                failed.set()
                return
            opened.append(sock)
            attempts.cancel_scope.cancel()

        for family, target in targets:
            failed = trio.Event()
            attempts.start_soon(attempt, family, target, failed)
            with trio.move_on_after(HEAD_START):
                await failed.wait()
    for late in opened[1:]:
        late.close()
    if not opened:
        await trio.lowlevel.checkpoint_if_cancelled()
        raise errors[0]
    return opened[0]


async def _open(family: int, target: Any) -> socket.socket:
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    with sock:
        if family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await sock.connect(target)
        return _plain(sock)


async def _open_unix(path: str) -> socket.socket:
    if len(os.fsencode(path)) > UNIX_PATH_MOST:  # Python's error has no number and no words
        words = f"the path of the Unix socket is longer than {UNIX_PATH_MOST} bytes"
        raise OSError(errno.ENAMETOOLONG, words)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        await trio.lowlevel.checkpoint()
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:  # not in progress, as with TCP: refused for now
                await trio.sleep(UNIX_RETRY)
            else:
                return _plain(sock)


def _plain(sock: socket.socket | trio.socket.SocketType) -> socket.socket:
    """The same connection as a socket of the standard library, which has to be closed."""
    plain = socket.socket(fileno=sock.detach())
    plain.setblocking(False)
    return plain
