# SPDX-License-Identifier: Apache-2.0
"""The commands by which a leaf is let go of, so that the guest's QEMU opens it itself."""

from pathlib import Path

from nbdstream.control.table import command
from nbdstream.disk import round_off
from nbdstream.handover.custody import Custody
from nbdstream.qmp.protocol import JSONObject


class LetGo:
    """Commands of the leaf that a `Custody` has; ``uris`` are where its clients find it."""

    def __init__(self, custody: Custody, uris: list[str]) -> None:
        self._custody = custody
        self._uris = uris
        self._path = str(Path(custody.disk.leaf.path).absolute())

    @command("x-nbdstream-pivot-query")
    async def query(self, now: bool = False) -> JSONObject:
        """What a program that wants to open the leaf has to know. If the leaf can be let go of, it
        is flushed, so that little is left to do while the guest stands still. With ``now`` it may
        be let go of before it is complete, and is prepared for that as well."""
        leaf = self._custody.disk.leaf
        answer: JSONObject = {
            "uris": self._uris,
            "leaf": self._path,
            "format": leaf.format,
            "size": leaf.size,
            "let-go": self._custody.let_go,
        }
        disk = self._custody.disk
        if disk.thin and disk.backing is not None and disk.backing.local is not None:
            answer["image"] = disk.backing.local.path
        elif disk.backing is not None and leaf.backing is not None:
            answer["backing"] = {"uri": leaf.backing.uri, "format": leaf.backing.format}
        reason = "" if self._custody.let_go else self._custody.refusal(incomplete=now)
        if now and not reason and not disk.thin:
            await round_off(disk)
        if not reason:
            await disk.flush()
        return answer | ({"refused": reason} if reason else {})

    @command("x-nbdstream-let-go")
    async def let_go(self, now: bool = False) -> None:
        """Flush, close and unlock the leaf; hold requests from now on. With ``now`` also if it is
        not complete."""
        await self._custody.release(incomplete=now)

    @command("x-nbdstream-take-back")
    async def take_back(self) -> None:
        """Open the leaf again, and go on with the requests that were held."""
        await self._custody.take_back()
