# SPDX-License-Identifier: Apache-2.0
"""The two ends that a pivot talks to: the servers of the disks, and the guest's QEMU."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from typing import Protocol

import trio

from nbdstream.errors import NbdstreamError
from nbdstream.handover.let_go import LetGo
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import JSONObject, QMPConnectionError, QMPError
from nbdstream.service import Service

# Seconds for a greeting (QEMU gives none while it waits for an NBD server that was away, to which
# it connects again every 16 s), that a server gets to end, and that another pivot gets.
CONNECT_SECONDS = 20.0
END_SECONDS = 20.0
TURN_SECONDS = 60.0
_POLL = 0.05


class PivotError(NbdstreamError):
    """A pivot that did not take place; the message says how things stand."""


class DiskServer(Protocol):
    """The server of one disk. All but `end` raise NbdstreamError, OSError."""

    def line(self) -> AbstractAsyncContextManager[None]:
        """While the block lasts, commands need not connect first: the guest stands still for
        some of them."""
        ...

    async def facts(self, *, now: bool = False) -> JSONObject:
        """What ``x-nbdstream-pivot-query`` returns."""
        ...

    async def let_go(self, *, now: bool = False) -> None:
        """Flush, close and unlock the leaf, with ``now`` an incomplete one, too; hold requests."""
        ...

    async def take_back(self) -> None:
        """Open the leaf again, go on with the requests."""
        ...

    async def end(self) -> None:
        """It is not needed any more. Best effort: one that stays does no harm."""
        ...


class ControlledServer:
    """A server behind a control socket."""

    def __init__(self, control: str) -> None:
        self._control = control
        self._line: QMPClient | None = None

    @asynccontextmanager
    async def line(self) -> AsyncIterator[None]:
        """See `DiskServer`."""
        async with connect(self._control) as self._line:
            try:
                yield
            finally:
                self._line = None

    async def facts(self, *, now: bool = False) -> JSONObject:
        """See `DiskServer`."""
        return await self._ask("x-nbdstream-pivot-query", {"now": now})

    async def let_go(self, *, now: bool = False) -> None:
        """See `DiskServer`."""
        await self._ask("x-nbdstream-let-go", {"now": now})

    async def take_back(self) -> None:
        """See `DiskServer`."""
        await self._ask("x-nbdstream-take-back")

    async def end(self) -> None:
        """See `DiskServer`: returns when the server has closed its connections."""
        with suppress(QMPError), trio.move_on_after(END_SECONDS):
            async with connect(self._control) as qmp:
                await qmp.execute("quit")
                while True:
                    await qmp.wait_event()

    async def _ask(self, command: str, arguments: JSONObject | None = None) -> JSONObject:
        answer: JSONObject
        if self._line is not None:
            answer = await self._line.execute(command, arguments)
        else:
            async with connect(self._control) as qmp:
                answer = await qmp.execute(command, arguments)
        return answer


class OwnServer:
    """The server that runs in this process."""

    def __init__(self, service: Service) -> None:
        self._commands = LetGo(service.custody, service.uris)

    @asynccontextmanager
    async def line(self) -> AsyncIterator[None]:
        """See `DiskServer`: nothing to connect to."""
        yield

    async def facts(self, *, now: bool = False) -> JSONObject:
        """See `DiskServer`."""
        return await self._commands.query(now)

    async def let_go(self, *, now: bool = False) -> None:
        """See `DiskServer`."""
        await self._commands.let_go(now)

    async def take_back(self) -> None:
        """See `DiskServer`."""
        await self._commands.take_back()

    async def end(self) -> None:
        """See `DiskServer`: who has it pivot ends it afterwards."""


@asynccontextmanager
async def connect(path: str) -> AsyncIterator[QMPClient]:
    """A connection to a QMP server. Raises QMPError, also if it does not greet."""
    with trio.CancelScope(deadline=trio.current_time() + CONNECT_SECONDS) as scope:
        async with QMPClient.connect(path) as qmp:
            scope.deadline = float("inf")
            yield qmp
    if scope.cancelled_caught:
        raise QMPConnectionError(
            f"{path}: no QMP greeting: another program is connected to it (QEMU serves one at a"
            " time on a socket), QEMU waits for a server that is away, or it is no QMP socket"
        )


class Monitor:
    """The monitor of a guest's QEMU. ``pid`` is QEMU's process, 0 for that which listens."""

    def __init__(
        self, open_: Callable[[], AbstractAsyncContextManager[QMPClient]], pid: int = 0
    ) -> None:
        self.open = open_
        self._pid = pid

    @classmethod
    def at(cls, path: str) -> "Monitor":
        """The monitor behind a QMP socket."""
        return cls(lambda: connect(path))

    @classmethod
    def of(cls, qmp: QMPClient, pid: int) -> "Monitor":
        """The monitor of a QEMU of our own, to which we are connected."""
        return cls(lambda: nullcontext(qmp), pid)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Keep other pivots of the same guest away: each stops and continues it. The name in the
        abstract namespace goes with this process, however that ends.

        Raises:
            PivotError: another one does not end.
        """
        pid = self._pid
        if not pid:
            async with self.open() as qemu:
                pid = qemu.peer_pid
        with socket.socket(socket.AF_UNIX) as name:
            with trio.move_on_after(TURN_SECONDS) as waiting:
                while not _bound(name, f"\0nbdstream-pivot-{pid}"):  # noqa: ASYNC110 - no event
                    await trio.sleep(_POLL)
            if waiting.cancelled_caught:
                raise PivotError("another pivot of this guest is under way, and does not end")
            yield


def _bound(name: socket.socket, address: str) -> bool:
    try:
        name.bind(address)
    except OSError:
        return False
    return True
