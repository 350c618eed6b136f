# SPDX-License-Identifier: Apache-2.0
"""set, rebase: what can be changed of a server while it runs."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nbdstream.backing.sources import anchored
from nbdstream.cli.output import emit, say
from nbdstream.cli.steer import as_json_option, control_argument, device_of, run_on
from nbdstream.errors import UsageError
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import JSONObject
from nbdstream.units import format_duration, format_rate, parse_duration, parse_rate


def _timeout(text: str) -> int:
    """Whole seconds: what is left of one counts as one, so that it does not become no limit."""
    return 0 if text == "none" else math.ceil(parse_duration(text))


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise UsageError(f"{text!r} is neither 'on' nor 'off'")
    return text == "on"


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or int(text) < 1:
        raise UsageError(f"{text!r} is not a number of clients: give 1 or more")
    return int(text)


# Each key with how it is read, and how it is shown.
_KEYS: dict[str, tuple[Callable[[str], Any], Callable[[Any], str]]] = {
    "backing-timeout": (_timeout, lambda value: format_duration(value) if value else "none"),
    "copy-on-read": (_switch, lambda value: "on" if value else "off"),
    "max-clients": (_number, str),
    "speed": (parse_rate, lambda value: format_rate(value) if value else "no limit"),
}


@click.command("set")
@control_argument
@click.argument("pairs", nargs=-1, metavar="[KEY=VALUE...]")
@as_json_option
def set_(control: str, pairs: tuple[str, ...], as_json: bool) -> None:
    """Change limits of a running server, or show them.

    KEY is backing-timeout (30s, 5m, none), copy-on-read (on, off), max-clients (a number) or
    speed (bytes per second, 20M; 0: no limit). They are changed together, or none of them is.
    Without KEY=VALUE, all are shown.
    """
    wanted = dict(_parsed(pair) for pair in pairs)

    async def work(qmp: QMPClient) -> JSONObject:
        if wanted:
            await qmp.execute("x-nbdstream-set-parameters", wanted)
        parameters: JSONObject = await qmp.execute("x-nbdstream-query-parameters")
        return parameters

    parameters = run_on(control, work)
    if as_json:
        emit(json.dumps(parameters))
    elif not wanted:
        for key in sorted(parameters):
            say(f"{key + ':':<16} {_KEYS[key][1](parameters[key])}")


def _parsed(pair: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if key not in _KEYS or not equals:
        raise UsageError(f"{pair!r} is not KEY=VALUE with one of the keys {', '.join(_KEYS)}")
    return key, _KEYS[key][0](value)


@click.command()
@control_argument
@click.argument("uri")
def rebase(control: str, uri: str) -> None:
    """Read the backing from URI from now on: the same image at another place.

    Its size and identity are checked, and the leaf records the new place. If anything fails, the
    old place stays in use.
    """
    where = anchored(uri, Path.cwd())

    async def work(qmp: QMPClient) -> str:
        arguments = {"device": await device_of(qmp), "uri": where}
        return str((await qmp.execute("x-nbdstream-rebase", arguments))["uri"])

    say(f"the backing is read from {run_on(control, work)}")
