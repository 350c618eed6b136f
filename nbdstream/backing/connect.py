# SPDX-License-Identifier: Apache-2.0
"""From an NBD URI to a negotiated `Connection`, or one line that says why not.

The handshake is libnbd's; it is held in option mode so that a refused export can be
answered with the names of those that exist. Everything but the name look-up happens in
the event loop.
"""

import errno
import os
from typing import Any

import nbd
import trio

from nbdstream.backing.connection import Connection, plain, wait_ready
from nbdstream.errors import BackingError, BackingGoneError

# A handshake takes about five round trips; nobody waits longer than this for one.
CONNECT_TIMEOUT = 30.0
# Export names shown when the one asked for does not exist.
NAMES_SHOWN = 8


async def connect(uri: str, timeout: float = CONNECT_TIMEOUT) -> Connection:  # noqa: ASYNC109
    """Connect to an NBD URI (https://github.com/NetworkBlockDevice/nbd, doc/uri.md).

    Raises:
        BackingGoneError: nobody answers, or not in ``timeout`` seconds: this may change.
        BackingError: the server answers, but not with this export: a misconfiguration.
    """
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.set_uri_allow_local_file(True)
    # The caller's buffer is only looked at after success, so nothing has to be cleared.
    handle.set_pread_initialize(False)
    # The odd tail of an export whose size is no multiple of its block size is worth asking
    # for, so alignment is the server's to judge.
    handle.set_strict_mode(nbd.STRICT_MASK & ~nbd.STRICT_ALIGN)
    with trio.move_on_after(timeout):
        try:
            # In a thread, because libnbd resolves the host's name synchronously.
            await trio.to_thread.run_sync(handle.aio_connect_uri, uri, abandon_on_cancel=True)
            await _settle(handle)
            if not handle.aio_is_ready():  # a server without options is ready by now
                await _choose_export(handle, uri)
        except nbd.Error as error:
            raise _explain(uri, error) from error
        if handle.get_size() == 0:
            raise BackingError(f"{uri}: the export has a size of 0 bytes")
        return Connection(handle)
    raise BackingGoneError(f"{uri}: no answer in {timeout:g} s")


async def _settle(handle: nbd.NBD) -> None:
    """Let libnbd go on until it waits for us: between options, ready, or at an end."""
    while handle.aio_is_connecting():
        if await wait_ready(handle):
            handle.aio_notify_write()
        else:
            handle.aio_notify_read()
    if handle.aio_is_closed():
        raise nbd.Error("the server closed the connection during the handshake", errno.EPROTO)


async def _choose_export(handle: nbd.NBD, uri: str) -> None:
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
    name = handle.get_export_name()
    if code == errno.ENOTSUP and not handle.get_tls_negotiated():
        raise BackingError(f"{uri}: the server wants TLS: use nbds:// (or nbds+unix://)")
    if code != errno.ENOENT:
        raise BackingError(f"{uri}: the server refuses export {name!r}: {os.strerror(code)}")
    offered = await _export_names(handle)
    raise BackingError(f"{uri}: the server has no export {name!r}{offered}")


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


def _explain(uri: str, error: nbd.Error) -> BackingError:
    """One line for a failed connect or handshake."""
    text = plain(error)
    if "magic" in text:
        return BackingError(f"{uri}: what listens there is no NBD server ({text})")
    if error.errnum == errno.EINVAL:
        return BackingError(f"{uri}: not a URI that libnbd understands ({text})")
    if error.errnum in (errno.ENOENT, errno.ECONNREFUSED):
        return BackingGoneError(f"{uri}: no server listens there ({os.strerror(error.errnum)})")
    return BackingGoneError(f"{uri}: cannot connect: {text}")
