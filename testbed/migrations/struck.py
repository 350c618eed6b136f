# SPDX-License-Identifier: Apache-2.0
"""The steps of a migration by name, and the tool that kills a process at one of them.

    python -m testbed.migrations.struck STEP MOMENT VICTIM MARK -- migrate OPTIONS

runs ``nbdstream migrate`` in this process. When it comes to the step, the process that listens
on the socket VICTIM is killed, or this process itself (VICTIM ``tool``); the file MARK is made
just before. A step is a QMP command of the tool:

before  the command has not been sent;
sent    it has been sent, and its answer not been seen;
after   it has been answered, and nothing was done about it yet.
"""

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import trio
import trio.testing

from nbdstream.cli import main
from nbdstream.qmp.client import QMPClient
from testbed.migrations.moving import listener

Moment = Literal["before", "sent", "after"]
MOMENTS: tuple[Moment, ...] = ("before", "sent", "after")
TOOL = "tool"


@dataclass(frozen=True)
class Step:
    """A step: the ``count``-th time that the tool gives this command, with these arguments
    among its own. Steps that a migration comes to later are later in `STEPS`."""

    name: str
    command: str
    arguments: tuple[tuple[str, Any], ...] = ()
    count: int = 1


ACTIVATE = "x-nbdstream-activate"
STEPS = {
    step.name: step
    for step in (
        Step("offer", "x-nbdstream-export-add"),
        Step("look at the new leaf", ACTIVATE, (("check", True),)),
        Step("look at the new QEMU", "stop"),
        Step("set up memory there", "migrate-set-capabilities"),
        Step("set up memory here", "migrate-set-capabilities", count=2),
        Step("listen for memory", "migrate-incoming"),
        Step("begin with memory", "migrate"),
        Step("copy memory", "query-migrate", count=2),
        Step("guest stands still", "stop", count=2),
        Step("seal", "x-nbdstream-seal"),
        Step("activate", ACTIVATE, (("check", None),)),
        Step("hand over", "migrate-continue"),
        Step("tell", "cont"),
        Step("stream", "x-nbdstream-stats", count=2),
        Step("release", "x-nbdstream-export-remove"),
    )
}
"""In the order in which a migration of a disk that an nbdstream serves comes to them."""


class StruckClient:
    """Replaces the two methods of `QMPClient` that give commands."""

    def __init__(self, step: Step, moment: Moment, victim: str, mark: Path) -> None:
        self._step, self._moment, self._victim, self._mark = step, moment, victim, mark
        self._left = step.count
        self._execute = QMPClient.execute
        self._due = False

    def install(self) -> None:
        """From now on commands come this way."""
        strike = self

        async def execute(
            client: QMPClient,
            command: str,
            arguments: Mapping[str, Any] | None = None,
            *,
            oob: bool = False,
        ) -> Any:
            return await strike.execute(client, command, arguments, oob=oob)

        QMPClient.execute = execute  # type: ignore[method-assign, assignment]

    async def execute(
        self,
        client: QMPClient,
        command: str,
        arguments: Mapping[str, Any] | None,
        *,
        oob: bool,
    ) -> Any:
        """`QMPClient.execute`, with the damage where it is due."""
        if not self._is_due(command, arguments or {}):
            return await self._execute(client, command, arguments, oob=oob)
        if self._moment == "before":
            self._strike()
            return await self._execute(client, command, arguments, oob=oob)
        if self._moment == "after":
            try:
                return await self._execute(client, command, arguments, oob=oob)
            finally:
                self._strike()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._strike_when_sent, client)
            return await self._execute(client, command, arguments, oob=oob)

    async def _strike_when_sent(self, client: QMPClient) -> None:
        """The writer waits for more once the line is on its way."""
        await trio.testing.wait_all_tasks_blocked()
        self._strike()

    def _is_due(self, command: str, arguments: Mapping[str, Any]) -> bool:
        wanted = self._step
        if command != wanted.command:
            return False
        if any(arguments.get(name) != value for name, value in wanted.arguments):
            return False
        self._left -= 1
        return self._left == 0

    def _strike(self) -> None:
        pid = os.getpid() if self._victim == TOOL else listener(self._victim)
        self._mark.touch()
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    step, moment, victim, mark = sys.argv[1:5]
    StruckClient(STEPS[step], moment, victim, Path(mark)).install()  # type: ignore[arg-type]
    sys.argv = ["nbdstream", *sys.argv[6:]]
    main()
