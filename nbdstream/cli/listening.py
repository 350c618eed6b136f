# SPDX-License-Identifier: Apache-2.0
"""Where clients connect, and whether by TLS, as the options of ``serve`` say."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click

from nbdstream.cli.places import SOCKET_MODE, private_socket
from nbdstream.errors import UsageError
from nbdstream.net.address import parse_tcp
from nbdstream.net.listeners import Listener, close_all, from_systemd, listen_tcp, listen_unix
from nbdstream.server.certificates import TlsPolicy
from nbdstream.server.handshake import Tls

_ONE_PLACE = "give one of -U, --listen, or sockets by systemd's socket activation"


def refuse_psk(_context: click.Context, _option: click.Parameter, file: str | None) -> None:
    """Say what to do to those who look for nbdkit's ``--tls-psk``. Raises UsageError."""
    if file is not None:
        raise UsageError(
            "no pre-shared keys for clients: Python's TLS has none before 3.13. Put nbdkit in "
            f"front: nbdkit --tls=require --tls-psk={file} nbd uri=URI (docs/security.md)"
        )


def tls_policy(mode: str | None, directory: str | None, *, verify_peer: bool) -> TlsPolicy | None:
    """What the options say of TLS; None for none. Raises UsageError."""
    if directory is None:
        if verify_peer or mode not in (None, Tls.OFF.value):
            raise UsageError("TLS needs a certificate: name its directory (--tls-certificates DIR)")
        return None
    if mode == Tls.OFF.value:
        if verify_peer:
            raise UsageError("--tls-verify-peer makes no sense with --tls off")
        return None
    return TlsPolicy(Path(directory), mode != Tls.ON.value, verify_peer)


def check_places(socket: str | None, listen: str | None, metrics: str | None) -> None:
    """Whether listeners could be made of the options. Raises UsageError."""
    if socket and listen:
        raise UsageError(_ONE_PLACE)
    for address in filter(None, (listen, metrics)):
        parse_tcp(address)


@contextmanager
def listening(
    leaf: str, socket: str | None, listen: str | None, *, private: bool
) -> Iterator[list[Listener]]:
    """The listeners that the options ask for. Where they ask for none: a Unix socket for this
    user alone. ``private``: one that only our own child will use.

    Raises UsageError (they ask for two places, or for one that cannot be used), OSError.
    """
    inherited = from_systemd(os.environ)
    if sum(map(bool, (inherited, socket, listen))) > 1:
        raise UsageError(_ONE_PLACE)
    with ExitStack() as stack:
        if inherited:
            listeners = inherited
        elif listen:
            where = parse_tcp(listen)
            listeners = listen_tcp(where.host, where.port)
        elif socket and socket != "-":
            listeners = [listen_unix(Path(socket))]
        elif socket or private:
            temporary = tempfile.TemporaryDirectory(prefix="nbdstream-")
            directory = stack.enter_context(temporary)
            listeners = [listen_unix(Path(directory) / "nbd.sock", mode=SOCKET_MODE)]
        else:
            place = stack.enter_context(private_socket(leaf))
            listeners = [listen_unix(place, mode=SOCKET_MODE)]
        try:
            yield listeners
        finally:
            close_all(listeners)
