# SPDX-License-Identifier: Apache-2.0
"""A QMP client on trio, for QEMU and for nbdstream's own control socket.

    async with QMPClient.connect("qmp.sock") as qmp:
        await qmp.execute("block-job-set-speed", {"device": "disk0", "speed": 0})
        await qmp.wait_event("BLOCK_JOB_COMPLETED", data={"device": "disk0"})

Two tasks serve a connection: one reads, one writes. A command is a line handed to the
writer and an entry in the table of pending commands, under an id of our own. So any
number of commands may be in flight, and a cancelled ``execute`` never leaves half a line
on the wire: either the line was not handed over, or it is sent whole and its answer is
dropped when it comes.

When the connection goes, everyone who waits gets ``QMPConnectionError`` (or the
``QMPProtocolError`` that ended it), and so does everyone who comes later.
"""

import logging
import secrets
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

from nbdstream.qmp.protocol import (
    REPLY_LIMIT,
    Command,
    Event,
    Failure,
    Greeting,
    JSONObject,
    LineReader,
    QMPConnectionError,
    QMPError,
    QMPProtocolError,
    Return,
    encode,
    parse_server_message,
)
from nbdstream.tasks import open_background_nursery

log = logging.getLogger(__name__)

# Seconds between attempts at a socket whose backlog is full.
_BUSY = 0.05
EVENT_BACKLOG = 4096
"""Events that a queue keeps for a reader who does not come; then the oldest is dropped."""


class EventQueue:
    """Events in the order in which they came, until they are taken."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=EVENT_BACKLOG)
        self._error: QMPError | None = None
        self._changed = trio.lowlevel.ParkingLot()

    async def wait(self, *names: str, data: Mapping[str, Any] | None = None) -> Event:
        """Take the first event with one of *names* (none: any) whose data contains *data*.

        Other events stay for others. Raises QMPError when the connection ended and no
        such event is left. Cancelled: took nothing.
        """
        await trio.lowlevel.checkpoint()
        while True:
            for index, event in enumerate(self._events):
                if (not names or event.name in names) and _contains(event.data, data or {}):
                    del self._events[index]
                    return event
            if self._error is not None:
                raise self._error
            await self._changed.park()

    def __aiter__(self) -> "EventQueue":
        return self

    async def __anext__(self) -> Event:
        return await self.wait()

    def put(self, event: Event) -> None:
        """Add *event* (for the connection)."""
        self._events.append(event)
        self._changed.unpark_all()

    def end(self, error: QMPError) -> None:
        """No event will follow (for the connection)."""
        self._error = error
        self._changed.unpark_all()


def _connected(stream: trio.SocketStream) -> bool:
    """Trio takes a full backlog (connect(2), EAGAIN on a unix socket) for a connection."""
    try:
        stream.socket.getpeername()
    except OSError:
        return False
    return True


def _contains(data: JSONObject, wanted: Mapping[str, Any]) -> bool:
    return all(name in data and data[name] == value for name, value in wanted.items())


class _Pending:
    """A command in flight: set once, by the answer or by the end of the connection."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.outcome: Return | QMPError | None = None

    def settle(self, outcome: Return | QMPError) -> None:
        # An answer stands, though the connection may end before it has been taken.
        if not self.done.is_set():
            self.outcome = outcome
            self.done.set()


