# SPDX-License-Identifier: Apache-2.0
"""The kinds of values that options take."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from nbdstream.errors import UsageError
from nbdstream.units import parse_duration, parse_rate, parse_size

if TYPE_CHECKING:
    _NumberType = click.ParamType[int | float]
else:
    _NumberType = click.ParamType  # generic since click 8.3 only


class _Parsed(_NumberType):
    """A value that a function of ours parses, raising UsageError."""

    def __init__(self, name: str, parse: Callable[[str], int | float]) -> None:
        self.name = name
        self._parse = parse

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float:
        if isinstance(value, (int, float)):
            return value
        try:
            return self._parse(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)


class _Control(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3 only
    """A control socket, by its own path or by the leaf whose server has it."""

    name = "control"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        from nbdstream.cli.find import control_socket

        return control_socket(str(value))


SIZE = _Parsed("size", parse_size)
RATE = _Parsed("rate", parse_rate)
DURATION = _Parsed("duration", parse_duration)
CONTROL = _Control()
ON_OFF = click.Choice(["on", "off"])
FORMAT = click.Choice(["qcow2", "qed", "raw"])
# What decides where it is not given: nbdstream/leaf/probe.py, docs/security.md.
FORMAT_HELP = "LEAF's format. Default: as it was made here, else by its suffix; never its content."
LEAF = click.Path(dir_okay=False)
