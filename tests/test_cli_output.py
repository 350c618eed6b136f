# SPDX-License-Identifier: Apache-2.0
"""All text of the commands leaves by `nbdstream.cli.output`, which makes it fit to be shown."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdstream.cli.output import emit, say

CLI = Path(__file__).parent.parent / "nbdstream" / "cli"
# Each with the one thing that it writes, which `shown` has seen.
ALLOWED = {
    ("output.py", "click.echo"),
    ("boot.py", "sys.stderr.write"),  # the terminal's title, made of a `Snapshot`
    ("progress.py", "print"),  # a `Snapshot` where there is no terminal
}
WAYS_OUT = {"click.echo", "click.secho", "print", "sys.stdout.write", "sys.stderr.write"}


def ways_out() -> Iterator[tuple[str, str]]:
    for path in CLI.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in WAYS_OUT:
                yield path.name, ast.unparse(node.func)


def test_there_is_no_other_way_out() -> None:
    assert set(ways_out()) == ALLOWED


def test_words_of_strangers_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    say("image: \x1b]0;owned\x07\nforged line \u202e https://me:secret@host/")
    assert capsys.readouterr().out == (
        "image: \\x1b]0;owned\\x07\\nforged line \\u202e https://me:***@host/\n"
    )


def test_what_programs_read_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    emit('{"a": 1}\n', nl=False)
    assert capsys.readouterr().out == '{"a": 1}\n'


def test_without_libnbd_one_line_names_the_packages() -> None:
    code = "import sys; sys.modules['nbd'] = None; from nbdstream.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "x.raw"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.fullmatch(r"nbdstream: error: .*Debian.*Fedora.*Alpine.*\n", done.stderr)
