# SPDX-License-Identifier: Apache-2.0
"""Migrations with a fault in them: drawn by chance, run for real, judged afterwards.

A `Trial` says which guest moves and what goes wrong when. `Run` carries it out: it moves the
guest, does the damage when the phase comes, mends what an operator would mend, and finds out
where the guest is. `Moving` judges then.
"""

import dataclasses
import os
import random
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from nbdstream.migrate.destination import Spawned, nbdstream_command
from nbdstream.migrate.memory import Settings
from nbdstream.migrate.plan import MigrationError
from nbdstream.migrate.run import Migration
from nbdstream.migrate.switchover import PHASE_WORDS, Phase
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import JSONObject
from testbed.guests.systems import RunningGuest
from testbed.link.control import link_process
from testbed.link.model import Shape
from testbed.migrations import arrangement, moving
from testbed.migrations.arrangement import Ends
from testbed.migrations.moving import PATIENCE, WATCH_SECONDS, Moving

MiB = 1 << 20
# The whole trial.
# The tool, until it has ended.
TOOL_SECONDS = 180.0
# Memory takes some seconds, and so does the disk.
MEMORY_BANDWIDTH = 48 * MiB
LINK = Shape(rate=400e6, delay=0.002)

_BEFORE = tuple(phase for phase in Phase if Phase.MEMORY <= phase <= Phase.HANDING)
_BOTH = (*_BEFORE, Phase.TOLD, Phase.RUNNING)
_AFTER = (Phase.TOLD, Phase.RUNNING)
FAULTS: dict[str, tuple[Phase, ...]] = {
    "destination's QEMU killed": _BEFORE,
    "destination's nbdstream killed": _BOTH,
    "tool killed": (Phase.PREPARING, *_BOTH),
    "tool interrupted": (Phase.PREPARING, *_BOTH),
    "memory's link reset": _BEFORE,
    "memory's link silent": _BEFORE,
    "disk's link reset": _BOTH,
    "disk's link silent": _BOTH,
    "source's server killed": _AFTER,
}
"""What may go wrong, and when."""

SOURCES = ("file.raw", "file.qcow2", "leaf.raw", "leaf.qcow2", "leaf.qed")
LEAVES = ("raw", "qcow2", "qed")
# By post-copy the guest's memory is at both ends for a while: the loss of either, or of the
# link between them, is the guest's death, and no test.
_FATAL_TO_POSTCOPY = ("destination's QEMU killed", "source's server killed", "memory's link")


@dataclasses.dataclass(frozen=True)
class Trial:
    """``source``: a plain file, or a leaf that an nbdstream serves, and its format; ``leaf``:
    the format of the new one. The fault comes ``delay`` seconds after the phase has begun;
    0 is before its first step. ``mend``: seconds until a cut link is mended; None: not before
    the tool has ended."""

    number: int
    source: str
    leaf: str
    fault: str
    phase: Phase
    delay: float
    mend: float | None
    postcopy: bool

    def __str__(self) -> str:
        return f"{self.number}-{self.fault}-{self.phase.name}".replace(" ", "_").replace("'", "")


def draw(count: int, seed: int) -> list[Trial]:
    """As many trials, each kind of fault as often as the others."""
    numbers = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += numbers.sample(list(FAULTS), len(FAULTS))
    return [_draw_one(numbers, number, kind) for number, kind in enumerate(kinds[:count])]


def _draw_one(numbers: random.Random, number: int, fault: str) -> Trial:
    phase = numbers.choice(FAULTS[fault])
    longest = {Phase.PREPARING: 1.0, Phase.MEMORY: 2.5, Phase.RUNNING: 1.5}.get(phase, 0.05)
    return Trial(
        number,
        numbers.choice(SOURCES),
        numbers.choice(LEAVES),
        fault,
        phase,
        numbers.choice((0.0, numbers.uniform(0.0, longest))),
        numbers.choice((None, numbers.uniform(0.2, 3.0))),
        numbers.random() < 0.4 and not fault.startswith(_FATAL_TO_POSTCOPY),
    )


@dataclasses.dataclass
class Outcome:
    """Where the guest was at the end, what it was told is durable, and what was found."""

    trial: Trial
    home: str = "?"
    acknowledged: int = 0
    found: int = 0

    def row(self) -> str:
        """A line of the table."""
        one = self.trial
        mended = (
            "" if one.mend is None or "disk's link" not in one.fault else f", {one.mend:.1f} s long"
        )
        return (
            f"{one.number:3}  {one.source:10} → {one.leaf:5}  "
            f"{'post' if one.postcopy else 'pre':4}  {one.phase.name:10} "
            f"+{one.delay:5.3f} s  {one.fault + mended:36}  {self.home:11}  "
            f"{self.acknowledged:5} {self.found:5}"
        )


HEAD = (
    f"{'#':>3}  {'source → leaf':18}  {'copy':4}  {'phase':10} {'after':>8}  {'fault':36}  "
    f"{'guest at':11}  {'acked':>5} {'found':>5}"
)


