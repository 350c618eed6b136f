# SPDX-License-Identifier: Apache-2.0
"""QMP, the QEMU Machine Protocol, as messages and lines: no I/O, either role.

QMP is JSON objects, one per line. The server greets; the client must send
``qmp_capabilities`` before anything else; then commands are answered in the order in
which they came, each with ``return`` or ``error``, and events appear between the answers
at any time (QEMU's ``docs/interop/qmp-spec``). The client beside this module and the
control socket of ``nbdstream serve`` both rest on this module.

Errors, by what the reader can do about them::

    QMPError
    ├── CommandError           one command failed; the connection is fine
    │   ├── GenericError           every reason without a class of its own
    │   ├── CommandNotFound        no such command, or not in this state of the session
    │   ├── DeviceNotActive        the device has no job
    │   └── DeviceNotFound         no such device
    ├── QMPProtocolError       the peer does not speak QMP: hang up
    └── QMPConnectionError     the connection is gone (raised by those who do I/O)

Invariants: buffered input never exceeds the line limit plus one received chunk; after a
protocol error a reader stays broken and raises the same error again; whatever bytes come
in, only ``QMPProtocolError`` (or an error *reply*, on the server's side) comes out.
"""

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from nbdstream.errors import NbdstreamError

JSONObject = dict[str, Any]

COMMAND_LIMIT = 1 << 20
"""Longest line, in bytes, that a server takes from a client."""
REPLY_LIMIT = 64 << 20
"""Longest line, in bytes, that a client takes from a server (schemas and maps are long)."""

NESTING_LIMIT = 256
"""Deepest JSON taken from a peer: what is read can be shown, and written again, without
running out of the interpreter's stack."""

# A string that has no end reaches to the end of the line: so no quote is looked at twice.
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKETS = re.compile(rb"[{}\[\]]")


class QMPError(NbdstreamError):
    """Base of everything that goes wrong on a QMP connection."""


class CommandError(QMPError):
    """A command was answered with an error. ``error_class`` is the class on the wire."""

    error_class = "GenericError"

    def __init__(self, desc: str) -> None:
        super().__init__(desc)
        self.desc = desc


class GenericError(CommandError):
    """Any failure that has no class of its own."""


class CommandNotFound(CommandError):  # noqa: N818 (QMP's own name, as the next two)
    """The command does not exist, or not in this state of the session."""

    error_class = "CommandNotFound"


class DeviceNotActive(CommandError):  # noqa: N818
    """The named device has no active job."""

    error_class = "DeviceNotActive"


class DeviceNotFound(CommandError):  # noqa: N818
    """There is no device of that name."""

    error_class = "DeviceNotFound"


class QMPProtocolError(QMPError):
    """The peer sent something that is not QMP."""


class QMPConnectionError(QMPError):
    """The connection was refused, closed or lost."""


_ERROR_CLASSES: dict[str, type[CommandError]] = {
    kind.error_class: kind
    for kind in (GenericError, CommandNotFound, DeviceNotActive, DeviceNotFound)
}


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a server says first: its version object and the capabilities it offers."""

    version: JSONObject
    capabilities: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Command:
    """A request. ``id`` is the client's own; the answer repeats it (None: there is none).
    ``oob``: out of band, to be carried out though the server's main loop hangs."""

    name: str
    arguments: JSONObject = field(default_factory=dict)
    id: Any = None
    oob: bool = False


@dataclass(frozen=True, slots=True)
class Return:
    """The answer of a command that succeeded."""

    value: Any
    id: Any = None


