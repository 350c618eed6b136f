# SPDX-License-Identifier: Apache-2.0
"""The commands by which a leaf is let go of, so that the guest's QEMU opens it itself."""

from pathlib import Path

from nbdstream.control.table import command
from nbdstream.handover.custody import Custody
from nbdstream.qmp.protocol import JSONObject


class LetGo:
    """Commands of the leaf that a `Custody` has; ``uris`` are where its clients find it."""

    def __init__(self, custody: Custody, uris: list[str]) -> None:
        self._custody = custody
        self._uris = uris
        self._path = str(Path(custody.disk.leaf.path).absolute())

    @command("x-nbdstream-pivot-query")
    async def query(self) -> JSONObject:
        """What a program that wants to open the leaf has to know."""
        leaf = self._custody.disk.leaf
        answer: JSONObject = {
            "uris": self._uris,
            "leaf": self._path,
            "format": leaf.format,
            "size": leaf.size,
            "let-go": self._custody.let_go,
        }
        reason = "" if self._custody.let_go else self._custody.refusal()
        return answer | ({"refused": reason} if reason else {})

    @command("x-nbdstream-let-go")
    async def let_go(self) -> None:
        """Flush, close and unlock the leaf; hold requests from now on."""
        await self._custody.release()

    @command("x-nbdstream-take-back")
    async def take_back(self) -> None:
        """Open the leaf again, and go on with the requests that were held."""
        await self._custody.take_back()
