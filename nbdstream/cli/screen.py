# SPDX-License-Identifier: Apache-2.0
"""The full-screen display of ``watch``: draws what the servers say, and takes keys."""

import trio
from rich.console import Console
from rich.live import Live

from nbdstream.cli.keys import follow_keys, has_keys
from nbdstream.cli.overview import Overview
from nbdstream.cli.watched import Watched

# Seconds between two drawings.
DRAW_INTERVAL = 0.25


async def show(disks: list[Watched]) -> None:
    """A task: show these disks until cancelled; the terminal is as it was then.

    Raises KeyboardInterrupt if the user leaves.
    """
    overview = Overview(disks, keys=has_keys())
    live = Live(
        overview,
        console=Console(stderr=True, highlight=False),
        screen=True,
        auto_refresh=False,  # by us, from the event loop: no thread
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with live:
        async with trio.open_nursery() as nursery:
            if has_keys():
                nursery.start_soon(follow_keys, overview, live.refresh)
            while True:
                live.refresh()
                await trio.sleep(DRAW_INTERVAL)
