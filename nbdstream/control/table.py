# SPDX-License-Identifier: Apache-2.0
"""The commands of a QMP server as a table: a name, a schema, an async method.

A group of commands is an object whose methods wear the decorator:

    class Greeter:
        @command("x-greet")
        async def greet(self, name: str, loud: bool = False) -> JSONObject: ...

    table = CommandTable(Greeter())

The method's signature is the schema: parameters become QMP arguments (with ``-`` for
``_``), those with a default are optional, and the annotations say what is accepted: str,
int (64 bits), bool, or a Literal of strings. What it returns goes on the wire; None
becomes the empty object. Arguments are checked before a method is called, in QEMU's words.

A method fails by raising a `CommandError`; NbdstreamError and OSError become GenericError.
Anything else is a bug: the client is told no more than that, the log gets the traceback,
and the disk goes on being served.
"""

import inspect
import logging
import types
import typing
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from nbdstream.errors import NbdstreamError
from nbdstream.qmp.protocol import Command, CommandError, CommandNotFound, GenericError, JSONObject

log = logging.getLogger(__name__)

Method = Callable[..., Awaitable[Any]]
M = TypeVar("M", bound=Method)

_NAME = "_qmp_command"
_KINDS = {str: "string", int: "integer", bool: "boolean"}
_INT64 = range(-(2**63), 2**63)


def command(name: str) -> Callable[[M], M]:
    """Mark a method as the QMP command ``name``."""

    def mark(method: M) -> M:
        setattr(method, _NAME, name)
        return method

    return mark


@dataclass(frozen=True)
class _Parameter:
    """One argument of a command: its name on the wire, and what it may be."""

    name: str
    keyword: str
    kind: type
    choices: tuple[str, ...]
    required: bool

    def check(self, value: Any) -> None:
        # In JSON true is no number, but in Python it is.
        if not isinstance(value, self.kind) or (self.kind is int and isinstance(value, bool)):
            self._refuse_type()
        if self.kind is int and value not in _INT64:
            self._refuse_type()
        if self.choices and value not in self.choices:
            raise GenericError(f"Parameter '{self.name}' does not accept value '{value}'")

    def _refuse_type(self) -> typing.NoReturn:
        expected = _KINDS[self.kind]
        raise GenericError(f"Invalid parameter type for '{self.name}', expected: {expected}")


def _parameters(method: Method) -> dict[str, _Parameter]:
    hints = typing.get_type_hints(method)
    parameters = {}
    for keyword, parameter in inspect.signature(method).parameters.items():
        kind, choices = _accepted(hints[keyword])
        name = keyword.replace("_", "-")
        required = parameter.default is inspect.Parameter.empty
        parameters[name] = _Parameter(name, keyword, kind, choices, required)
    return parameters


def _accepted(hint: Any) -> tuple[type, tuple[str, ...]]:
    """The type and the choices that an annotation stands for."""
    if isinstance(hint, types.UnionType):  # ``X | None``: None is for what was not given
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return str, typing.get_args(hint)
    if hint not in _KINDS:
        raise TypeError(f"no QMP argument can be a {hint}")
    return hint, ()


class CommandTable:
    """Commands by name; itself the group of those about the table."""

    def __init__(self, *groups: object) -> None:
        self._commands: dict[str, tuple[Method, dict[str, _Parameter]]] = {}
        for group in (self, *groups):
            self.add(group)

    def add(self, group: object) -> None:
        """Add all commands of a group. Raises ValueError if a name is taken."""
        for _, method in inspect.getmembers(group, inspect.iscoroutinefunction):
            name = getattr(method, _NAME, None)
            if name is None:
                continue
            if name in self._commands:
                raise ValueError(f"two commands by the name of {name}")
            self._commands[name] = method, _parameters(method)

    @command("query-commands")
    async def query_commands(self) -> list[JSONObject]:
        return [{"name": name} for name in sorted(self._commands)]

    async def execute(self, request: Command) -> Any:
        """Carry out a command; what it returns is for the wire. Raises CommandError only."""
        if request.name not in self._commands:
            raise CommandNotFound(f"The command {request.name} has not been found")
        method, parameters = self._commands[request.name]
        arguments = _checked(parameters, request.arguments)
        try:
            result = await method(**arguments)
        except CommandError:
            raise
        except OSError as error:
            raise GenericError(error.strerror or str(error)) from error
        except NbdstreamError as error:
            raise GenericError(str(error)) from error
        except Exception as error:
            log.exception("the command %s failed unexpectedly", request.name)
            raise GenericError("internal error; the server's log has more") from error
        return {} if result is None else result


def _checked(parameters: dict[str, _Parameter], arguments: JSONObject) -> dict[str, Any]:
    """The arguments by keyword, once all of them are as they must be."""
    keywords = {}
    for name, value in arguments.items():
        if name not in parameters:
            raise GenericError(f"Parameter '{name}' is unexpected")
        parameters[name].check(value)
        keywords[parameters[name].keyword] = value
    for name, parameter in parameters.items():
        if parameter.required and name not in arguments:
            raise GenericError(f"Parameter '{name}' is missing")
    return keywords
