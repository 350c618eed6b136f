# SPDX-License-Identifier: Apache-2.0
"""Steering an emulated link: its settings in text, the link as a process, the command."""

import subprocess
import sys

import pytest

from testbed.link.control import (
    Address,
    parse_bit_rate,
    parse_command,
    settings_line,
)
from testbed.link.model import Shape
from testbed.processes import python_environment

COMMAND = [sys.executable, "-m", "testbed.link"]


def test_settings_survive_the_line_protocol() -> None:
    for shape in (Shape(), Shape(rate=1.5e6, delay=0.0125, jitter=0.001, queue=65536)):
        assert parse_command(settings_line(shape), Shape(rate=1)).shape == shape


def test_settings_change_only_what_they_name() -> None:
    before = Shape(rate=1e6, delay=0.5)
    after = parse_command("set delay=20ms", before).shape
    assert after == Shape(rate=1e6, delay=0.02)


@pytest.mark.parametrize(
    ("text", "rate"), [("100M", 1e8), ("1.5G", 1.5e9), ("64k", 64e3), ("unlimited", None)]
)
def test_rates(text: str, rate: float | None) -> None:
    assert parse_bit_rate(text) == rate


@pytest.mark.parametrize(
    "line",
    [
        "",
        "fly",
        "set rate=fast",
        "set rate=0",
        "set delay=-1",
        "set colour=red",
        "set queue=0",
        "stall soon",
        "cut",
        "cut gently",
        "quit now",
    ],
)
def test_nonsense_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        parse_command(line, Shape())


def test_addresses() -> None:
    for text in ("127.0.0.1:80", "[::1]:80", "unix:/run/a b"):
        assert str(Address.parse(text)) == text
    for text in ("", "localhost", "host:port", "80"):
        with pytest.raises(ValueError):
            Address.parse(text)


@pytest.mark.parametrize(
    "options", [["--to", "nowhere"], ["--to", "unix:/x", "--rate", "fast"], ["--listen", "0:x"]]
)
def test_the_command_explains_what_is_wrong(options: list[str]) -> None:
    options = options if "--to" in options else [*options, "--to", "unix:/x"]
    done = subprocess.run(
        [*COMMAND, *options], capture_output=True, text=True, env=python_environment()
    )
    assert done.returncode == 1
    assert done.stderr.startswith("testbed.link: error: ")
    assert len(done.stderr.splitlines()) == 1