@dataclass(frozen=True, slots=True)
class Failure:
    """The answer of a command that failed."""

    error: CommandError
    id: Any = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened. ``timestamp`` is in seconds since the epoch."""

    name: str
    data: JSONObject = field(default_factory=dict)
    timestamp: float = field(default_factory=time.time)


Message = Greeting | Command | Return | Failure | Event
ServerMessage = Greeting | Return | Failure | Event


def encode(message: Message) -> bytes:
    """Return *message* as one line, newline included."""
    return json.dumps(_to_json(message), separators=(",", ":")).encode() + b"\r\n"


def _to_json(message: Message) -> JSONObject:
    match message:
        case Greeting(version, capabilities):
            return {"QMP": {"version": version, "capabilities": capabilities}}
        case Command(name, arguments, id_, oob):
            how = {"exec-oob" if oob else "execute": name}
            return how | ({"arguments": arguments} if arguments else {}) | _id(id_)
        case Return(value, id_):
            return {"return": value} | _id(id_)
        case Failure(error, id_):
            return {"error": {"class": error.error_class, "desc": error.desc}} | _id(id_)
        case Event(name, data, timestamp):
            seconds, fraction = divmod(timestamp, 1)
            when = {"seconds": int(seconds), "microseconds": int(fraction * 1_000_000)}
            return {"event": name} | ({"data": data} if data else {}) | {"timestamp": when}


def _id(id_: Any) -> JSONObject:
    return {} if id_ is None else {"id": id_}


def parse_server_message(message: JSONObject) -> ServerMessage:
    """Return what a server said. Raises QMPProtocolError for what no server may say."""
    if "return" in message:
        return Return(message["return"], message.get("id"))
    if "error" in message:
        error = _member(message, "error", dict)
        kind = _ERROR_CLASSES.get(_member(error, "class", str), GenericError)
        return Failure(kind(_member(error, "desc", str)), message.get("id"))
    if "event" in message:
        when = _member(message, "timestamp", dict)
        seconds, micros = _member(when, "seconds", int), _member(when, "microseconds", int)
        data = _member(message, "data", dict) if "data" in message else {}
        # QEMU writes -1 for both when the clock cannot be read.
        if not -1 <= seconds < 1 << 63 or not -1 <= micros < 1_000_000:
            raise QMPProtocolError(f"no proper member 'timestamp' in {_shorten(message)}")
        return Event(_member(message, "event", str), data, seconds + micros / 1_000_000)
    if "QMP" in message:
        greeting = _member(message, "QMP", dict)
        capabilities = _member(greeting, "capabilities", list)
        return Greeting(_member(greeting, "version", dict), capabilities)
    raise QMPProtocolError(f"not a message of a QMP server: {_shorten(message)}")


def parse_command(message: JSONObject) -> Command:
    """Return the command a client sent. Raises GenericError, which is the right reply."""
    if unexpected := message.keys() - {"execute", "arguments", "id"}:
        raise GenericError(f"unexpected member {min(unexpected)!r} in a command")
    name, arguments = message.get("execute"), message.get("arguments", {})
    if not isinstance(name, str):
        raise GenericError("a command needs a member 'execute', a string")
    if not isinstance(arguments, dict):
        raise GenericError("the member 'arguments' of a command must be an object")
    return Command(name, arguments, message.get("id"))


def _member(message: JSONObject, name: str, kind: type) -> Any:
    value = message.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise QMPProtocolError(f"no proper member {name!r} in {_shorten(message)}")
    return value


def _shorten(message: JSONObject) -> str:
    text = repr(message)
    return text if len(text) <= 200 else text[:200] + "…"


class LineReader:
    """Bytes in, JSON objects out; at most *limit* bytes to a line."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._broken: str | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes that came from the peer, cut anywhere."""
        self._buffer += data

    def lines(self) -> Iterator[bytes]:
        """Yield each complete line that is not blank. Raises QMPProtocolError if too long."""
        if self._broken is not None:
            raise QMPProtocolError(self._broken)
        while (end := self._end()) > 0 or len(self._buffer) > self._limit:
            if not 0 < end <= self._limit + 1:
                self.fail(f"a line of more than {self._limit} bytes")
            line = bytes(self._buffer[:end]).strip()
            del self._buffer[:end]
            if line:
                yield line

    def _end(self) -> int:
        """How many bytes the first line has, its end included; 0 if that has not come yet."""
        return self._buffer.find(b"\n") + 1

    def messages(self) -> Iterator[JSONObject]:
        """Yield each complete message. Raises QMPProtocolError for what is not one."""
        for line in self.lines():
            try:
                yield decode(line)
            except QMPProtocolError as error:
                self.fail(str(error), error)

    def fail(self, reason: str, cause: Exception | None = None) -> NoReturn:
        """Break the reader for good, because what follows cannot be trusted. Raises
        QMPProtocolError with this reason, now and from every later call."""
        self._broken = reason
        self._buffer.clear()
        raise QMPProtocolError(reason) from cause


