# SPDX-License-Identifier: Apache-2.0
"""Each process killed at each step of a migration: what becomes of the guest.

    python -m testbed.migrations.walk [--jobs 2] [--sample 10] [--seed 7]
    python -m testbed.migrations.walk hand_over/sent/tool

A cell is a step, a moment of it (`struck`) and a victim. A guest with a busy disk is migrated
by the command line; the victim is killed there; what docs/migration.md tells its user to do
is done. `Moving` judges: every acknowledged record has to be there. In the end a table for
docs/migration.md is printed. Exit status 1 if a cell differs from what is promised.
"""

import argparse
import dataclasses
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import trio

from nbdstream.migrate.memory import Settings
from nbdstream.migrate.switchover import PHASE_WORDS, Phase
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import QMPError
from testbed.guests import images
from testbed.guests.systems import RunningGuest
from testbed.migrations import arrangement, moving
from testbed.migrations.arrangement import Ends
from testbed.migrations.faults import MEMORY_BANDWIDTH
from testbed.migrations.moving import WATCH_SECONDS, Moving
from testbed.migrations.struck import MOMENTS, STEPS, TOOL, Moment
from testbed.processes import python_environment

SOURCE_SERVER, SOURCE_QEMU = "source's server", "source's QEMU"
SERVER, QEMU = "destination's server", "destination's QEMU"
VICTIMS = (TOOL, SOURCE_SERVER, SOURCE_QEMU, SERVER, QEMU)
# From which step on there is one to be killed.
BEGINS = {SERVER: "look at the new leaf", QEMU: "look at the new QEMU"}

