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
from contextlib import suppress
from dataclasses import dataclass

import trio

from nbdstream.migrate import tls
from nbdstream.migrate.limits import limit
from nbdstream.migrate.plan import MigrationError, MigrationPlan
from nbdstream.qmp.client import EventQueue, QMPClient
from nbdstream.qmp.protocol import CommandError, Event, JSONObject, QMPError
from nbdstream.tasks import open_background_nursery

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
# Seconds without a byte of memory after which the link counts as lost. TCP alone would take a
# quarter of an hour, and at the end the guest stands still meanwhile.
STALL_SECONDS = 20.0
# Seconds that QEMU gets to pull out of the migration, out of band.
YANK_SECONDS = 5.0
# Seconds until a migration that was cancelled has ended, if nothing holds it up.
CANCEL_SECONDS = 10.0
FAILED = ("failed", "cancelled", "cancelling")
# The states of a migration that can still be cancelled.
CANCELLABLE = ("setup", "active", "pre-switchover", "device")
# What `Memory.start` may set, and QEMU's defaults.
CAPABILITIES = ("return-path", "events", "postcopy-ram", "pause-before-switchover")
DEFAULT_PARAMETERS: JSONObject = {
    "max-bandwidth": 128 << 20,
    "downtime-limit": 300,
    "tls-creds": "",
    "tls-hostname": "",
}