class Run:
    """A trial under way, in the directory of ``ends``."""

    def __init__(self, trial: Trial, ends: Ends, image: Path) -> None:
        self.trial = trial
        self.ends = ends
        self.outcome = Outcome(trial)
        self._move = Moving(trial.source, trial.leaf, ends, image)
        self._struck = False
        self._tool: Spawned | None = None

    async def run(self) -> Outcome:
        """Carry it out. Raises AssertionError if a rule was broken."""
        await self._move.carry_out(self._run, self.outcome)
        return self.outcome

    async def _run(self, stack: AsyncExitStack) -> None:
        move = self._move
        stream = random.Random(self.trial.number).choice((True, False))
        disk = move.start_source(stack, stream=stream)
        self._memory = stack.enter_context(
            link_process("127.0.0.1:0", f"unix:{self.ends.path('memory')}", LINK)
        )
        self._link = stack.enter_context(link_process("127.0.0.1:0", move.disk.listen, LINK))
        move.disk = dataclasses.replace(move.disk, reach=str(self._link.address))
        self._plan = move.plan(
            memory=f"tcp:{self._memory.address}",
            memory_listen=f"unix:{self.ends.path('memory')}",
            max_bandwidth=MEMORY_BANDWIDTH,
            postcopy_ram=self.trial.postcopy,
        )
        stack.callback(move.end_destination)
        guest = await stack.enter_async_context(arrangement.source(self.ends, disk))
        before = await Settings.of(guest.guest.qmp)
        await stack.enter_async_context(move.watching(guest))
        moved = await self._migrate()
        self.outcome.home = "destination" if moved else "source"
        assert self._struck, "the fault did not come"
        self._memory.restore()
        self._link.restore()
        if moved:
            await self._judge_destination(stack, guest)
        else:
            await move.judge_source(guest, before)

    async def _migrate(self) -> bool:
        """Whether the guest belongs to the destination now."""
        if self.trial.fault.startswith("tool"):
            return await self._migrate_by_tool()
        async with trio.open_nursery() as nursery:

            def watch(phase: Phase, facts: JSONObject) -> None:
                if phase is self.trial.phase and not facts:
                    if self.trial.delay:
                        nursery.start_soon(self._strike_later, nursery)
                    else:
                        self._strike(nursery)

            try:
                await Migration(self._plan, watch).run(follow=False)
            except MigrationError as error:
                print(f"the tool says: {error}")
                assert "stays at the source, which is as before" in str(error)
                moved = False
            else:
                moved = True
            while not self._struck:  # noqa: ASYNC110 - it will in a moment
                await trio.sleep(WATCH_SECONDS)
            nursery.cancel_scope.cancel()
        return moved

    async def _migrate_by_tool(self) -> bool:
        log = Path(self.ends.path("tool.log"))
        words = f"nbdstream: {PHASE_WORDS[self.trial.phase]}\n"
        self._tool = Spawned([*nbdstream_command(), "migrate", *moving.options(self._plan)], log)
        with trio.fail_after(TOOL_SECONDS):
            while words not in log.read_text():  # noqa: ASYNC110, ASYNC240
                await trio.sleep(0.001)
            await trio.sleep(self.trial.delay)
            killed = self.trial.fault == "tool killed"
            os.kill(self._tool.pid, signal.SIGKILL if killed else signal.SIGINT)
            self._struck = True
            ended = await trio.to_thread.run_sync(os.waitpid, self._tool.pid, 0)
        status = os.waitstatus_to_exitcode(ended[1])
        print(f"the tool ended with {status}:\n{log.read_text()}")  # noqa: ASYNC240
        if not killed or status == 0:  # it may have been done
            assert status in (0, 130)
            return status == 0
        taken_back, said = await moving.cancel(self._plan)
        if not taken_back:
            assert "too late" in said
            return True
        assert said == "taken back: the guest runs at the source\n"
        return False

    # -- the fault ---------------------------------------------------------------------

    async def _strike_later(self, nursery: trio.Nursery) -> None:
        await trio.sleep(self.trial.delay)
        self._strike(nursery)

    def _strike(self, nursery: trio.Nursery) -> None:
        match self.trial.fault:
            case "destination's QEMU killed":
                os.kill(int(Path(self.ends.path("there.pid")).read_text()), signal.SIGKILL)
            case "destination's nbdstream killed":
                os.kill(moving.listener(self._move.disk.control), signal.SIGKILL)
            case "source's server killed":
                if self._move.server is not None:
                    self._move.server.kill()
            case "memory's link reset":
                self._memory.cut("reset")
            case "memory's link silent":
                self._memory.cut("blackhole")
            case "disk's link reset":
                self._link.cut("reset")
                nursery.start_soon(self._mend)
            case "disk's link silent":
                self._link.cut("blackhole")
                nursery.start_soon(self._mend)
            case fault:
                raise ValueError(fault)
        self._struck = True

    async def _mend(self) -> None:
        if self.trial.mend is not None:
            await trio.sleep(self.trial.mend)
            self._link.restore()

    # -- what must hold ----------------------------------------------------------------

    async def _judge_destination(self, stack: AsyncExitStack, guest: RunningGuest) -> None:
        """The guest goes on there once what is down is up again, and needs nothing of us."""
        if self.trial.postcopy and self.trial.fault == "tool killed":
            await self._continue_there()
        with trio.fail_after(PATIENCE):
            while await moving.run_state(guest.guest.qmp) != "postmigrate":  # noqa: ASYNC110
                await trio.sleep(0.1)
        source_killed = self.trial.fault == "source's server killed"
        if source_killed and self._move.server is None:
            await guest.guest.kill()  # QEMU's own NBD server
        self._repair(stack)
        await self._move.judge_destination(guest, sealed=not source_killed)

    async def _continue_there(self) -> None:
        """With post-copy under way, the guest cannot go back, and is continued by hand."""
        async with QMPClient.connect(self._plan.destination_qmp) as qmp:
            if await moving.run_state(qmp) != "running":
                await qmp.execute("cont")

    def _repair(self, stack: AsyncExitStack) -> None:
        """What the operator does, according to docs/migration.md."""
        match self.trial.fault:
            case "destination's nbdstream killed":
                self._move.serve_destination_again()
            case "source's server killed":
                self._move.serve_source_again(stack)
