# SPDX-License-Identifier: Apache-2.0
"""A relay for QMP sockets that strikes at one command: before it, or after its answer."""

import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import trio

Act = Callable[[], None]
_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)


@dataclass
class Strike:
    """What happens at which command.

    ``number``: of the command, counted over all relays from the one named ``first`` on, which is
    0. ``after``: once it was carried out, and before the answer is passed on. ``act``: what is
    done then; None: the command fails. ``struck``: the command's name, once it has happened.
    """

    first: str
    number: int
    after: bool
    act: Act | None
    struck: str = ""
    seen: list[str] = field(default_factory=list)

    def counts(self, command: str, line: bytes) -> bool:
        """Whether this is the command to strike at."""
        if self.seen or self.first in f"{command} {line.decode()}":
            self.seen.append(command)
        if len(self.seen) - 1 != self.number or self.struck:
            return False
        self.struck = command
        return True


class Relay:
    """Passes on what clients of one socket and the QMP server behind another say."""

    def __init__(self, strike: Strike, target: str) -> None:
        self._strike = strike
        self._target = target

    async def run(self, path: str, *, task_status: trio.TaskStatus[None]) -> None:
        """A task: listen at ``path`` until cancelled."""
        sock = trio.socket.socket(trio.socket.AF_UNIX)
        await sock.bind(path)
        sock.listen()
        task_status.started()
        await trio.serve_listeners(self._serve, [trio.SocketListener(sock)])

    async def _serve(self, client: trio.SocketStream) -> None:
        with suppress(*_BROKEN):
            async with client, await trio.open_unix_socket(self._target) as server:
                await _Connection(self._strike, client, server).run()


class _Connection:
    def __init__(self, strike: Strike, client: trio.abc.Stream, server: trio.abc.Stream) -> None:
        self._strike = strike
        self._client = client
        self._server = server
        self._to_client = trio.Lock()
        self._awaited: object = None  # the id of the command to strike after

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:

            async def one_way(
                source: trio.abc.Stream, pass_on: Callable[[bytes], Awaitable[None]]
            ) -> None:
                rest = b""
                with suppress(*_BROKEN):
                    while data := await source.receive_some():
                        *lines, rest = (rest + bytes(data)).split(b"\n")
                        for line in lines:
                            await pass_on(line + b"\n")
                nursery.cancel_scope.cancel()

            nursery.start_soon(one_way, self._client, self._ask)
            nursery.start_soon(one_way, self._server, self._answer)

    async def _ask(self, line: bytes) -> None:
        request = json.loads(line)
        if self._strike.counts(request.get("execute", ""), line):
            if self._strike.after:
                self._awaited = request["id"]
            elif self._strike.act is None:
                await self._tell(_failure(request["id"]))
                return
            else:
                self._strike.act()
                await trio.lowlevel.checkpoint()  # what was killed has hung up by now
        await self._server.send_all(line)

    async def _answer(self, line: bytes) -> None:
        if self._awaited is not None and json.loads(line).get("id") == self._awaited:
            identity, self._awaited = self._awaited, None
            if self._strike.act is None:
                line = _failure(identity)
            else:
                self._strike.act()
        await self._tell(line)

    async def _tell(self, line: bytes) -> None:
        async with self._to_client:
            await self._client.send_all(line)


def _failure(identity: object) -> bytes:
    error = {"class": "GenericError", "desc": "told to fail"}
    return json.dumps({"error": error, "id": identity}).encode() + b"\n"
