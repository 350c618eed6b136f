# SPDX-License-Identifier: Apache-2.0
"""The one QMP connection to a QEMU that several parts of a migration share.

A QMP socket of QEMU serves one client at a time: a second connection waits until the first
one ends. So whoever needs QEMU asks here for a session; while one is open, sessions within it
use its connection.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nbdstream.qmp.client import QMPClient


class Monitor:
    """The QMP socket ``path`` of a QEMU."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._open: QMPClient | None = None

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
            try:
                yield qmp
            finally:
                self._open = None
