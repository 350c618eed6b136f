# SPDX-License-Identifier: Apache-2.0
"""Socket addresses and NBD URIs: the one place that parses them and writes them.

A `SocketAddress` is written ``HOST:PORT``, ``[IPv6]:PORT`` or ``unix:PATH``; PATH is taken
as it is, without any quoting. An `NbdUri` is what NBD's doc/uri.md describes. There is one
quoting rule: every byte but RFC 3986's unreserved characters is percent-encoded, in paths
of sockets the ``/`` is kept too. So ``/``, ``?``, ``#``, ``%`` and ``+`` in a name survive
any reader of URIs.

For both, writing and parsing are inverse: ``parse(str(x)) == x``.
"""

import os
import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

from nbdstream.errors import UsageError

# Where an NBD server is expected if a URI does not name a port (IANA).
NBD_PORT = 10809
# The schemes that libnbd connects to.
NBD_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")

_UNIX = "unix:"
_HIGHEST_PORT = 65535
_VSOCK_HOST = 2  # vsock(7): VMADDR_CID_HOST
# Beyond the unreserved characters, a host may hold what separates the parts of IPv6.
_HOST_SAFE = ":"


@dataclass(frozen=True)
class TcpAddress:
    """``host`` is a name or an IP address without brackets; "" means all addresses for a
    listener and this host for a client."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.bracketed}:{self.port}"

    @property
    def bracketed(self) -> str:
        """The host as it stands before a colon and a port."""
        return f"[{self.host}]" if ":" in self.host else self.host


# Bytes of a Unix socket's path at the most; see unix(7), sun_path.
UNIX_PATH_MOST = 107


@dataclass(frozen=True)
class UnixAddress:
    """``path`` in the file system, or in the abstract namespace if it begins with NUL."""

    path: str

    def __str__(self) -> str:
        return _UNIX + self.path


@dataclass(frozen=True)
class VsockAddress:
    """A virtual machine's socket (vsock(7)); only in NBD URIs."""

    cid: int
    port: int


SocketAddress = TcpAddress | UnixAddress


def parse_address(text: str) -> SocketAddress:
    """``HOST:PORT``, ``[IPv6]:PORT`` or ``unix:PATH``.

    Raises:
        UsageError: it is none of these.
    """
    if text.startswith(_UNIX):
        path = text.removeprefix(_UNIX)
        if not path:
            raise UsageError(f"'{text}' names no path: give unix:PATH")
        return UnixAddress(path)
    return parse_tcp(text)


def parse_tcp(text: str) -> TcpAddress:
    """``HOST:PORT`` or ``[IPv6]:PORT``; an empty host is let pass.

    Raises:
        UsageError: it is neither.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]") and ":" in host:
        host = host[1:-1]
    elif ":" in host:
        raise UsageError(f"'{text}': put an IPv6 address in brackets, as in [::1]:10809")
    if not colon or not _is_port(port):
        raise UsageError(f"'{text}' is not HOST:PORT")
    if re.search(r"[\s\0/\[\]]", host):
        raise UsageError(f"'{text}': {host!r} is not a host")
    return TcpAddress(host, int(port))


@dataclass(frozen=True)
class NbdUri:
    """An export at an address.

    ``export`` is the name as the server knows it. ``tls``: the scheme demands TLS.
    ``user`` is the userinfo, "" for none. ``parameters`` are the query's, in order and
    decoded, without ``socket``.
    """

    address: SocketAddress | VsockAddress
    export: str = ""
    tls: bool = False
    user: str = ""
    parameters: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        scheme = "nbds" if self.tls else "nbd"
        parameters = list(self.parameters)
        query = [f"{_quoted(name)}={_quoted(value)}" for name, value in parameters]
        if isinstance(self.address, UnixAddress):
            scheme += "+unix"
            authority = ""
            query.insert(0, f"socket={quote(os.fsencode(self.address.path), safe='/')}")
        elif isinstance(self.address, VsockAddress):
            scheme += "+vsock"
            authority = f"{self.address.cid}:{self.address.port}"
        else:
            host = quote(self.address.host, safe=_HOST_SAFE)
            authority = str(TcpAddress(host, self.address.port))
        user = f"{_quoted(self.user)}@" if self.user else ""
        tail = f"?{'&'.join(query)}" if query else ""
        return f"{scheme}://{user}{authority}/{_quoted(self.export)}{tail}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Take a URI apart.

        Raises:
            UsageError: it is no NBD URI.
        """
        # urlsplit drops these silently, and a URI has none of them.
        if re.search(r"[\x00-\x20\x7f\ud800-\udfff]", text):
            raise UsageError(
                f"{text!r}: a URI is UTF-8, and has no spaces and no control characters"
            )
        if not is_nbd_uri(text):
            raise UsageError(
                f"{text}: not an NBD URI (nbd://HOST/EXPORT, nbd+unix:///EXPORT?socket=…)"
            )
        try:
            parts = urlsplit(text)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise UsageError(f"{text}: the URI's host or port makes no sense ({error})") from error
        transport = parts.scheme.partition("+")[2]
        parameters = _parameters(parts.query)
        address: SocketAddress | VsockAddress
        if transport == "unix":
            sockets = [value for name, value in parameters if name == "socket"]
            if len(sockets) != 1 or not sockets[0]:
                raise UsageError(f"{text}: an nbd+unix URI needs ?socket=PATH, once")
            address = UnixAddress(os.fsdecode(sockets[0]))
            parameters = [(name, value) for name, value in parameters if name != "socket"]
        elif transport == "vsock":
            address = VsockAddress(_cid(text, host), port or NBD_PORT)
        else:
            # A host is the same in either case, however it is spelled.
            address = TcpAddress(unquote(host).lower(), NBD_PORT if port is None else port)
        return cls(
            address,
            unquote(parts.path.removeprefix("/")),
            parts.scheme.startswith("nbds"),
            unquote(parts.username or ""),
            tuple((name, value.decode(errors="replace")) for name, value in parameters),
        )


def is_nbd_uri(text: str) -> bool:
    """Whether the scheme is one of NBD's."""
    scheme, colon, rest = text.partition(":")
    return scheme.lower() in NBD_SCHEMES and bool(colon) and rest.startswith("//")


def _parameters(query: str) -> list[tuple[str, bytes]]:
    """A query's parameters. Unlike in a form on the web, ``+`` is a plus sign."""
    pairs = (pair.partition("=") for pair in query.split("&") if pair)
    return [(unquote(name), unquote_to_bytes(value)) for name, _, value in pairs]


def _cid(uri: str, host: str) -> int:
    """The context ID of a vsock URI; without one it is the host's, as for libnbd."""
    if not re.fullmatch(r"[0-9]{1,10}|", host):
        raise UsageError(f"{uri}: '{host}' is not a vsock context ID, which is a number")
    return int(host or _VSOCK_HOST)


def _quoted(text: str) -> str:
    return quote(text, safe="")


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) <= _HIGHEST_PORT
