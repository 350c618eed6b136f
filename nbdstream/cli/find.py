# SPDX-License-Identifier: Apache-2.0
"""From the name of a leaf to the control socket of the server that serves it.

A server marks its leaf with the path of the socket (`nbdstream.leaf.marks`). The mark alone
proves nothing: a server that crashed leaves it behind, and another one may listen there now. So
the server is asked which leaf it serves.
"""

import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nbdstream.errors import NbdstreamError
from nbdstream.leaf.base import Leaf
from nbdstream.leaf.marks import control_of, mark_control, unmark_control
from nbdstream.net.address import UnixAddress
from nbdstream.net.listeners import Listener

# Seconds for the server to say which leaf it serves.
ANSWER_SECONDS = 10.0
# Seconds for a program that listens somewhere in a directory to greet.
GREET_SECONDS = 3.0


@contextmanager
def findable(leaf: Leaf, control: Listener | None) -> Iterator[None]:
    """For as long as the block, the leaf's name stands for its server's control socket.

    Several servers may serve one leaf read-only, so such a leaf gets no mark.
    """
    if control is None or leaf.read_only:
        yield
        return
    # The working directory may be another one at the end.
    path, address = str(Path(leaf.path).absolute()), control.address
    assert isinstance(address, UnixAddress)
    socket = address.path
    mark_control(leaf.fd, socket)
    try:
        yield
    finally:
        unmark_control(path, socket)


def control_socket(name: str) -> str:
    """The control socket that a user means who names it, or the leaf that is being served.

    Raises NbdstreamError if ``name`` is a file and no server of it can be found, or a directory.
    """
    if Path(name).is_dir():
        raise NbdstreamError(f"{name} is a directory: name the control socket, or the leaf")
    if not _is_file(name):
        return name
    socket = control_of(name)
    if not socket:
        raise NbdstreamError(
            f"{name} is not being served with a control socket that is known: start its server "
            "with --control, or name the socket instead of the leaf"
        )
    if not _serves(socket, name):
        raise NbdstreamError(f"{name} is not being served any more, or not at {socket}")
    return socket


def control_sockets(directory: str) -> list[str]:
    """The control sockets of servers of ours in a directory, by name. Sockets of other programs
    are left out. Raises NbdstreamError if there is none; OSError."""
    import trio

    sockets = sockets_in(directory)
    found: list[str] = []

    async def look(path: str) -> None:
        if await is_ours(path):
            found.append(path)

    async def look_at_all() -> None:
        async with trio.open_nursery() as nursery:
            for path in sockets:
                nursery.start_soon(look, path)

    trio.run(look_at_all)
    if not found:
        raise NbdstreamError(
            f"{directory}: no control socket of a running server is in this directory"
        )
    return sorted(found)


def sockets_in(directory: str) -> list[str]:
    """The Unix sockets in a directory, by name. Raises OSError."""
    return sorted(str(path) for path in Path(directory).iterdir() if path.is_socket())


async def is_ours(path: str) -> bool:
    """Whether a server of ours has this control socket."""
    import trio

    from nbdstream.qmp.client import QMPClient
    from nbdstream.qmp.protocol import QMPError

    with trio.move_on_after(GREET_SECONDS), suppress(QMPError, OSError):
        async with await trio.open_unix_socket(path) as stream:
            if await stream.receive_some(1) != b"{":
                return False  # an NBD server says something else, and no line
        async with QMPClient.connect(path) as qmp:
            return str(qmp.version.get("package", "")).startswith("nbdstream ")
    return False


def _is_file(name: str) -> bool:
    with suppress(OSError):
        return stat.S_ISREG(Path(name).stat().st_mode)
    return False


def _serves(socket: str, leaf: str) -> bool:
    """Whether the server at the socket serves this leaf."""
    import trio

    from nbdstream.qmp.client import QMPClient
    from nbdstream.qmp.protocol import QMPError

    async def ask() -> str:
        with trio.move_on_after(ANSWER_SECONDS), suppress(QMPError):
            async with QMPClient.connect(socket) as qmp:
                return str((await qmp.execute("x-nbdstream-pivot-query"))["leaf"])
        return ""

    served = trio.run(ask)
    return bool(served) and Path(served).exists() and Path(served).samefile(leaf)