class QMPClient:
    """One negotiated connection to a QMP server. Made by ``connect`` or ``over``."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._reader = LineReader(REPLY_LIMIT)
        self._to_send, self._outgoing = trio.open_memory_channel[bytes](0)
        self._pending: dict[str, _Pending] = {}
        # QEMU sends the late answer to a client that has hung up to the next one, which must not
        # take it for its own.
        self._ours = f"{secrets.token_hex(6)}-"
        self._last = 0
        self._error: QMPError | None = None
        self._backlog = EventQueue()
        self._queues = [self._backlog]
        self._greeted = _Pending()
        self.version: JSONObject = {}
        """The server's version object, from its greeting."""

    @classmethod
    @asynccontextmanager
    async def connect(cls, path: str | Path, *, oob: bool = False) -> AsyncIterator["QMPClient"]:
        """Connect to the QMP server on the unix socket *path*; hang up when the block ends.
        With *oob* commands may be given out of band, if the server is able to do that.

        Waits while the server has as many clients waiting as it lets wait (QEMU: one). Raises
        QMPConnectionError if no server listens there.
        """
        try:
            while not _connected(stream := await trio.open_unix_socket(str(path))):
                await stream.aclose()
                await trio.sleep(_BUSY)
        except OSError as error:
            why = error.strerror or error  # a path that is too long has no number
            raise QMPConnectionError(f"no QMP server at {path}: {why}") from error
        async with cls.over(stream, oob=oob) as client:
            yield client

    @classmethod
    @asynccontextmanager
    async def over(
        cls, stream: trio.abc.Stream, *, oob: bool = False
    ) -> AsyncIterator["QMPClient"]:
        """Speak QMP over *stream*, which is closed when the block ends.

        Raises QMPError if the server does not greet as QMP wants it.
        """
        client = cls(stream)
        async with stream, open_background_nursery() as nursery:
            nursery.start_soon(client._read_all)
            nursery.start_soon(client._write_all)
            try:
                await client._negotiate(oob=oob)
                yield client
            finally:
                client._end(QMPConnectionError("the QMP connection was closed here"))

    @property
    def peer_pid(self) -> int:
        """The process that listens on the unix socket (unix(7), SO_PEERCRED), as this one's
        namespace numbers it; 0 where that is not known."""
        if not isinstance(self._stream, trio.SocketStream):
            return 0
        size = struct.calcsize("3i")
        try:
            found = self._stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        except OSError:
            return 0
        pid: int = struct.unpack("3i", found)[0]
        return pid

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, oob: bool = False
    ) -> Any:
        """Carry out *command* and return what it returned; *oob*: out of band, see `connect`.

        Raises CommandError as the server answers, QMPConnectionError if the connection is
        gone before the answer. Cancelled: the command may or may not be carried out; the
        connection stays sound.
        """
        if self._error is not None:
            raise self._error
        self._last += 1
        id_ = f"{self._ours}{self._last}"
        pending = self._pending[id_] = _Pending()
        try:
            await self._hand_over(encode(Command(command, dict(arguments or {}), id_, oob)))
            return await self._outcome(pending)
        finally:
            del self._pending[id_]

    async def wait_event(self, *names: str, data: Mapping[str, Any] | None = None) -> Event:
        """Take the first event that matches, of all since the connection was made.

        As ``EventQueue.wait``, on a queue that every connection has: an event that came
        before the wait is not missed.
        """
        return await self._backlog.wait(*names, data=data)

    @contextmanager
    def events(self) -> Iterator[EventQueue]:
        """A queue of one's own, with every event from now on until the block ends."""
        queue = EventQueue()
        if self._error is not None:
            queue.end(self._error)
        self._queues.append(queue)
        try:
            yield queue
        finally:
            self._queues.remove(queue)

    async def _negotiate(self, *, oob: bool) -> None:
        greeting = await self._outcome(self._greeted)
        self.version = greeting["version"]
        able = oob and "oob" in greeting["capabilities"]
        await self.execute("qmp_capabilities", {"enable": ["oob"]} if able else None)

    async def _outcome(self, pending: _Pending) -> Any:
        await pending.done.wait()
        if isinstance(pending.outcome, Return):
            return pending.outcome.value
        assert pending.outcome is not None
        raise pending.outcome

    async def _hand_over(self, line: bytes) -> None:
        try:
            await self._to_send.send(line)
        except trio.BrokenResourceError:
            # The writer went away; _end, which follows at once or came first, says why.
            raise self._error or QMPConnectionError("the QMP connection is closed") from None

    async def _write_all(self) -> None:
        with self._outgoing:
            try:
                async for line in self._outgoing:
                    await self._stream.send_all(line)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._end(QMPConnectionError("the QMP connection was lost"), error)

    async def _read_all(self) -> None:
        try:
            while data := await self._stream.receive_some():
                self._reader.feed(data)
                for message in self._reader.messages():
                    self._dispatch(message)
            self._end(QMPConnectionError("the QMP server closed the connection"))
        except QMPProtocolError as error:
            self._end(error)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._end(QMPConnectionError("the QMP connection was lost"), error)

    def _dispatch(self, message: JSONObject) -> None:
        match parse_server_message(message):
            case Event() as event:
                for queue in self._queues:
                    queue.put(event)
            case Greeting(version, capabilities):
                self._greeted.settle(Return({"version": version, "capabilities": capabilities}))
            case Return(_, id_) as answer:
                self._answer(id_, answer)
            case Failure(error, id_):
                self._answer(id_, error)

    def _answer(self, id_: Any, outcome: Return | QMPError) -> None:
        if id_ is None:
            raise QMPProtocolError("an answer without an id: all commands of ours have one")
        pending = self._pending.get(str(id_))
        if pending is not None:
            pending.settle(outcome)
        # else: to an earlier client, or the task that gave the command was cancelled

    def _end(self, error: QMPError, cause: Exception | None = None) -> None:
        """Tell everyone who waits, and remember it for those who come later."""
        if self._error is not None:
            return
        error.__cause__ = cause
        self._error = error
        log.debug("QMP connection ended: %s", error)
        for pending in [self._greeted, *self._pending.values()]:
            pending.settle(error)
        for queue in self._queues:
            queue.end(error)
        self._outgoing.close()
