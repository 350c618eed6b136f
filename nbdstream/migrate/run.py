# SPDX-License-Identifier: Apache-2.0
"""One migration from beginning to end, or back to where it began.

`Migration.run` walks through the phases of `nbdstream.migrate.switchover`. Whatever goes
wrong before the destination was told to run (an error, a lost connection, being cancelled)
is taken back as that module says, and raised; nothing that goes wrong later takes anything
back: the guest's home is the destination then.
"""

import logging
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace

import trio

from nbdstream.errors import NbdstreamError, sole_error
from nbdstream.migrate.destination import (
    DestinationDisk,
    Spawned,
    expect_waiting,
    look_there,
    quit_qemu,
    start_qemu,
    state_of,
)
from nbdstream.migrate.limits import ANSWER_SECONDS, answered, limit
from nbdstream.migrate.memory import Memory, Settings, cancel, resume, settled_status
from nbdstream.migrate.monitor import Monitor
from nbdstream.migrate.plan import MigrationError, MigrationPlan
from nbdstream.migrate.sources import Offer, QemuServer, make_sources, nbd_uri
from nbdstream.migrate.switchover import AT_SOURCE, Phase, There, Undo, owner, undo, why_kept
from nbdstream.migrate.tls import secured
from nbdstream.net.address import NbdUri
from nbdstream.qmp.client import EventQueue, QMPClient
from nbdstream.qmp.protocol import JSONObject, QMPConnectionError, QMPError
from nbdstream.tasks import open_background_nursery

log = logging.getLogger(__name__)

# Seconds between two looks at the streams, and that one step back may take.
POLL_SECONDS = 0.5
UNDO_SECONDS = 30.0
# Seconds for which the guest may stand still until its disks have changed hands.
SWITCH_SECONDS = 20.0
# Phases of limited time in which only what happens decides where the guest goes on.
_NOT_TO_BE_DISTURBED = (Phase.HANDING, Phase.TOLD)


@dataclass
class Summary:
    """What a migration took. Times are seconds, sizes bytes.

    ``downtime``: from the guest's stop at the source to its start at the destination, as
    this process saw it. ``until_running`` and ``until_local`` count from the beginning,
    ``memory_time`` only from the start of the memory's migration to the guest's start.
    ``disk_twice``: what the destination read while it stood by, and could not keep.
    """

    downtime: float = 0.0
    memory_time: float = 0.0
    until_running: float = 0.0
    until_local: float = 0.0
    memory_bytes: int = 0
    disk_bytes: int = 0
    disk_twice: int = 0
    disks: list[JSONObject] = field(default_factory=list)


Watch = Callable[[Phase, JSONObject], None]
"""Called on entering a phase (with the empty object), and with what there is to know of it:
query-migrate's answer in MEMORY, ``{"disks": [x-nbdstream-stats…]}`` in RUNNING."""


