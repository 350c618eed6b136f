# SPDX-License-Identifier: Apache-2.0
"""A disk that is watched over its control socket: what its server says, kept up to date.

It costs the server little: a report twice a second, and a map as often as takes a twentieth of
the time at the most.
"""

import os
from collections.abc import Awaitable, Callable

import trio

from nbdstream.cli.dashboard import Dashboard
from nbdstream.cli.progress import Snapshot
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import Event, JSONObject, QMPConnectionError
from nbdstream.tasks import open_background_nursery
from nbdstream.units import format_size

# Seconds between two reports, and between two maps at the least.
REPORT_INTERVAL = 0.5
MAP_INTERVAL = 1.0
# Looking at a map may take this share of the time.
MAP_SHARE = 0.05
# Extents in one answer, and answers for one map: a disk in more pieces is shown in part.
EXTENTS = 8192
ANSWERS_MOST = 64


class Watched:
    """One disk.

    Attributes:
        control: its control socket.
        name: the leaf's file name; the control socket until the server has answered.
        dashboard: the display of this disk alone.
        over: whether the job has ended; ``trouble`` says then why the disk is not wholly local,
            "" if it is.
        qmp, job_id: the connection and the job, while there is one to steer.
    """

    def __init__(self, control: str) -> None:
        self.control = self.name = control
        self.dashboard = Dashboard(control, 0)
        self.over = False
        self.trouble = ""
        self.qmp: QMPClient | None = None
        self.job_id = ""

    @property
    def known(self) -> bool:
        """Whether the server has answered."""
        return self.dashboard.known

    @property
    def snapshot(self) -> Snapshot:
        """The last report; only if `known`."""
        return self.dashboard.snapshot

    def end(self, trouble: str) -> None:
        """The job has ended: "" if the disk is wholly local, else why not."""
        self.over, self.trouble, self.qmp = True, trouble, None

    async def look(self, qmp: QMPClient) -> None:
        """Look at the disk for the first time. Raises QMPError."""
        block = (await qmp.execute("query-block"))[0]
        report = await qmp.execute("x-nbdstream-stats")
        inserted, size = block["inserted"], report["size"]
        self.name = os.path.basename(inserted["file"])
        title = f"{block['device']}: {self.name} ({inserted['drv']}, {format_size(size)})"
        self.dashboard = Dashboard(title, size)
        self.dashboard.look(report, trio.current_time())

    async def follow(self, qmp: QMPClient, job_id: str) -> Event:
        """After `look`: keep the dashboard up to date until the event that ends the job; return it.

        Raises QMPError if the server ends before.
        """
        self.qmp, self.job_id = qmp, job_id
        async with open_background_nursery() as nursery:
            for task in (self._look, self._map, self._listen):
                nursery.start_soon(_until_closed, task, qmp)
            return await qmp.wait_event(
                "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", data={"device": job_id}
            )

    async def _look(self, qmp: QMPClient) -> None:
        while True:
            self.dashboard.look(await qmp.execute("x-nbdstream-stats"), trio.current_time())
            await trio.sleep(REPORT_INTERVAL)

    async def _map(self, qmp: QMPClient) -> None:
        while True:
            began = trio.current_time()
            self.dashboard.map(await _extents(qmp))
            took = trio.current_time() - began
            await trio.sleep(max(MAP_INTERVAL, took / MAP_SHARE))

    async def _listen(self, qmp: QMPClient) -> None:
        with qmp.events() as events:
            async for event in events:
                self.dashboard.happened(event)


async def _until_closed(task: Callable[[QMPClient], Awaitable[None]], qmp: QMPClient) -> None:
    try:
        await task(qmp)
    except QMPConnectionError:
        pass  # `wait_event` raises the same, after the event if there is one


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