# What the user does, as the table says it.
AGAIN = "S"
CANCEL = "C"
SERVE_THERE = "D"
REBOOT = "B"
CONTINUE = "N"
WORDS = {
    AGAIN: "start the source's server again",
    CANCEL: "`nbdstream migrate --cancel`",
    SERVE_THERE: "start the destination's server again",
    CONTINUE: "`cont` in the destination's QEMU, as the tool says",
    REBOOT: "start the guest again from the disk there",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """Who is killed when."""

    step: str
    moment: Moment
    victim: str

    def __str__(self) -> str:
        return f"{self.step}/{self.moment}/{self.victim}".replace(" ", "_").replace("'", "")

    @property
    def place(self) -> tuple[int, int]:
        """Cells in the order of time."""
        return list(STEPS).index(self.step), MOMENTS.index(self.moment)

    def homes(self) -> tuple[str, ...]:
        """Where the guest's disk may be then, as docs/migration.md promises."""
        last, first = BORDERS[self.victim]
        if self.place <= last.place:
            return ("source",)
        return ("destination",) if self.place >= first.place else ("source", "destination")


def _border(step: str, moment: Moment) -> Cell:
    return Cell(step, moment, TOOL)


# The last cell in which the guest belongs to the source for certain, and the first in which it
# belongs to the destination. Between them it depends on which was faster.
_HANDED = (_border("hand over", "before"), _border("tell", "before"))
BORDERS = {
    TOOL: (_border("tell", "before"), _border("tell", "after")),
    SOURCE_SERVER: (_border("activate", "before"), _border("hand over", "before")),
    SOURCE_QEMU: _HANDED,
    SERVER: (_border("activate", "sent"), _HANDED[1]),
    QEMU: _HANDED,
}


def cells() -> Iterator[Cell]:
    """All of them, in the order of the migration."""
    steps = list(STEPS)
    for step in steps:
        for moment in MOMENTS:
            for victim in VICTIMS:
                if steps.index(step) >= steps.index(BEGINS.get(victim, steps[0])):
                    yield Cell(step, moment, victim)


def sample(count: int, seed: int) -> list[Cell]:
    """Some cells, each victim as often as the others, drawn by the seed."""
    numbers, every = random.Random(seed), list(cells())
    numbers.shuffle(every)
    piles = {victim: [cell for cell in every if cell.victim == victim] for victim in VICTIMS}
    return [piles[VICTIMS[number % len(VICTIMS)]].pop() for number in range(count)]


@dataclasses.dataclass
class Found:
    """What became of a cell. ``lives``: whether the guest runs on; ``deeds``: what its user had
    to do; ``broken``: what was not as promised."""

    cell: Cell
    home: str = "?"
    lives: bool = True
    deeds: str = ""
    said: str = ""
    acknowledged: int = 0
    found: int = 0
    broken: str = ""

    def words(self) -> str:
        """The outcome for the table."""
        if self.found and self.found < self.acknowledged:
            return f"**{self.acknowledged - self.found} lost**"
        if self.broken:
            return "**broken**"
        where = self.home if self.lives else f"disk at {self.home}"
        return where + (f", {self.deeds}" if self.deeds else "")


class Walk:
    """One cell under way, in the directory of ``ends``."""

    def __init__(self, cell: Cell, ends: Ends, image: Path) -> None:
        self.found = Found(cell)
        self._cell = cell
        self._ends = ends
        self._move = Moving("leaf.qcow2", "qcow2", ends, image)
        self._mark = Path(ends.path("struck"))
        self._log = Path(ends.path("tool.log"))

    async def run(self) -> Found:
        """Carry it out. Raises AssertionError and others if something is not as promised."""
        await self._move.carry_out(self._run, self.found)
        return self.found

    async def _run(self, stack: AsyncExitStack) -> None:
        move, found = self._move, self.found
        disk = move.start_source(stack, stream=True, reconnect_delay=600)
        stack.callback(move.end_destination)
        guest = await stack.enter_async_context(arrangement.source(self._ends, disk))
        before = await Settings.of(guest.guest.qmp)
        await stack.enter_async_context(move.watching(guest))
        status = await self._migrate(stack)
        found.said = self._log.read_text().strip()
        assert self._mark.exists(), f"the step did not come: {found.said}"
        found.home = await self._home(status)
        assert found.home in self._cell.homes(), (found.home, found.said)
        if found.home == "source":
            await self._settle_source(stack, guest, before)
        else:
            await self._settle_destination(guest)

    async def _migrate(self, stack: AsyncExitStack) -> int:
        """Run the tool until it ends; its status. What it waits for the user to do is done."""
        cell = self._cell
        victim = {
            TOOL: TOOL,
            SOURCE_SERVER: self._move.disk.source_control,
            SOURCE_QEMU: self._ends.path("source.qmp"),
            SERVER: self._move.disk.control,
            QEMU: self._ends.path("there.qmp"),
        }[cell.victim]
        plan = self._move.plan(max_bandwidth=MEMORY_BANDWIDTH)
        command = [sys.executable, "-m", "testbed.migrations.struck", cell.step, cell.moment]
        command += [victim, str(self._mark), "--", "migrate", *moving.options(plan)]
        with self._log.open("wb") as log:
            tool = await trio.lowlevel.open_process(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=python_environment(),
            )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._help_on, stack)
            try:
                await tool.wait()
            finally:
                tool.kill()
            nursery.cancel_scope.cancel()
        assert tool.returncode is not None
        return tool.returncode

    async def _help_on(self, stack: AsyncExitStack) -> None:
        """Once the guest runs at the destination, a server that is away is started again."""
        while not self._mark.exists() or PHASE_WORDS[Phase.RUNNING] not in self._log.read_text():  # noqa: ASYNC110
            await trio.sleep(WATCH_SECONDS)
        if self._cell.victim == SERVER:
            self._serve_there()
        while self._cell.victim == SOURCE_SERVER:
            with suppress(QMPError):
                if "backing" in await moving.stats(self._move.disk.control):
                    self._serve_here(stack)
                    return
            await trio.sleep(WATCH_SECONDS)

    def _serve_here(self, stack: AsyncExitStack) -> None:
        self._move.serve_source_again(stack)
        self.found.deeds += AGAIN

    def _serve_there(self) -> None:
        self._move.serve_destination_again()
        self.found.deeds += SERVE_THERE

    async def _home(self, status: int) -> str:
        """Where the guest belongs, as the tool says, or what is asked when it is dead."""
        if self._cell.victim == TOOL:
            taken_back, said = await moving.cancel(self._move.plan(max_bandwidth=MEMORY_BANDWIDTH))
            self.found.said += f"\n{said}"
            if taken_back:
                self.found.deeds += CANCEL
                return "source"
            assert "too late" in said
            return "destination"
        said = self.found.said
        if status == 0 or said.endswith(": its disks are the guest's now"):
            return "destination"
        assert "the guest stays at the source, which is as before" in said or (
            "the guest belongs to the source, but" in said
        ), said
        return "source"

    async def _settle_source(
        self, stack: AsyncExitStack, guest: RunningGuest, before: Settings
    ) -> None:
        if self._cell.victim == SOURCE_SERVER:
            self._serve_here(stack)
            if "belongs to the source, but" in self.found.said:
                plan = self._move.plan(max_bandwidth=MEMORY_BANDWIDTH)
                taken_back, said = await moving.cancel(plan)
                self.found.said += f"\n{said}"
                assert taken_back, said
                self.found.deeds += CANCEL
        if self._cell.victim == SOURCE_QEMU:
            self.found.lives = False
            self.found.deeds += REBOOT
            await self._move.judge_source_disk(guest)
            await self._move.judge_nothing_there()
        else:
            await self._move.judge_source(guest, before)

    async def _settle_destination(self, guest: RunningGuest) -> None:
        if self._cell.victim == QEMU:
            self.found.lives = False
            self.found.deeds += REBOOT
            await self._move.wait_local()
            await self._move.judge_destination_disk(guest.console.transcript)
            return
        if self._cell.victim == SOURCE_QEMU and "continue" in self.found.said:
            async with QMPClient.connect(self._ends.path("there.qmp")) as there:
                if await moving.run_state(there) == "paused":
                    await there.execute("cont")
                    self.found.deeds += CONTINUE
        if self._cell.victim == SERVER and SERVE_THERE not in self.found.deeds:
            self._serve_there()
        await self._move.judge_destination(guest, sealed=self._cell.victim != SOURCE_SERVER)