class Memory:
    """The migration of one guest, from ``source`` to ``destination``."""

    def __init__(self, source: QMPClient, destination: QMPClient, plan: MigrationPlan) -> None:
        self._source = source
        self._destination = destination
        self._plan = plan
        self._completed = False

    async def start(self) -> None:
        """Begin. Raises QMPError, MigrationError."""
        common = {"return-path": True, "events": True, "postcopy-ram": self._plan.postcopy_ram}
        await _set(self._destination, common)
        await _set(self._source, {**common, "pause-before-switchover": True})
        if self._plan.tls:
            credentials = await tls.give(self._destination, self._plan.tls, tls.SERVER)
            await self._destination.execute("migrate-set-parameters", {"tls-creds": credentials})
            await tls.give(self._source, self._plan.tls, tls.CLIENT)
        if parameters := wanted_parameters(self._plan):
            await self._source.execute("migrate-set-parameters", parameters)
        await self._destination.execute(
            "migrate-incoming", {"uri": self._plan.memory_listen or self._plan.memory}
        )
        await self._source.execute("migrate", {"uri": self._plan.memory})

    async def wait_stopped(self, events: EventQueue, watch: Callable[[JSONObject], None]) -> Event:
        """Return the event when the guest stands still; ``watch`` sees query-migrate meanwhile.

        ``events`` are the source's, from before `start`. Raises MigrationError, QMPError.
        """
        return await self._while_it_moves(events, "pre-switchover", watch)

    async def _while_it_moves(
        self, events: EventQueue, wanted: str, watch: Callable[[JSONObject], None]
    ) -> Event:
        """Wait for a status, for as long as memory goes over."""
        with trio.CancelScope(deadline=trio.current_time() + STALL_SECONDS) as stall:
            async with open_background_nursery() as nursery:
                nursery.start_soon(self._look, watch, stall)
                if self._plan.postcopy_ram and wanted == "pre-switchover":
                    nursery.start_soon(self._leave_early, events)
                return await self._wait(events, wanted)
        raise MigrationError(f"nothing of the memory went over for {STALL_SECONDS:g} s")

    async def _look(self, watch: Callable[[JSONObject], None], stall: trio.CancelScope) -> None:
        """Report on the transfer, and put the deadline off whenever something was sent."""
        sent = -1
        while True:
            facts = await self._source.execute("query-migrate")
            watch(facts)
            if (now := facts.get("ram", {}).get("transferred", 0)) != sent:
                sent, stall.deadline = now, trio.current_time() + STALL_SECONDS
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

        Raises MigrationError: the migration failed, QMPError. Not to be cancelled: post-copy
        begins here, and there is no way back from it.
        """
        wanted = "postcopy-active" if self._plan.postcopy_ram else "completed"
        try:
            await self._source.execute("migrate-continue", {"state": "pre-switchover"})
            await self._while_it_moves(events, wanted, lambda _facts: None)
        except MigrationError:
            await pull_out(self._source)
            raise

    async def wait_completed(self, events: EventQueue) -> None:
        """After post-copy: return when the last page has gone over. Raises MigrationError."""
        if not self._completed:  # it may have converged before post-copy could begin
            await self._wait(events, "completed")

    async def tidy(self) -> None:
        """All of memory is there: leave the destination's QEMU without credentials. Raises
        QMPError."""
        if self._plan.tls:
            await self._destination.execute("migrate-set-parameters", {"tls-creds": ""})
            await tls.take(self._destination, tls.SERVER)

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


async def pull_out(source: QMPClient) -> None:
    """Have QEMU close its connection to the destination: sending what is left, it holds
    its main loop, and hears nothing but this as long as a lost link makes it wait."""
    with suppress(QMPError), trio.move_on_after(YANK_SECONDS):
        await source.execute("yank", {"instances": [{"type": "migration"}]}, oob=True)


async def cancel(source: QMPClient) -> None:
    """Take the migration of memory back, if one is under way; a connection to the destination
    that holds it up is closed. Raises QMPError, MigrationError if it does not end."""
    with trio.move_on_after(CANCEL_SECONDS):
        await _cancel(source)
        return
    await pull_out(source)
    with limit("the migration of memory did not end", CANCEL_SECONDS):
        await _cancel(source)


async def _cancel(source: QMPClient) -> None:
    with source.events() as events:
        status = (await source.execute("query-migrate")).get("status", "none")
        if status not in (*CANCELLABLE, "cancelling"):
            return
        await source.execute("migrate_cancel")
        while status in (*CANCELLABLE, "cancelling"):
            with trio.move_on_after(POLL_SECONDS):
                await events.wait("MIGRATION")
            status = (await source.execute("query-migrate")).get("status", "none")


async def settled_status(source: QMPClient) -> str:
    """query-migrate's status; while the guest is handed over, what comes of
    that, unless it takes too long. Raises QMPError."""
    deadline = trio.current_time() + STALL_SECONDS
    while True:
        status: str = (await source.execute("query-migrate")).get("status", "none")
        if status != "device" or trio.current_time() > deadline:
            return status
        await trio.sleep(POLL_SECONDS)


async def resume(source: QMPClient) -> None:
    """Let the guest go on at the source, if it has not by itself. Raises QMPError."""
    if not (await source.execute("query-status"))["running"]:
        await source.execute("cont")


@dataclass(frozen=True)
class Settings:
    """How a QEMU is set to migrate, of what a migration changes."""

    capabilities: dict[str, bool]
    parameters: JSONObject

    @classmethod
    async def of(cls, qmp: QMPClient) -> "Settings":
        """What is set now. Raises QMPError."""
        states = {
            each["capability"]: each["state"]
            for each in await qmp.execute("query-migrate-capabilities")
        }
        parameters = await qmp.execute("query-migrate-parameters")
        return cls(
            {name: states[name] for name in CAPABILITIES},
            {name: parameters.get(name, value) for name, value in DEFAULT_PARAMETERS.items()},
        )

    async def restore(self, qmp: QMPClient) -> None:
        """Set it so again, and drop the credentials. Raises QMPError."""
        await _set(qmp, self.capabilities)
        await qmp.execute("migrate-set-parameters", self.parameters)
        await tls.take(qmp, tls.CLIENT)


def default_settings(plan: MigrationPlan) -> Settings:
    """QEMU's own, of all that a migration by this plan sets."""
    parameters = {name: DEFAULT_PARAMETERS[name] for name in wanted_parameters(plan)}
    return Settings(dict.fromkeys(CAPABILITIES, False), parameters)


def wanted_parameters(plan: MigrationPlan) -> JSONObject:
    """The source's migration parameters that a plan asks for, in QEMU's units."""
    parameters: JSONObject = {}
    if plan.max_bandwidth:
        parameters["max-bandwidth"] = plan.max_bandwidth
    if plan.downtime_limit:
        parameters["downtime-limit"] = round(plan.downtime_limit * 1000)
    if plan.tls:
        # Without a name QEMU takes the host in the URI.
        parameters |= {"tls-creds": tls.id_of(tls.CLIENT), "tls-hostname": ""}
    return parameters


async def _set(qmp: QMPClient, wanted: dict[str, bool]) -> None:
    capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
    try:
        await qmp.execute("migrate-set-capabilities", {"capabilities": capabilities})
    except CommandError as error:
        raise MigrationError(f"QEMU cannot migrate as it has to: {error}") from error
