# SPDX-License-Identifier: Apache-2.0
"""Options from a file: ``--config FILE`` of a command.

A TOML file with one key for each long option, without the dashes, and for each argument, in
small letters. What the command line says goes first. Relative paths in values mean what they
would mean on the command line.
"""

import tomllib
from collections.abc import Callable
from typing import Any, TypeVar

import click

from nbdstream.errors import UsageError

_KINDS = (str, int, float)


Function = TypeVar("Function", bound=Callable[..., object])


def config_option(function: Function) -> Function:
    """Give a command the option."""
    return click.option(
        "--config",
        metavar="FILE",
        type=click.Path(dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=_read,
        help="Take options that are not given here from this TOML file.",
    )(function)


def _read(context: click.Context, option: click.Parameter, path: str | None) -> None:
    """Make the file's values the defaults of the parameters that are not given."""
    if path is None:
        return
    known = {_key(each): each for each in context.command.params if each is not option}
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not TOML, which is UTF-8") from error
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"{path}: there is no option '{key}'")
        parameter = known[key]
        _check(path, key, value, flag=getattr(parameter, "is_flag", False))
        assert parameter.name is not None
        defaults[parameter.name] = value if isinstance(value, bool) else str(value)
    context.default_map = defaults


def _key(parameter: click.Parameter) -> str:
    """What a parameter is called in a file."""
    longest = max(parameter.opts, key=len)
    return longest.removeprefix("--").lower()


def _check(path: str, key: str, value: object, *, flag: bool) -> None:
    if flag and not isinstance(value, bool):
        raise UsageError(f"{path}: '{key}' is true or false")
    if not flag and (isinstance(value, bool) or not isinstance(value, _KINDS)):
        raise UsageError(f"{path}: '{key}' is a string or a number")
