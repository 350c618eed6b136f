# SPDX-License-Identifier: Apache-2.0
"""The full-screen display of ``watch``: asks the server, draws what it says.

It costs the server little: a report twice a second, and a map as often as takes a twentieth of
the time at the most.
"""

import os

import trio
from rich.console import Console
from rich.live import Live

from nbdstream.cli.dashboard import Dashboard
from nbdstream.cli.keys import HINT, follow_keys, has_keys
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import Event, JSONObject, QMPConnectionError
from nbdstream.units import format_size

# Seconds between two reports, and between two maps at the least.
REPORT_INTERVAL = 0.5
MAP_INTERVAL = 1.0
# Looking at a map may take this share of the time.
MAP_SHARE = 0.05
# Extents in one answer, and answers for one map: a disk in more pieces is shown in part.
EXTENTS = 8192
ANSWERS_MOST = 64


async def watch_on_screen(qmp: QMPClient, job_id: str) -> Event:
    """Show the disk until the event comes that ends the job; return that.

    Raises QMPError if the server ends before. Cancelled: the terminal is as it was.
    """
    block = (await qmp.execute("query-block"))[0]
    inserted = block["inserted"]
    size: int = (await qmp.execute("x-nbdstream-stats"))["size"]
    file = os.path.basename(inserted["file"])
    name = f"{block['device']}: {file} ({inserted['drv']}, {format_size(size)})"
    dashboard = Dashboard(name, size)
    live = Live(
        dashboard,
        console=Console(stderr=True, highlight=False),
        screen=True,
        auto_refresh=False,  # by us, from the event loop: no thread
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with live:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_look, qmp, dashboard, live)
            nursery.start_soon(_map, qmp, dashboard)
            nursery.start_soon(_listen, qmp, dashboard)
            if has_keys():
                dashboard.hint = HINT
                nursery.start_soon(_steer, qmp, job_id)
            event = await qmp.wait_event(
                "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", data={"device": job_id}
            )
            nursery.cancel_scope.cancel()
    return event


async def _look(qmp: QMPClient, dashboard: Dashboard, live: Live) -> None:
    try:
        while True:
            dashboard.look(await qmp.execute("x-nbdstream-stats"), trio.current_time())
            live.refresh()
            await trio.sleep(REPORT_INTERVAL)
    except QMPConnectionError:
        pass  # `wait_event` raises the same, after the event if there is one


async def _map(qmp: QMPClient, dashboard: Dashboard) -> None:
    try:
        while True:
            began = trio.current_time()
            dashboard.map(await _extents(qmp))
            took = trio.current_time() - began
            await trio.sleep(max(MAP_INTERVAL, took / MAP_SHARE))
    except QMPConnectionError:
        pass  # as above


async def _steer(qmp: QMPClient, job_id: str) -> None:
    try:
        await follow_keys(qmp, job_id)
    except QMPConnectionError:
        pass  # as above


async def _extents(qmp: QMPClient) -> list[JSONObject]:
    """The whole disk's extents, as far as `ANSWERS_MOST` answers go."""
    found: list[JSONObject] = []
    offset: int | None = 0
    for _ in range(ANSWERS_MOST):
        answer = await qmp.execute("x-nbdstream-map", {"offset": offset, "limit": EXTENTS})
        found += answer["extents"]
        offset = answer.get("next")
        if offset is None:
            break
    return found


async def _listen(qmp: QMPClient, dashboard: Dashboard) -> None:
    with qmp.events() as events:
        try:
            async for event in events:
                dashboard.happened(event)
        except QMPConnectionError:
            pass  # as above
