# SPDX-License-Identifier: Apache-2.0
"""System calls that fail on demand, inside this process.

The calls of the product to the kernel are replaced where it finds them: functions of `os`
and `fcntl`, methods of sockets, the start of a thread, and `fallocate` of the C library. While
armed, each call of a kind that can fail so is counted, and the one with the wanted number fails,
once. EINTR is injected where the product has to handle it itself: Python repeats all other
interrupted calls.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from nbdstream.leaf import files
from nbdstream.leaf.base import FlushNeeded

SHORT = "short"
FAULTS = {
    "open": ("EMFILE", "ENOMEM", "EIO"),
    "pread": ("EIO", "ENOMEM", SHORT),
    "preadv": ("EIO", "ENOMEM", SHORT),
    "pwrite": ("ENOSPC", "EIO", "ENOMEM", SHORT),
    "fdatasync": ("EIO", "ENOSPC"),
    "fsync": ("EIO", "ENOSPC"),
    "lseek": ("EIO",),
    "ftruncate": ("ENOSPC", "EIO"),
    "unlink": ("EIO",),
    "fcntl": ("ENOMEM", "EIO"),
    "fallocate": ("ENOSPC", "EIO", "EINTR"),
    "posix_fallocate": ("ENOSPC",),
}
# What a whole server calls besides.
SERVER_FAULTS = FAULTS | {
    "socket": ("EMFILE", "ENOMEM"),
    "bind": ("EADDRINUSE", "ENOMEM"),
    "listen": ("EADDRINUSE",),
    "accept": ("EMFILE", "ENFILE", "ENOMEM", "ECONNABORTED"),
    "connect": ("ECONNREFUSED", "EAGAIN", "ENOMEM"),
    "recv": ("ECONNRESET", "ENOMEM", SHORT),
    "recv_into": ("ECONNRESET", "ENOMEM", SHORT),
    "send": ("EPIPE", "ENOBUFS", SHORT),
    "sendmsg": ("EPIPE", "ENOBUFS", SHORT),
    "shutdown": ("ENOTCONN",),
    "posix_spawn": ("EAGAIN", "ENOMEM"),
    "pidfd_open": ("EMFILE",),
    "pipe": ("EMFILE",),
    "memfd_create": ("EMFILE", "ENOMEM"),
    "waitpid": ("EIO",),
    "link": ("EIO", "ENOSPC"),
    "rename": ("EIO", "ENOSPC"),
    "replace": ("EIO", "ENOSPC"),
    "mkdir": ("ENOSPC",),
    "getxattr": ("EIO",),
    "setxattr": ("ENOSPC", "EIO"),
    "statvfs": ("EIO",),
    "thread": ("EAGAIN",),
}
_OF_SOCKETS = (
    "bind",
    "listen",
    "accept",
    "connect",
    "recv",
    "recv_into",
    "send",
    "sendmsg",
    "shutdown",
)
SYNCS = ("fdatasync", "fsync")


@dataclass
class Shim:
    """Counts calls while `armed`, and lets the call `number` of `call` fail with `fault`.

    ``flushes_needed`` counts how often a leaf had to have a flush before a change.
    """

    call: str = ""
    fault: str = ""
    number: int = -1
    armed: bool = False
    fired: bool = False
    flushes_needed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    exempt: set[int] = field(default_factory=set)  # threads that are no part of the product

    def due(self, call: str) -> str:
        """The fault that this call has to show; "" for none."""
        if not self.armed or threading.get_ident() in self.exempt:
            return ""
        number = self.counts[call]
        self.counts[call] += 1
        if call != self.call or number != self.number:
            return ""
        self.fired = True
        return self.fault

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            # How trio's threads wake its loop is no part of the product, and has to work.
            by_trio = sys._getframe(1).f_globals["__name__"] == "trio._core._wakeup_socketpair"
            adopted = name == "socket" and named.get("fileno") is not None  # no system call
            fault = "" if by_trio or adopted else self.due(name)
            if not fault:
                return real(*arguments, **named)
            if fault == SHORT:
                return real(*_shortened(name, arguments), **named)
            if name == "thread":
                raise RuntimeError("can't start new thread")
            number = getattr(errno, fault)
            raise OSError(number, os.strerror(number))

        return call

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the calls for the length of the block."""

        def needed(_signal: FlushNeeded) -> None:
            self.flushes_needed += 1

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(FlushNeeded, "__init__", needed))
            for name in SERVER_FAULTS:
                if name == "fallocate":
                    stack.enter_context(mock.patch.object(files, "_libc", _Libc(self)))
                    continue
                place, attribute = _place(name)
                wrapped = self._wrapped(name, getattr(place, attribute))
                stack.enter_context(mock.patch.object(place, attribute, wrapped))
            yield


def _place(name: str) -> tuple[Any, str]:
    """Where the product finds a call, and by which name."""
    if name == "fcntl":
        return fcntl, name
    if name == "thread":
        return threading, "_start_new_thread"
    if name == "socket":
        return socket.socket, "__init__"
    return (socket.socket if name in _OF_SOCKETS else os), name


def _shortened(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call that moves fewer bytes than it was asked to."""
    if name == "sendmsg":
        sock, parts = arguments
        first = memoryview(next(iter(parts)))
        return (sock, [first[: max(1, len(first) // 2)]])
    fd, what, *rest = arguments
    if name == "recv":
        return (fd, max(1, what // 2), *rest)
    if name == "pread":
        return (fd, max(1, what // 2), *rest)
    if name == "preadv":
        first = memoryview(what[0])
        return (fd, [first[: max(1, len(first) // 2)]], *rest)
    return (fd, memoryview(what)[: max(1, len(what) // 2)], *rest)


class _Libc:
    """The C library as `nbdstream.leaf.files` calls it: errors are -1 and errno."""

    def __init__(self, shim: Shim) -> None:
        self._shim = shim
        self._real = files._libc

    def fallocate(self, *arguments: int) -> int:
        fault = self._shim.due("fallocate")
        if fault:
            ctypes.set_errno(getattr(errno, fault))
            return -1
        result: int = self._real.fallocate(*arguments)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
