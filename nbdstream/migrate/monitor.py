# SPDX-License-Identifier: Apache-2.0
"""The source's QEMU: the one QMP connection that the parts of a migration share, and its end.

A QMP socket of QEMU serves one client at a time: a second connection waits until the first
one ends. So each part that needs QEMU asks here for a session; while one is open, sessions
within it use its connection.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import trio

from nbdstream.qmp.client import QMPClient

# Seconds that a process which has closed its sockets gets to be gone, and between two looks.
END_SECONDS = 5.0
_POLL = 0.05


@dataclass(frozen=True)
class _Process:
    """A process of this host, told from a later one of the same number by its start."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """The process, if it is there and is a QEMU: what listens on the socket of a guest may
        also be an ssh, or libvirt that has handed the socket on."""
        state, started, name = _stat(pid)
        return cls(pid, started) if state and name.startswith(("qemu", "kvm")) else None

    def has_ended(self) -> bool:
        state, started, _ = _stat(self.pid)
        return state in ("", "Z", "X") or started != self.started


def _stat(pid: int) -> tuple[str, str, str]:
    """State, start time and name as in /proc/PID/stat (proc(5)); empty if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return "", "", ""
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    return fields[0], fields[19], name


class Monitor:
    """The QMP socket ``path`` of a QEMU."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._open: QMPClient | None = None
        self._process: _Process | None = None

    @asynccontextmanager
    async def session(self) -> AsyncIterator[QMPClient]:
        """A connection for the length of a block: the one of the enclosing session, else a new
        one, able to send commands out of band.

        Raises:
            QMPError: QEMU does not answer there. A connection that breaks stays broken until
                the outermost session has ended.
        """
        if self._open is not None:
            yield self._open
            return
        async with QMPClient.connect(self._path, oob=True) as qmp:
            self._open = qmp
            self._process = _Process.of(qmp.peer_pid)
            try:
                yield qmp
            finally:
                self._open = None

    async def has_ended(self) -> bool:
        """Whether the QEMU of the last session is known to have ended. That can be known of a
        process of this host; one that is about to end is waited for."""
        process = self._process
        if process is None:
            return False
        with trio.move_on_after(END_SECONDS):
            while not process.has_ended():  # noqa: ASYNC110 - no event says so
                await trio.sleep(_POLL)
            return True
        return False
