# SPDX-License-Identifier: Apache-2.0
"""From an NBD URI to a negotiated `Connection`, or one line that says why not.

The handshake is libnbd's; it is held in option mode so that a refused export can be
answered with the names of those that exist. It happens in the event loop, over a socket
that `nbdstream.net.connect` has connected.

TLS over TCP is the exception. libnbd checks a server's certificate against the name of its host,
and before `set_tls_hostname` (1.20) it knows that name only if it has looked it up by itself.
So there, name look-up and connecting are libnbd's, in a worker thread. While that is under
way libnbd has the handle locked, and any other caller of one of its methods waits as well:
a handle that is given up before its thread is done is left to the thread.
"""

import errno
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import nbd
import trio

from nbdstream.backing.connection import Connection, plain, wait_ready
from nbdstream.backing.grant import Priority
from nbdstream.backing.tls import TlsClient
from nbdstream.backing.window import UNIT_LEAST
from nbdstream.errors import BackingError, BackingGoneError, UsageError
from nbdstream.net.address import NbdUri, TcpAddress
from nbdstream.net.connect import lookup_limiter, open_socket
from nbdstream.tasks import in_worker

# A handshake takes about five round trips; no caller waits longer than this for one.
CONNECT_TIMEOUT = 30.0
# Export names shown when the one asked for does not exist.
NAMES_SHOWN = 8


@dataclass(frozen=True)
class OwnServer:
    """What is known of a server that is a process of our own on this host.

    ``identity``: the fingerprint of what it serves, which it vouches for by the export's name.
    ``classes``: the URI for reads of each background class. ``wake`` starts the process if it
    does not run; it raises BackingError if that fails.
    """

    identity: str
    classes: Mapping[Priority, str]
    wake: Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Endpoint:
    """Where a backing is served, and what is known of serving it.

    ``name``: what the user calls it, for messages. ``tls``: how to speak TLS there, None for a
    connection in clear. ``unit_least``: a background read
    below this would not be worth its request. ``bulk_connections``: how many to make for
    background reads. ``own``: set if the server is ours.
    """

    uri: str
    name: str
    tls: TlsClient | None = None
    unit_least: int = UNIT_LEAST
    bulk_connections: int = 3
    own: OwnServer | None = None


async def connect(endpoint: Endpoint, timeout: float = CONNECT_TIMEOUT) -> Connection:  # noqa: ASYNC109
    """Connect to an endpoint by its NBD URI (NBD's doc/uri.md).

    Raises:
        BackingGoneError: no server answers, or not in ``timeout`` seconds: this may change.
        BackingError: the server answers, but not with this export: a misconfiguration.
    """
    name = endpoint.name
    try:
        uri = NbdUri.parse(endpoint.uri)
    except UsageError as error:
        raise BackingError(str(error)) from error
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    # The caller's buffer is only looked at after success, so nothing has to be cleared.
    handle.set_pread_initialize(False)
    # The odd tail of an export whose size is no multiple of its block size is worth asking
    # for, so alignment is the server's to judge.
    handle.set_strict_mode(nbd.STRICT_MASK & ~nbd.STRICT_ALIGN)
    started = connected = False
    try:
        with trio.move_on_after(timeout):
            if endpoint.own is not None:
                await endpoint.own.wake()
            await _start(handle, uri, endpoint.tls)
            started = True
            await _settle(handle)
            if not handle.aio_is_ready():  # a server without options is ready by now
                await _choose_export(handle, name)
            connection = _connection(handle, name)
            connected = True
            return connection
    except nbd.Error as error:
        raise _explain(endpoint, error) from error
    except OSError as error:
        raise _explain_system(name, error) from error
    finally:
        if started and not connected:
            _hang_up(handle)
    raise BackingGoneError(f"{name}: no answer in {timeout:g} s")


async def _start(handle: nbd.NBD, uri: NbdUri, tls: TlsClient | None) -> None:
    """Connect the handle's socket. Raises nbd.Error, OSError, BackingError."""
    handle.set_export_name(uri.export)
    if tls is not None:
        tls.configure(handle)
        if isinstance(uri.address, TcpAddress):
            await in_worker(
                handle.aio_connect_tcp,
                uri.address.host or "localhost",
                str(uri.address.port),
                limiter=lookup_limiter(),
                abandon_on_cancel=True,
            )
            return
    sock = await open_socket(uri.address)
    handle.aio_connect_socket(sock.detach())