class Migration:
    """One migration; ``phase`` says how far it is, ``disks`` and ``qemu`` are what was started
    at the destination (``qemu`` None: by another tool, or not yet)."""

    def __init__(self, plan: MigrationPlan, watch: Watch | None = None) -> None:
        self.plan = plan
        self.phase = Phase.PREPARING
        self.summary = Summary()
        self._watch = watch or (lambda _phase, _facts: None)
        self._monitor = Monitor(plan.source_qmp)
        self._sources = make_sources(plan, QemuServer(self._monitor, plan.tls))
        self._offers: list[Offer] = []
        pivot = plan.destination_qmp if plan.pivot else ""
        self.disks = [DestinationDisk(disk, plan.prefix, pivot) for disk in plan.disks]
        self.qemu: Spawned | None = None
        self._settings: Settings | None = None
        self._work = trio.CancelScope(shield=True)
        self._cancelled = False
        self._began = 0.0

    async def run(self, *, follow: bool = True) -> Summary:
        """Migrate; with ``follow`` until the disks are local and the source is released.

        Raises MigrationError, QMPError, BackingError, OSError; the message says where the
        guest is. Cancelled: the same way back, where there is one. While the guest is handed
        over that has to wait, and may then be too late.
        """
        self.plan.check()
        self._began = trio.current_time()
        async with open_background_nursery() as nursery:
            nursery.start_soon(self._pass_on_cancellation)
            with self._work:
                await self._run(follow=follow)
        await trio.lowlevel.checkpoint()  # raises, if it was cancelled
        return self.summary

    async def _pass_on_cancellation(self) -> None:
        """The work and its connections are shielded as a whole: a shield about a command
        alone would not keep the tasks that send it."""
        try:
            await trio.sleep_forever()
        finally:
            self._cancelled = True
            if self.phase not in _NOT_TO_BE_DISTURBED:
                self._work.cancel()

    async def _run(self, *, follow: bool) -> None:
        try:
            session = answered(self._monitor.session(), "the source's QEMU")
            async with session as source, AsyncExitStack() as connections:
                destination = await self._prepare(connections)
                await self._move(source, destination)
                if follow:
                    await self._follow()
        except BaseException as error:
            # On connections of its own: these went with whatever has happened.
            with trio.CancelScope(shield=True):
                troubles = await self._take_back()
            cause = sole_error(error)
            if isinstance(cause, NbdstreamError | OSError):
                raise MigrationError(self._verdict(cause, troubles)) from error
            for trouble in troubles:
                log.error("%s", trouble)  # noqa: TRY400 - for the operator, no traceback
            raise

    # -- forth -------------------------------------------------------------------------

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self._watch(phase, {})
        if self._cancelled and phase not in _NOT_TO_BE_DISTURBED:
            self._work.cancel()

    async def _prepare(self, connections: AsyncExitStack) -> QMPClient:
        """Have everything wait for the guest; return a connection to the destination's QEMU."""
        self._enter(Phase.PREPARING)
        for source, disk in zip(self._sources, self.disks, strict=True):
            with limit(f"{disk.plan.source} could not be offered"):
                offer = await source.offer()
            if disk.plan.reach:
                name = NbdUri.parse(offer.uri).export
                offer = replace(offer, uri=nbd_uri(disk.plan.reach, name))
            if self.plan.tls:
                offer = replace(offer, uri=secured(offer.uri, self.plan.tls))
            self._offers.append(offer)
            await disk.start(offer)
            with limit(f"{disk.plan.control} does not answer"):
                await disk.check(offer)
        self.qemu = await start_qemu(self.plan)
        # It reads from its disks before it answers, and those may have lost their source.
        destination = await connections.enter_async_context(
            answered(QMPClient.connect(self.plan.destination_qmp), "the destination's QEMU")
        )
        with limit("the destination's QEMU does not answer"):
            await expect_waiting(destination)
        return destination

    async def _move(self, source: QMPClient, destination: QMPClient) -> None:
        """From the first byte of memory to the guest's first instruction over there."""
        was_running = (await source.execute("query-status"))["running"]
        self._settings = await Settings.of(source)
        memory = Memory(source, destination, self.plan)
        with source.events() as events, source.events() as stops:
            self._enter(Phase.MEMORY)
            began = trio.current_time()
            with limit("the migration of memory could not begin"):
                await memory.start()
            paused = await memory.wait_stopped(
                events, lambda facts: self._watch(Phase.MEMORY, facts)
            )
            stopped = trio.current_time()
            if was_running:  # by the source's clock, which need not be ours
                stopped -= paused.timestamp - (await stops.wait("STOP")).timestamp
            self._enter(Phase.STOPPED)
            with limit("the disks did not change hands", SWITCH_SECONDS):
                await self._switch_disks(destination)
            self._enter(Phase.HANDING)
            source_is_gone = await self._hand_over(memory, events, destination)
            if self._cancelled and not (self.plan.postcopy_ram or source_is_gone):
                self._work.cancel()
                await trio.lowlevel.checkpoint()
            self._enter(Phase.TOLD)
            if was_running:
                await self._start_there(destination)
            now = trio.current_time()
            self.summary.memory_time = now - began
            self.summary.until_running = now - self._began
            self.summary.downtime = now - stopped
            self._enter(Phase.RUNNING)
            await self._mark()
            if source_is_gone:
                return
            await memory.wait_completed(events)
            with suppress(QMPError), trio.move_on_after(ANSWER_SECONDS):
                await memory.tidy()
        # The guest lives elsewhere: nothing depends on this answer.
        with suppress(QMPError), trio.move_on_after(ANSWER_SECONDS):
            ram = (await source.execute("query-migrate")).get("ram", {})
            self.summary.memory_bytes = ram.get("transferred", 0)

    async def _switch_disks(self, destination: QMPClient) -> None:
        """The guest stands still: have the right to write change hands."""
        self._enter(Phase.SEALING)
        await expect_waiting(destination)
        for source in self._sources:
            await source.seal()
        self._enter(Phase.ACTIVATING)
        for disk in self.disks:
            self.summary.disk_twice += (await disk.report())["disk"]["fetched-bytes"]
        async with trio.open_nursery() as nursery:
            for disk, offer in zip(self.disks, self._offers, strict=True):
                nursery.start_soon(disk.activate, offer)

    async def _hand_over(self, memory: Memory, events: EventQueue, destination: QMPClient) -> bool:
        """Have the rest of the guest go over. Returns whether the source's QEMU has died after
        that: the guest is complete at the destination alone then, and goes on there."""
        try:
            await memory.hand_over(events)
        except QMPConnectionError:
            if self.plan.postcopy_ram or not await self._monitor.has_ended():
                raise
            if not await self._is_complete(destination):
                raise
            log.warning("the source's QEMU has died after it had handed the guest over")
            return True
        return False

    async def _is_complete(self, destination: QMPClient) -> bool:
        """Whether the destination has all of the guest; it may still be reading the rest."""
        with trio.move_on_after(ANSWER_SECONDS):
            while (there := await state_of(destination)) is There.WAITING:  # noqa: ASYNC110
                await trio.sleep(POLL_SECONDS)
            return there in (There.COMPLETE, There.RUNNING)
        return False

    async def _start_there(self, destination: QMPClient) -> None:
        """Have the guest go on. After a failure it is unknown whether it does."""
        with (
            limit("the destination does not answer"),
            destination.events() as events,
        ):
            await destination.execute("cont")
            if not (await destination.execute("query-status"))["running"]:
                await events.wait("RESUME")

    # -- after it ----------------------------------------------------------------------

    async def _follow(self) -> None:
        """Wait until all is local, through anything; then let go of the source."""
        while True:
            reports = [await self._report(disk) for disk in self.disks]
            self._watch(Phase.RUNNING, {"disks": reports})
            if all(report and "backing" not in report for report in reports):
                break
            await trio.sleep(POLL_SECONDS)
        for source in self._sources:
            try:
                await source.release()
            except (QMPError, OSError) as error:
                log.warning("the source could not be told that it is free: %s", error)
        self.summary.until_local = trio.current_time() - self._began
        self.summary.disks = reports
        self.summary.disk_bytes = sum(report["disk"]["fetched-bytes"] for report in reports)
        self._enter(Phase.LOCAL)

    async def _mark(self) -> None:
        for source in self._sources:
            try:
                await source.mark()
            except OSError as error:
                log.warning("the source's image could not be sealed: %s", error)

    async def _report(self, disk: DestinationDisk) -> JSONObject:
        try:
            return await disk.report()
        except QMPError as error:  # it was killed, say; it will be started again
            log.debug("%s: %s", disk.plan.control, error)
            return {}

    # -- back --------------------------------------------------------------------------

    async def _take_back(self) -> list[str]:
        """Undo what was done, as far as it may be; what did not work out is returned."""
        steps = undo(self.phase)
        if not steps:
            return []
        if self.phase is Phase.HANDING and (reason := await self._why_kept()):
            self.phase = Phase.TOLD
            return [reason]
        troubles: list[str] = []
        silent = False  # the source's QEMU: not asked again, the guest stands still meanwhile
        for step in steps:
            try:
                with limit("no answer", 0 if silent and step in AT_SOURCE else UNDO_SECONDS):
                    await self._undo(step)
            except (NbdstreamError, OSError) as error:
                troubles.append(f"could not {step.value}: {error}")
                silent = silent or (step in AT_SOURCE and isinstance(error, MigrationError))
        return troubles

    async def _why_kept(self) -> str:
        """Why this may not be taken back after all, from what both QEMUs say now, or ""."""
        here = ""
        with suppress(QMPError), trio.move_on_after(UNDO_SECONDS):
            async with self._monitor.session() as source:
                here = await settled_status(source)
        there = await look_there(self.plan.destination_qmp)
        return why_kept(here, there, postcopy=self.plan.postcopy_ram)

    async def _undo(self, step: Undo) -> None:
        match step:
            case Undo.QUIT_DESTINATION:
                await quit_qemu(self.plan.destination_qmp, self.qemu)
            case Undo.UNSEAL if not any(source.offered for source in self._sources):
                pass
            case Undo.UNSEAL if not any(disk.source_node for disk in self.plan.disks):
                await self._unseal()
            case Undo.DISCARD:
                for disk in self.disks:
                    await disk.discard()
            case _:
                async with self._monitor.session() as source:
                    await self._undo_at_source(step, source)

    async def _unseal(self) -> None:
        """Each, whatever becomes of the others."""
        failures: list[Exception] = []
        for source in self._sources:
            try:
                await source.unseal()
            except (NbdstreamError, OSError) as error:
                failures.append(error)
        if failures:
            raise failures[0]

    async def _undo_at_source(self, step: Undo, source: QMPClient) -> None:
        match step:
            case Undo.UNSEAL:
                await self._unseal()
            case Undo.CANCEL_MEMORY:
                await cancel(source)
            case Undo.RESUME_SOURCE:
                await resume(source)
            case Undo.RESTORE_SETTINGS:
                if self._settings is not None:
                    await self._settings.restore(source)

    def _verdict(self, error: Exception, troubles: list[str]) -> str:
        if owner(self.phase) == "source":
            where = "the guest stays at the source, which is as before"
            if troubles:
                where = f"the guest belongs to the source, but {'; '.join(troubles)}"
        else:
            where = "; ".join(troubles) or "the destination was told to run"
            where += ": its disks are the guest's now"
        return f"{error}; {where}"
