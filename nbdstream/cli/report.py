# SPDX-License-Identifier: Apache-2.0
"""report: a disk that is being served, as a page for browsers."""

from pathlib import Path

import click

from nbdstream.cli.output import emit
from nbdstream.cli.steer import control_argument, run_on
from nbdstream.control.page import page
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import JSONObject


@click.command()
@control_argument
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Write the page to this file ('-': stdout).",
)
def report(control: str, output: str) -> None:
    """Write a page about a disk: its map, rates, latencies, boot profile.

    The page is one HTML file that needs nothing else. `serve --metrics` has the same page, live.
    """

    async def look(qmp: QMPClient) -> JSONObject:
        found: JSONObject = await qmp.execute("x-nbdstream-report")
        return found

    text = page(run_on(control, look), live=False)
    if output == "-":
        emit(text, nl=False)
    else:
        Path(output).write_text(text)
