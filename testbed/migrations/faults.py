# SPDX-License-Identifier: Apache-2.0
"""Migrations with a fault in them: drawn by chance, run for real, judged afterwards.

A `Trial` says which guest moves and what goes wrong when. `Run` carries it out: it moves the
guest, does the damage when the phase comes, mends what an operator would mend, and finds out
where the guest is. Then it holds reality against the rules: one side runs the guest, one
copy counts, and every record that the guest was told is durable is on that copy.
"""

import dataclasses
import os
import random
import signal
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import trio

from nbdstream.guest.disks import Disk
from nbdstream.handover.seal import read_seal
from nbdstream.migrate.destination import Spawned, nbdstream_command
from nbdstream.migrate.memory import Settings
from nbdstream.migrate.plan import MigrationError, MigrationPlan
from nbdstream.migrate.run import Migration
from nbdstream.migrate.switchover import PHASE_WORDS, Phase
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import JSONObject, QMPError
from testbed.guests.systems import RunningGuest
from testbed.link.control import link_process
from testbed.link.model import Shape
from testbed.migrations import arrangement
from testbed.migrations.arrangement import Ends, last_acknowledged, records
from testbed.peers import Peer, nbdkit, nbdstream_serve, run

MiB = 1 << 20
# What a guest gets to write three more records; it may have waited for a reconnect before.
PATIENCE = 120.0
# The whole trial.
TRIAL_SECONDS = 400.0
# The tool, until it has ended.
TOOL_SECONDS = 180.0
WATCH_SECONDS = 0.05
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
        self._image = image
        self._both_ran = False
        self._struck = False
        self._tool: Spawned | None = None
        self._server: Peer | None = None
        self._leaf = Path(ends.path(trial.source.replace("leaf", "here")))
        served = trial.source.startswith("leaf")
        self._node = "" if served else "disk0"

    async def run(self) -> Outcome:
        """Carry it out. Raises AssertionError if a rule was broken."""
        with trio.fail_after(TRIAL_SECONDS):
            async with AsyncExitStack() as stack:
                await self._run(stack)
        return self.outcome

    async def _run(self, stack: AsyncExitStack) -> None:
        disk = self._start_source(stack)
        there = self.ends.disk(
            self.trial.leaf,
            node=self._node,
            control=str(self._server.control) if self._server else "",
        )
        self._memory = stack.enter_context(
            link_process("127.0.0.1:0", f"unix:{self.ends.path('memory')}", LINK)
        )
        self._link = stack.enter_context(link_process("127.0.0.1:0", there.listen, LINK))
        self._there = dataclasses.replace(there, reach=str(self._link.address))
        self._plan = self._make_plan()
        stack.callback(self._end_destination)
        guest = await stack.enter_async_context(arrangement.source(self.ends, disk))
        before = await Settings.of(guest.guest.qmp)
        await stack.enter_async_context(self._watching(guest))
        moved = await self._migrate()
        self.outcome.home = "destination" if moved else "source"
        assert self._struck, "the fault did not come"
        self._memory.restore()
        self._link.restore()
        if moved:
            await self._judge_destination(stack, guest)
        else:
            await self._judge_source(guest, before)
        assert not self._both_ran, "both sides ran the guest"
        assert self.outcome.found >= self.outcome.acknowledged > 3

    def delete_images(self) -> None:
        """Make room; logs stay."""
        for pattern in ("*.raw", "*.q*", "*.partition"):
            for image in self.ends.directory.glob(pattern):
                image.unlink()

    # -- what moves --------------------------------------------------------------------

    def _start_source(self, stack: AsyncExitStack) -> Disk:
        kind, image_format = self.trial.source.split(".")
        if kind == "leaf":
            far = stack.enter_context(nbdkit("file", self._image, readonly=True))
            stream = random.Random(self.trial.number).choice(("on", "off"))
            serve = nbdstream_serve(self._leaf, far.uri, "--stream", stream)
            self._server = stack.enter_context(serve)
            return Disk.nbd(self._server.uri)
        if image_format == "raw":
            self._leaf = self._image
        else:
            convert = ["qemu-img", "convert", "-f", "raw", "-O", image_format]
            run([*convert, self._image, self._leaf])
        return Disk.file(self._leaf, image_format)

    def _make_plan(self) -> MigrationPlan:
        plan = self.ends.plan(self._there)
        watch = f"unix:{self.ends.path('there.watch')},server=on,wait=off"
        more = ("-pidfile", self.ends.path("there.pid"), "-qmp", watch)
        return dataclasses.replace(
            plan,
            memory=f"tcp:{self._memory.address}",
            memory_listen=f"unix:{self.ends.path('memory')}",
            command=(*plan.command, *more),
            max_bandwidth=MEMORY_BANDWIDTH,
            postcopy_ram=self.trial.postcopy,
        )

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
        self._tool = Spawned([*nbdstream_command(), "migrate", *self._options()], log)
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
        command = [*nbdstream_command(), "migrate", "--cancel", *self._options()]
        done = await trio.run_process(
            command, check=False, capture_stdout=True, capture_stderr=True
        )
        said = (done.stdout + done.stderr).decode()
        print(said)
        if done.returncode:
            assert "too late" in said
            return True
        assert said == "taken back: the guest runs at the source\n"
        return False

    def _options(self) -> list[str]:
        plan, disk = self._plan, self._there
        values = {
            key.replace("_", "-"): value for key, value in dataclasses.asdict(disk).items() if value
        }
        spelled = ",".join(f"{key}={value}" for key, value in values.items())
        options = ["--source-qmp", plan.source_qmp, "--destination-qmp", plan.destination_qmp]
        options += ["--memory", plan.memory, "--memory-listen", plan.memory_listen]
        options += ["--max-bandwidth", str(plan.max_bandwidth), "--disk", spelled]
        options += ["--postcopy-ram"] if plan.postcopy_ram else []
        return [*options, "--", *plan.command]

    # -- the fault ---------------------------------------------------------------------

    async def _strike_later(self, nursery: trio.Nursery) -> None:
        await trio.sleep(self.trial.delay)
        self._strike(nursery)

    def _strike(self, nursery: trio.Nursery) -> None:
        match self.trial.fault:
            case "destination's QEMU killed":
                os.kill(int(Path(self.ends.path("there.pid")).read_text()), signal.SIGKILL)
            case "destination's nbdstream killed":
                os.kill(listener(self._there.control), signal.SIGKILL)
            case "source's server killed":
                if self._server is not None:
                    self._server.kill()
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

    @asynccontextmanager
    async def _watching(self, guest: RunningGuest) -> AsyncIterator[None]:
        """See whether ever both sides run the guest. The destination is asked first: when it
        has run, the source must not run any more."""

        async def watch() -> None:
            while True:
                with suppress(QMPError):
                    async with QMPClient.connect(self.ends.path("there.watch")) as there:
                        while True:
                            if (await there.execute("query-status"))["running"]:
                                status = await guest.guest.qmp.execute("query-status")
                                self._both_ran |= status["running"]
                            await trio.sleep(WATCH_SECONDS)
                await trio.sleep(WATCH_SECONDS)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            yield
            nursery.cancel_scope.cancel()

    async def _judge_source(self, guest: RunningGuest, before: Settings) -> None:
        """The guest goes on here as if nothing had happened, and nothing is left there."""
        seen = last_acknowledged(guest.console.transcript)
        await guest.console.wait_for(rf"ACK {seen + 3}\b", PATIENCE)
        assert await Settings.of(guest.guest.qmp) == before
        assert not os.path.lexists(self._there.leaf)  # noqa: ASYNC240
        for path in (self._there.control, self._plan.destination_qmp):
            assert not await _listens(path), path
        assert await guest.guest.qmp.execute("query-block-exports") == []
        if self._server is not None:
            assert (await _stats(str(self._server.control)))["owner"]
            assert read_seal(str(self._leaf)) is None
        await guest.guest.kill()
        text = guest.console.transcript
        self._check_console(text)
        self.outcome.acknowledged = last_acknowledged(text)
        raw = Path(self.ends.path("look.raw"))
        convert = ["qemu-img", "convert", "-O", "raw"]
        if self._server is not None:
            run([*convert, "-f", "raw", self._server.uri, raw])
        else:
            run([*convert, "-f", self.trial.source.split(".")[1], self._leaf, raw])
        self.outcome.found = records(raw)

    async def _judge_destination(self, stack: AsyncExitStack, guest: RunningGuest) -> None:
        """The guest goes on there once what is down is up again, and needs nothing of us."""
        if self.trial.postcopy and self.trial.fault == "tool killed":
            await self._continue_there()
        with trio.fail_after(PATIENCE):
            while await _run_state(guest.guest.qmp) != "postmigrate":  # noqa: ASYNC110
                await trio.sleep(0.1)
        here = guest.console.transcript
        log = Path(self.ends.path("there.console"))
        if self.trial.fault == "source's server killed" and self._server is None:
            await guest.guest.kill()  # QEMU's own NBD server
        self._repair(stack)
        seen = max(last_acknowledged(here), last_acknowledged(_text(log)))
        await arrangement.wait_acknowledged(self.ends, seen + 3, PATIENCE)
        await self._wait_local()
        if self._server is not None and self.trial.fault != "source's server killed":
            assert not (await _stats(str(self._server.control)))["owner"]
        seen = last_acknowledged(_text(log))
        await arrangement.wait_acknowledged(self.ends, seen + 3, PATIENCE)
        assert (await _stats(self._there.control))["owner"]
        self._end_destination(qemu_only=True)
        await arrangement.end_server(self._there.control)
        self._check_console(here)
        self._check_console(_text(log))
        self.outcome.acknowledged = last_acknowledged(_text(log))
        raw = Path(self.ends.path("look.raw"))
        run(["qemu-img", "convert", "-f", self.trial.leaf, "-O", "raw", self._there.leaf, raw])
        self.outcome.found = records(raw)

    async def _continue_there(self) -> None:
        """With post-copy under way, the guest cannot go back, and is continued by hand."""
        async with QMPClient.connect(self._plan.destination_qmp) as qmp:
            if await _run_state(qmp) != "running":
                await qmp.execute("cont")

    def _repair(self, stack: AsyncExitStack) -> None:
        """What the operator does, according to docs/migration.md."""
        match self.trial.fault:
            case "destination's nbdstream killed":
                disk = self._there
                command = [*nbdstream_command(), "serve", disk.leaf, "-U", disk.socket]
                Spawned([*command, "--control", disk.control], Path(disk.leaf + ".log"))
            case "source's server killed":
                stack.enter_context(nbdstream_serve(self._leaf))

    async def _wait_local(self) -> None:
        with trio.fail_after(PATIENCE):
            while True:
                with suppress(QMPError):
                    if "backing" not in await _stats(self._there.control):
                        return
                await trio.sleep(0.1)

    def _check_console(self, text: str) -> None:
        for trouble in ("I/O error", "read-only", "EXT4-fs error"):
            assert trouble not in text, text[-2000:]

    def _end_destination(self, *, qemu_only: bool = False) -> None:
        """Whatever was started there and is still there."""
        with suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.kill(int(Path(self.ends.path("there.pid")).read_text()), signal.SIGKILL)
        if not qemu_only:
            with suppress(OSError):
                os.kill(listener(self._there.control), signal.SIGKILL)


def listener(path: str) -> int:
    """The process that listens on a unix socket. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", credentials)[0]
        return pid


async def _listens(path: str) -> bool:
    with suppress(OSError):
        await (await trio.open_unix_socket(path)).aclose()
        return True
    return False


async def _run_state(qmp: QMPClient) -> str:
    status: str = (await qmp.execute("query-status"))["status"]
    return status


async def _stats(control: str) -> JSONObject:
    async with QMPClient.connect(control) as qmp:
        answer: JSONObject = await qmp.execute("x-nbdstream-stats")
        return answer


def _text(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""