def _connection(handle: nbd.NBD, name: str) -> Connection:
    if handle.get_size() <= 0:  # negative: 2^63 bytes or more
        raise BackingError(f"{name}: the export has a size of {handle.get_size()} bytes")
    return Connection(handle)


def _hang_up(handle: nbd.NBD) -> None:
    """Let the server go now, and not when the last reference to the handle goes."""
    try:
        sock = socket.socket(fileno=handle.aio_get_fd())
    except (nbd.Error, OSError):
        return  # not connected, or not any more
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the server was first
    finally:
        sock.detach()  # the descriptor is libnbd's


async def _settle(handle: nbd.NBD) -> None:
    """Let libnbd go on until it waits for us: between options, ready, or at an end."""
    while handle.aio_is_connecting():
        if await wait_ready(handle):
            handle.aio_notify_write()
        else:
            handle.aio_notify_read()
    if handle.aio_is_closed():
        raise nbd.Error("the server closed the connection during the handshake", errno.EPROTO)


async def _choose_export(handle: nbd.NBD, name: str) -> None:
    """Ask for the URI's export. Raises BackingError if the server refuses it."""
    code = errno.EPROTO

    def answered(error: Any) -> int:
        nonlocal code
        code = error.value
        return 0

    handle.aio_opt_go(answered)
    await _settle(handle)
    if handle.aio_is_ready():
        return
    export = handle.get_export_name()
    if code == errno.ENOTSUP and not handle.get_tls_negotiated():
        raise BackingError(f"{name}: the server wants TLS: use nbds:// (or nbds+unix://)")
    if code != errno.ENOENT:
        raise BackingError(f"{name}: the server refuses export {export!r}: {os.strerror(code)}")
    offered = await _export_names(handle)
    raise BackingError(f"{name}: the server has no export {export!r}{offered}")


async def _export_names(handle: nbd.NBD) -> str:
    """What to say of the exports that there are, or "" if the server will not tell."""
    names: list[str] = []

    def offered(name: str, _description: str) -> int:
        names.append(name)
        return 0

    handle.aio_opt_list(offered)
    await _settle(handle)
    if not names:
        return ""
    shown = ", ".join(repr(name) for name in names[:NAMES_SHOWN])
    return f"; it offers {shown}" + (" and others" if len(names) > NAMES_SHOWN else "")


def _explain_system(name: str, error: OSError) -> BackingError:
    """One line for a socket that cannot be connected."""
    if isinstance(error, socket.gaierror):
        return BackingGoneError(f"{name}: the host's name cannot be looked up: {error.strerror}")
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
        return BackingGoneError(f"{name}: no server listens there ({error.strerror})")
    return BackingGoneError(f"{name}: cannot connect: {error.strerror or error}")


def _explain(endpoint: Endpoint, error: nbd.Error) -> BackingError:
    """One line for a failed connect or handshake."""
    name, text = endpoint.name, plain(error)
    if "magic" in text:
        return BackingError(f"{name}: what listens there is no NBD server ({text})")
    if error.errnum in (errno.ENOENT, errno.ECONNREFUSED):
        return BackingGoneError(f"{name}: no server listens there ({os.strerror(error.errnum)})")
    if endpoint.tls is not None:
        return _explain_tls(name, error.errnum, text)
    if error.errnum == errno.EINVAL:
        return BackingError(f"{name}: not a URI that libnbd understands ({text})")
    return BackingGoneError(f"{name}: cannot connect: {text}")


def _explain_tls(name: str, number: int, text: str) -> BackingError:
    """One line for a failed TLS handshake. What GnuTLS says of the reasons is not much."""
    if "certificate verification" in text:
        return BackingError(
            f"{name}: the server's certificate is refused: it has expired, is for another host, or "
            "comes from an authority that is not known here (tls-certificates=DIR)"
        )
    if number == errno.EINVAL:
        return BackingError(f"{name}: TLS cannot be set up: {text}")
    return BackingGoneError(
        f"{name}: no TLS connection: {text} (the server may not offer TLS, or may want a "
        "certificate or a key that it knows)"
    )
