# SPDX-License-Identifier: Apache-2.0
"""QMP commands for the server itself: which it is, and that it should end."""

from collections.abc import Callable

from nbdstream.control.server import version
from nbdstream.control.table import command
from nbdstream.qmp.protocol import JSONObject


class ProcessCommands:
    """``stop`` begins a clean end of the whole server; it returns at once."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop

    @command("query-version")
    async def query_version(self) -> JSONObject:
        return version()

    @command("quit")
    async def quit(self) -> None:
        self._stop()