def walk(cell: Cell, image: Path) -> Found:
    """Carry one cell out in a directory of its own, which stays if it is not as promised."""
    directory = Path(tempfile.mkdtemp(prefix="walk-"))
    disk = images.copy_image(image / "disk.raw", directory / "disk.raw")
    one = Walk(cell, Ends(directory, image), disk)
    began = time.monotonic()
    try:
        trio.run(one.run)
    except BaseException as error:  # whatever it is, the other cells go on
        one.found.broken = f"{directory}\n{''.join(traceback.format_exception(error))}"
    else:
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
    found = one.found
    counts = f"{found.acknowledged} acknowledged, {found.found} found"
    print(f"{cell}: {found.words()} ({counts}; {time.monotonic() - began:.0f} s)", flush=True)
    if found.broken:
        print(found.broken, found.said, sep="\n", flush=True)
    return found


def table(results: Iterable[Found]) -> str:
    """In Markdown: a row for each step, with its moments together where they ended alike."""
    by_cell = {found.cell: found for found in results}
    lines = [f"| step | {' | '.join(VICTIMS)} |", "| --- |" + " --- |" * len(VICTIMS)]
    for step in STEPS:
        rows: dict[tuple[str, ...], list[str]] = {}
        for moment in MOMENTS:
            found = (by_cell.get(Cell(step, moment, victim)) for victim in VICTIMS)
            row = tuple(one.words() if one else "" for one in found)
            rows.setdefault(row, []).append(moment)
        for row, moments in rows.items():
            if any(row):
                when = "" if len(rows) == 1 else f" ({', '.join(moments)})"
                lines.append(f"| {step}{when} | {' | '.join(row)} |")
    return "\n".join(lines)


def _parse(text: str) -> Cell:
    return next(cell for cell in cells() if str(cell) == text)


def main() -> int:
    """Walk through the cells that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m testbed.migrations.walk", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("cell", nargs="*", type=_parse, help="STEP/MOMENT/VICTIM; default: all")
    parser.add_argument("--sample", type=int, help="as many, drawn by the seed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="cells at the same time")
    arguments = parser.parse_args()
    wanted = arguments.cell or list(cells())
    if arguments.sample:
        wanted = sample(arguments.sample, arguments.seed)
    image = images.busybox()
    began = time.monotonic()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda cell: walk(cell, image), wanted))
    broken = sum(bool(found.broken) for found in results)
    told = sum(found.acknowledged for found in results)
    lost = sum(max(0, found.acknowledged - found.found) for found in results)
    print(table(results), *(f"{deed}: {words}" for deed, words in WORDS.items()), sep="\n")
    print(
        f"{len(results)} kills, {told} acknowledged records, {lost} lost, {broken} cells not as "
        f"promised, {time.monotonic() - began:.0f} s"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
