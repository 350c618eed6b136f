# SPDX-License-Identifier: Apache-2.0
"""Where clients connect: TCP and Unix sockets, our own or handed over by systemd.

A `Listener` is a listening, non-blocking socket that knows its address and what to clean
up. Errors are `UsageError` where the address makes no sense or is taken, else OSError.
"""

import errno
import os
import re
import socket
from collections.abc import Iterable, MutableMapping
from contextlib import suppress
from pathlib import Path

from nbdstream.errors import UsageError
from nbdstream.net.address import UNIX_PATH_MOST, NbdUri, SocketAddress, TcpAddress, UnixAddress

# Clients that wait to be accepted; the system's net.core.somaxconn may make it less.
BACKLOG = 4096
# An idle TCP client whose host is gone without a word is given up after this many seconds,
# plus so many probes at this interval: five minutes in all.
KEEPALIVE_IDLE = 60
KEEPALIVE_INTERVAL = 30
KEEPALIVE_PROBES = 8

_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_FIRST_FD = 3  # sd_listen_fds(3): SD_LISTEN_FDS_START
# What a Unix socket may hold of replies that the client has not read yet; the system's
# net.core.wmem_max may make it less. TCP sizes its buffers by itself.
_UNIX_SEND_BUFFER = 1 << 20


class Listener:
    """A listening socket; ``path`` is the file of a Unix socket that we made, ``inherited``
    whether our parent made it, who then knows where it is."""

    def __init__(
        self, sock: socket.socket, path: Path | None = None, *, inherited: bool = False
    ) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.inherited = inherited
        self._path = path
        self._identity = _identity(path) if path else None

    def uri(self, export_name: str = "", *, tls: bool = False) -> str:
        """The NBD URI of an export here; ``tls``: it demands TLS."""
        return str(NbdUri(self.address, export_name, tls))

    @property
    def address(self) -> SocketAddress:
        """Where it listens; the path of a Unix socket is absolute."""
        address = self.socket.getsockname()
        if self.socket.family != socket.AF_UNIX:
            return TcpAddress(*address[:2])
        if isinstance(address, bytes):  # in the abstract namespace
            return UnixAddress(os.fsdecode(address))
        return UnixAddress(str(Path(address).absolute()))

    def accept(self) -> tuple[socket.socket, str]:
        """A client's socket, non-blocking and ready for use, and where it comes from.

        Raises BlockingIOError if there is none, OSError.
        """
        client, address = self.socket.accept()
        try:
            _prepare(client)
        except OSError:
            client.close()
            raise
        if client.family == socket.AF_UNIX:
            return client, "unix"
        return client, f"{address[0]}:{address[1]}"

    def close(self) -> None:
        """Stop listening, and remove the socket's file if it is still the one we made.

        A file that cannot be removed, or that is removed at the same time, is no trouble: the
        next server replaces it.
        """
        self.socket.close()
        with suppress(OSError):
            if self._path and _identity(self._path) == self._identity:
                self._path.unlink()
        self._path = None


def listen_tcp(host: str, port: int) -> list[Listener]:
    """Listen on all addresses of ``host``, on one port; 0 lets the system choose it.

    Raises:
        UsageError: there is no such host, or its port is in use.
        OSError: the system refuses for another reason.
    """
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise UsageError(f"cannot listen on host '{host}': {error.strerror}") from error
    listeners: list[Listener] = []
    failure: OSError | None = None
    for family, _, _, _, address in found:
        try:
            sock = _bind_tcp(family, (address[0], port, *address[2:]))
        except OSError as error:
            if error.errno in _NO_SUCH_ADDRESS:  # such as ::1 where IPv6 is switched off
                failure = error
                continue
            close_all(listeners)
            if error.errno == errno.EADDRINUSE:
                raise UsageError(f"port {port} of host '{host}' is in use") from error
            raise
        listeners.append(Listener(sock))
        port = sock.getsockname()[1]
    if failure and not listeners:
        raise UsageError(f"cannot listen on host '{host}': {failure.strerror}") from failure
    return listeners


def _bind_tcp(family: int, address: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # The IPv4 addresses of the host get sockets of their own.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_unix(path: Path, *, mode: int | None = None) -> Listener:
    """Listen on a Unix socket; one that a dead server left behind is replaced.

    ``mode`` narrows who may connect, from the first moment on; None leaves that to the umask.

    Raises:
        UsageError: the path is too long, is no socket, or another server listens there.
        OSError: the system refuses for another reason.
    """
    if len(os.fsencode(path)) > UNIX_PATH_MOST:
        raise UsageError(
            f"the path of the Unix socket '{path}' is longer than {UNIX_PATH_MOST} bytes"
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if mode is not None:
            os.fchmod(sock.fileno(), mode)  # Linux gives the file the mode of the socket
        try:
            sock.bind(os.fspath(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            sock.bind(os.fspath(path))
        sock.listen(BACKLOG)
        return Listener(sock, path)
    except BaseException:
        sock.close()
        raise


def _remove_stale(path: Path) -> None:
    """Remove the Unix socket at ``path`` if no server answers there."""
    if not path.is_socket():
        raise UsageError(f"'{path}' exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # its backlog is full: it lives
    raise UsageError(f"another server listens on the Unix socket '{path}'")


def from_systemd(environment: MutableMapping[str, str]) -> list[Listener]:
    """The sockets that our parent hands over by sd_listen_fds(3); none if it doesn't.

    The variables are removed from ``environment``, so that no child takes them for its own.
    Raises UsageError if they name what is no listening socket.
    """
    pid = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return []
    if not re.fullmatch("[0-9]{1,9}", count):
        raise UsageError(f"LISTEN_FDS is {count[:20]!r}, which is not a number of descriptors")
    return [_inherited(fd) for fd in range(_FIRST_FD, _FIRST_FD + int(count))]


def _inherited(fd: int) -> Listener:
    try:
        sock = socket.socket(fileno=fd)
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise UsageError(f"file descriptor {fd} from LISTEN_FDS: {error.strerror}") from error
    if not listening or sock.type != socket.SOCK_STREAM:
        sock.close()
        raise UsageError(f"file descriptor {fd} from LISTEN_FDS is no listening stream socket")
    sock.set_inheritable(False)
    return Listener(sock, inherited=True)


def _prepare(client: socket.socket) -> None:
    """Set the options of a client's socket. Raises OSError."""
    client.setblocking(False)
    if client.family == socket.AF_UNIX:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BUFFER)
        return
    # Replies are whole when they are sent: never wait for more to send along.
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def close_all(listeners: Iterable[Listener]) -> None:
    """Close each of them."""
    for listener in listeners:
        listener.close()


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file is at ``path``, if there is one."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