class CommandReader(LineReader):
    """A reader whose lines also end where their outermost brace closes.

    QMP's specification asks servers alone for a line end: some clients (qemu.qmp, and with
    it qmp-shell) send the bare object. A line end still ends whatever was begun, so that a
    broken command costs no more than its own line.
    """

    # All that matters for finding the end: escapes as a whole, quotes, braces, line ends.
    _MARKS = re.compile(rb'\\[^\n]|["{}\[\]\n]')

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self._begin()

    def _begin(self) -> None:
        """Nothing is known of the next line yet."""
        self._scanned = self._depth = 0
        self._in_string = False

    def _end(self) -> int:
        while mark := self._MARKS.search(self._buffer, self._scanned):
            self._scanned = end = mark.end()
            if self._closes(mark[0]):
                self._begin()
                return end
        # A backslash at the very end may be the first half of an escape.
        self._scanned = max(self._scanned, len(self._buffer) - 1)
        return 0

    def _closes(self, mark: bytes) -> bool:
        """Take note of a mark; whether the line ends with it."""
        if mark == b"\n":
            return True
        if mark == b'"':
            self._in_string = not self._in_string
        elif not self._in_string and mark in b"{[":
            self._depth += 1
        elif not self._in_string and mark in b"}]" and self._depth > 0:
            self._depth -= 1
            return self._depth == 0
        return False


def decode(line: bytes) -> JSONObject:
    """Return the JSON object on *line*. Raises QMPProtocolError for anything else."""
    if _nesting(line) > NESTING_LIMIT:
        raise QMPProtocolError(f"JSON with more than {NESTING_LIMIT} levels: {line[:200]!r}")
    try:
        message = json.loads(line, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise QMPProtocolError(f"not JSON: {line[:200]!r}") from error
    if not isinstance(message, dict):
        raise QMPProtocolError(f"not a JSON object: {line[:200]!r}")
    return message


def _nesting(line: bytes) -> int:
    """The deepest level of the JSON on *line*; at least that many brackets if it is no JSON."""
    most = line.count(b"{") + line.count(b"[")
    if most <= NESTING_LIMIT:
        return most
    depth = most = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub(b"", line)):
        depth += 1 if bracket in b"{[" else -1
        most = max(most, depth)
    return most


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    """A number with a point or an exponent; JSON could not say infinity in the answer."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is out of range")
    return value


class ServerSession:
    """A server's side of one connection, up to the commands themselves.

    It greets, holds the client to the capabilities negotiation and answers nonsense. Send
    ``greeting()`` first; then whatever ``receive`` returns is to be dealt with in order: a
    ``Command`` is for the caller to carry out and answer, anything else is to be sent.
    """

    def __init__(self, version: JSONObject) -> None:
        self._version = version
        self._reader = CommandReader(COMMAND_LIMIT)
        self.negotiated = False
        """Whether the client may give commands; no events are sent before that."""

    def greeting(self) -> bytes:
        """Return the line to send before all others."""
        return encode(Greeting(self._version))

    def receive(self, data: bytes) -> Iterator[Command | Return | Failure]:
        """Yield the commands in *data* and the replies that need no command to be run.

        Raises QMPProtocolError for an endless line: hang up. Broken JSON only costs an
        error reply, since the next line stands for itself.
        """
        self._reader.feed(data)
        for line in self._reader.lines():
            yield self._take(line)

    def _take(self, line: bytes) -> Command | Return | Failure:
        id_ = None
        try:
            message = decode(line)
            id_ = message.get("id")
            command = parse_command(message)
            if command.name == "qmp_capabilities":
                self._negotiate(command)
                return Return({}, id_)
            if not self.negotiated:
                raise CommandNotFound("send 'qmp_capabilities' before any other command")
        except CommandError as error:
            return Failure(error, id_)
        except QMPProtocolError as error:
            return Failure(GenericError(str(error)), id_)
        return command

    def _negotiate(self, command: Command) -> None:
        if self.negotiated:
            raise CommandNotFound("capabilities were already negotiated")
        if unknown := set(command.arguments) - {"enable"}:
            raise GenericError(f"unknown argument {min(unknown)!r} of 'qmp_capabilities'")
        if command.arguments.get("enable", []) != []:
            raise GenericError("no capabilities are offered, so none can be enabled")
        self.negotiated = True
