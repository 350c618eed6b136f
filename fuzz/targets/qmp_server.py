# SPDX-License-Identifier: Apache-2.0
"""The control socket's codec: `ServerSession` and `CommandTable` take any bytes, cut anywhere.

Accepts, answers with an error, or raises QMPProtocolError; every answer is a line of JSON that
a client understands. How the bytes are cut makes no difference.
"""

import json
from collections.abc import Iterator
from typing import Any, Literal

from fuzz.export import finished
from fuzz.patches import Loud, patched
from fuzz.source import Source
from fuzz.target import Target
from nbdstream.control import table
from nbdstream.control.server import version
from nbdstream.control.table import CommandTable, command
from nbdstream.errors import LeafError
from nbdstream.qmp import protocol
from nbdstream.qmp.protocol import (
    Command,
    CommandError,
    Failure,
    QMPProtocolError,
    Return,
    ServerSession,
    encode,
    parse_server_message,
)

LIMIT = 4096


class Commands:
    """A command for each kind of argument and of failure that the table knows."""

    @command("x-echo")
    async def echo(
        self,
        text: str,
        number: int = 0,
        yes: bool = False,
        mode: Literal["on", "off"] = "on",
        may_be: int | None = None,
    ) -> dict[str, object]:
        assert isinstance(text, str) and type(number) is int and type(yes) is bool
        assert mode in ("on", "off") and -(1 << 63) <= number < 1 << 63
        return {"text": text, "number": number, "yes": yes, "mode": mode, "may-be": may_be}

    @command("x-fail")
    async def fail(self, how: str) -> None:
        raise {"os": OSError(5, how), "leaf": LeafError(how)}.get(how, CommandError(how))


TABLE = CommandTable(Commands())


def _converse(pieces: Iterator[bytes]) -> tuple[list[bytes], str]:
    session = ServerSession(version())
    lines = [session.greeting()]
    for piece in pieces:
        try:
            for request in session.receive(piece):
                lines.append(_answer(request))
        except QMPProtocolError as error:
            return lines, str(error)
    return lines, ""


def _answer(request: Command | Return | Failure) -> bytes:
    if not isinstance(request, Command):
        return encode(request)
    try:
        return encode(Return(finished(TABLE.execute(request)), request.id))
    except CommandError as error:
        return encode(Failure(error, request.id))


def run(data: bytes) -> object:
    with patched(protocol, COMMAND_LIMIT=LIMIT), patched(table, log=Loud()):
        return _run(Source(data))


def _run(source: Source) -> object:
    cuts = Source(source.take(4))
    stream = source.rest()
    lines, error = _converse(iter([stream]))
    for line in lines:
        assert line.endswith(b"\r\n") and line.count(b"\n") == 1
        parse_server_message(json.loads(line, parse_constant=_refuse))
    cut_lines, cut_error = _converse(cuts.pieces(stream))
    assert lines == cut_lines and error == cut_error
    return lines, error


def _refuse(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def seeds() -> Iterator[bytes]:
    ready = bytes(4) + b'{"execute": "qmp_capabilities"}\n'
    echo = ready + b'{"execute": "x-echo", "arguments": {"text": '
    yield ready + b'{"execute": "query-commands", "id": 7}\r\n{"execute": "quit"}\n'
    yield echo + b'"a", "number": -5, "yes": true, "mode": "off"}}'
    yield echo + b'"\\ud83d\\ude00", "may-be": 1}, "id": [1.5]}'
    yield ready + b'{"execute": "x-fail", "arguments": {"how": "os"}}{"execute": "x-fail"}\n'
    yield b"\1\2\3\4" + b'{"execute": "x-fail", "id": {"a": null}}\n\n[1]\n"x"\nNaN\n{"a"\n'
    yield ready + b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}\n'


TARGET = Target("qmp_server", run, (), seeds, longest=1024)
