# SPDX-License-Identifier: Apache-2.0
"""Take back a migration whose tool has died: `nbdstream migrate --cancel`.

All that is to be known is still there to be asked for: the offers at the sources, the state
of the memory's migration, and whether the destination runs. Where the destination may have
been told to run, nothing is taken back.
"""

from contextlib import suppress

import trio

from nbdstream.guest.qmp import QMPClient
from nbdstream.migrate.destination import quit_qemu
from nbdstream.migrate.memory import cancel, resume
from nbdstream.migrate.plan import MigrationError, MigrationPlan
from nbdstream.migrate.sources import QemuServer, make_sources
from nbdstream.qmp import QMPConnectionError

# States of the memory's migration in which the destination may have been told to run.
_TOO_LATE = ("completed", "postcopy-active", "postcopy-paused", "postcopy-recover")
ASK_SECONDS = 10.0


async def take_back(plan: MigrationPlan) -> str:
    """Have the guest go on at the source; a line that says what was done.

    Raises MigrationError if it is too late, or if nobody can tell whether it is; QMPError.
    """
    async with QMPClient.connect(plan.source_qmp) as source:
        status = (await source.execute("query-migrate")).get("status", "none")
        if status in _TOO_LATE:
            await _refuse_if_told(plan)
        server = QemuServer()
        server.qmp = source
        sources = make_sources(plan.disks, server)
        await quit_qemu(plan.destination_qmp, None)
        for disk in sources:
            await disk.adopt()
            await disk.unseal()
        await cancel(source)
        await resume(source)
    return "taken back: the guest runs at the source; leaves at the destination are of no use"


async def _refuse_if_told(plan: MigrationPlan) -> None:
    """All has gone over; only the destination knows whether it was told to run."""
    with trio.move_on_after(ASK_SECONDS), suppress(QMPConnectionError):
        async with QMPClient.connect(plan.destination_qmp) as destination:
            status = await destination.execute("query-status")
            if status["status"] == "paused" and not status["running"]:
                return
            raise MigrationError(f"too late: the guest is {status['status']} at the destination")
    raise MigrationError(
        "too late: the destination has the guest and does not answer; if you know that it was "
        "never told to run, end it, delete LEAF.sealed at the source and continue the guest"
    )
