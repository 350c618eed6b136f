# SPDX-License-Identifier: Apache-2.0
"""Take back a migration whose tool has died: `nbdstream migrate --cancel`.

All that is to be known is still there to be asked for: the offers at the sources, the state
of the memory's migration, and whether the destination runs. Where the destination may have
been told to run, nothing is taken back.
"""

from contextlib import suppress

import trio

from nbdstream.errors import LeafInUseError, NbdstreamError
from nbdstream.handover.generation import STANDBY, generation_of
from nbdstream.leaf import open_leaf
from nbdstream.leaf.base import BackingReference
from nbdstream.migrate.destination import delete_leaf, quit_qemu
from nbdstream.migrate.limits import answered, limit
from nbdstream.migrate.memory import cancel, default_settings, resume, settled_status
from nbdstream.migrate.monitor import Monitor
from nbdstream.migrate.plan import DiskPlan, MigrationError, MigrationPlan
from nbdstream.migrate.sources import QemuServer, make_sources
from nbdstream.migrate.switchover import SPLIT
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import QMPError
from nbdstream.tasks import in_worker

ASK_SECONDS = 10.0
# Seconds until it is known whether it is too late; that waits for a hand-over to end.
LATE_SECONDS = 60.0
# Seconds that a server at the destination gets to end; it tries for a while to round off
# clusters, in vain.
END_SECONDS = 40.0
_POLL = 0.1


async def take_back(plan: MigrationPlan) -> str:
    """Have the guest go on at the source; a line that says what was done.

    Raises MigrationError if it is too late, if that cannot be told, or if a disk's
    server does not answer (then the rest is done); QMPError.
    """
    monitor = Monitor(plan.source_qmp)
    server = QemuServer(monitor, plan.tls)
    async with answered(monitor.session(), "the source's QEMU") as source:
        with limit("the source's QEMU did not say how far the migration is", LATE_SECONDS):
            await _refuse_if_late(source, plan)
        await quit_qemu(plan.destination_qmp, None)
        generations, troubles = [], []
        for disk, planned in zip(make_sources(plan, server), plan.disks, strict=True):
            generation = ""
            try:
                with limit("no answer"):
                    generation = await disk.adopt()
                    await disk.unseal()
            except (QMPError, MigrationError) as error:
                troubles.append(f"{planned.source} may still be sealed: {error}")
            generations.append(generation)
        if any(planned.source_node for planned in plan.disks):
            await server.clear()
        await cancel(source)
        with limit("the guest could not be continued at the source"):
            await resume(source)
            await default_settings(plan).restore(source)
    if troubles:
        raise MigrationError(
            f"the guest was continued at the source, but {'; '.join(troubles)}; see to that, "
            "and take the migration back once more"
        )
    # Once more: it may have been about to start.
    await quit_qemu(plan.destination_qmp, None)
    left = [
        planned.leaf
        for planned, generation in zip(plan.disks, generations, strict=True)
        if not await _discard(planned, generation)
    ]
    words = "taken back: the guest runs at the source"
    return words + (f"; left over, for you to delete: {', '.join(left)}" if left else "")


async def _refuse_if_late(source: QMPClient, plan: MigrationPlan) -> None:
    """Raises MigrationError unless it is certain that the destination was not told to run."""
    if (await source.execute("query-status"))["running"]:
        return  # whatever query-migrate tells is of an earlier migration, such as to this host
    status = await settled_status(source)
    if status in SPLIT:
        raise MigrationError(
            "too late: post-copy of the guest's memory has begun; if it does not run at the "
            "destination, continue it there"
        )
    if status == "completed":
        await _refuse_if_told(plan)


async def _refuse_if_told(plan: MigrationPlan) -> None:
    """All has gone over; only the destination knows whether it was told to run."""
    with trio.move_on_after(ASK_SECONDS), suppress(QMPError):
        async with QMPClient.connect(plan.destination_qmp) as destination:
            status = await destination.execute("query-status")
            # Paused is also a guest that was stopped again, after it had run.
            if status["status"] == "paused" and not await _has_run(destination):
                return
            raise MigrationError(
                f"too late: the guest is at the destination, and {status['status']}"
            )
    raise MigrationError(
        "too late: the destination has the guest and does not answer; if you know that it was "
        "never told to run, end it, delete LEAF.sealed at the source and continue the guest"
    )


async def _has_run(destination: QMPClient) -> bool:
    """Whether the guest has used a disk there."""
    return any(
        count
        for device in await destination.execute("query-blockstats")
        for name, count in device["stats"].items()
        if name.endswith("_operations")
    )


async def _discard(plan: DiskPlan, generation: str) -> bool:
    """End the destination's server and delete its leaf, if they belong to what was taken
    back; returns whether nothing is left."""
    belongs = False
    with suppress(QMPError), trio.move_on_after(ASK_SECONDS):
        async with QMPClient.connect(plan.control) as qmp:
            made_for = (await qmp.execute("x-nbdstream-standby-query")).get("generation")
            if not generation or made_for != generation:
                return False
            belongs = True
            await qmp.execute("quit")
    with trio.move_on_after(END_SECONDS):
        while True:
            try:
                backing = await in_worker(_backing, plan.leaf)
            except LeafInUseError:
                await trio.sleep(_POLL)
            except FileNotFoundError:
                return True
            except (NbdstreamError, OSError):
                return False
            else:
                break
        known = generation_of(backing.uri) if backing is not None else ""
        stands_by = backing is not None and backing.identity == STANDBY
        if belongs or stands_by or known == generation != "":
            delete_leaf(plan)
            return True
    return False


def _backing(leaf: str) -> BackingReference | None:
    """What a leaf records of its backing. Raises LeafError, OSError."""
    opened = open_leaf(leaf, read_only=True)
    try:
        return opened.backing
    finally:
        opened.close()
