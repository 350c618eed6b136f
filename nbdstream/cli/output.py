# SPDX-License-Identifier: Apache-2.0
"""The way out for all text of the commands; a test sees to it that there is no other.

What people read may hold words of strangers (names in images, messages of servers): `say` makes
them fit for a terminal. What programs read goes out as it is by `emit`.
"""

import click

from nbdstream.text import shown


def say(text: str = "", *, err: bool = False) -> None:
    """Print one line for people, on stdout or stderr."""
    click.echo(shown(text), err=err)


def emit(text: str, *, nl: bool = True) -> None:
    """Print text for programs on stdout: JSON, SVG, a profile. ``nl``: end it with a newline."""
    click.echo(text, nl=nl)
