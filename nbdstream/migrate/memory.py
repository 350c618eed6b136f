# SPDX-License-Identifier: Apache-2.0
"""QEMU's live migration of a guest without its disks, driven over both QMP sockets.

Three capabilities make it safe to have disks follow: ``pause-before-switchover`` stops the
migration where the guest stands still, its disks are flushed and everything can still be
taken back; ``return-path`` makes "completed" mean that the destination has it all;
``events`` spares us to poll. The destination was started with ``-S``: it runs its guest
when it is told to, and not before.
"""

import logging
from collections.abc import Callable

import trio

from nbdstream.guest.qmp import EventQueue, QMPClient
from nbdstream.migrate.plan import MigrationError, MigrationPlan
from nbdstream.qmp import CommandError, Event, JSONObject
from nbdstream.tasks import open_background_nursery

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
FAILED = ("failed", "cancelled", "cancelling")
# The states of a migration that can still be cancelled.
CANCELLABLE = ("setup", "active", "pre-switchover", "device")


class Memory:
    """The migration of one guest, from ``source`` to ``destination``."""

    def __init__(self, source: QMPClient, destination: QMPClient, plan: MigrationPlan) -> None:
        self._source = source
        self._destination = destination
        self._plan = plan
        self._completed = False

    async def start(self) -> None:
        """Begin. Raises QMPError."""
        common = {"return-path": True, "events": True, "postcopy-ram": self._plan.postcopy_ram}
        await _set(self._destination, common)
        await _set(self._source, {**common, "pause-before-switchover": True})
        parameters: JSONObject = {}
        if self._plan.max_bandwidth:
            parameters["max-bandwidth"] = self._plan.max_bandwidth
        if self._plan.downtime_limit:
            parameters["downtime-limit"] = round(self._plan.downtime_limit * 1000)
        if parameters:
            await self._source.execute("migrate-set-parameters", parameters)
        await self._destination.execute(
            "migrate-incoming", {"uri": self._plan.memory_listen or self._plan.memory}
        )
        await self._source.execute("migrate", {"uri": self._plan.memory})

    async def wait_stopped(self, events: EventQueue, watch: Callable[[JSONObject], None]) -> Event:
        """Return the event when the guest stands still; ``watch`` sees query-migrate meanwhile.

        ``events`` are the source's, from before `start`. Raises MigrationError, QMPError.
        """
        async with open_background_nursery() as nursery:
            nursery.start_soon(self._look, watch)
            if self._plan.postcopy_ram:
                nursery.start_soon(self._leave_early, events)
            return await self._wait(events, "pre-switchover")

    async def _look(self, watch: Callable[[JSONObject], None]) -> None:
        """Report on the transfer."""
        while True:
            watch(await self._source.execute("query-migrate"))
            await trio.sleep(POLL_SECONDS)

    async def _leave_early(self, events: EventQueue) -> None:
        """Go over to post-copy when all of memory is there, if not its latest state."""
        await events.wait("MIGRATION_PASS", data={"pass": 2})
        try:
            await self._source.execute("migrate-start-postcopy")
        except CommandError as error:
            log.info("no need for post-copy any more: %s", error)

    async def hand_over(self, events: EventQueue) -> None:
        """Send the rest, so that the destination has all that it takes to run the guest.

        Raises MigrationError: the migration failed, QMPError.
        """
        await self._source.execute("migrate-continue", {"state": "pre-switchover"})
        await self._wait(events, "postcopy-active" if self._plan.postcopy_ram else "completed")

    async def wait_completed(self, events: EventQueue) -> None:
        """After post-copy: return when the last page has gone over. Raises MigrationError."""
        if not self._completed:  # it may have converged before post-copy could begin
            await self._wait(events, "completed")

    async def _wait(self, events: EventQueue, wanted: str) -> Event:
        while True:
            event = await events.wait("MIGRATION")
            status = event.data.get("status")
            self._completed = status == "completed"
            if status == wanted or (wanted == "postcopy-active" and self._completed):
                return event
            if status in FAILED:
                why = (await self._source.execute("query-migrate")).get("error-desc", "")
                raise MigrationError(f"the migration of memory {status}" + (why and f": {why}"))


async def cancel(source: QMPClient) -> None:
    """Take the migration of memory back, if one is under way. Raises QMPError."""
    with source.events() as events:
        status = (await source.execute("query-migrate")).get("status", "none")
        if status not in (*CANCELLABLE, "cancelling"):
            return
        await source.execute("migrate_cancel")
        while status not in ("cancelled", "failed", "completed"):
            with trio.move_on_after(POLL_SECONDS):
                await events.wait("MIGRATION")
            status = (await source.execute("query-migrate")).get("status", "none")


async def resume(source: QMPClient) -> None:
    """Let the guest go on at the source, if it has not by itself. Raises QMPError."""
    if not (await source.execute("query-status"))["running"]:
        await source.execute("cont")


async def _set(qmp: QMPClient, wanted: dict[str, bool]) -> None:
    capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
    try:
        await qmp.execute("migrate-set-capabilities", {"capabilities": capabilities})
    except CommandError as error:
        raise MigrationError(f"QEMU cannot migrate as it has to: {error}") from error
