# SPDX-License-Identifier: Apache-2.0
"""One guest on its way from one end to the other, whatever happens to it, and what must hold.

`Moving` has the source's disk, the plan and both ends; `faults` and `walk` do the damage. It
holds reality against the rules: one side runs the guest, one copy counts, and every record
that the guest was told is durable is on that copy.
"""

import dataclasses
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Protocol

import trio

from nbdstream.guest.console import ConsoleClosedError
from nbdstream.guest.disks import Disk
from nbdstream.handover.seal import read_seal
from nbdstream.migrate.destination import Spawned, nbdstream_command
from nbdstream.migrate.memory import Settings
from nbdstream.migrate.plan import DiskPlan, MigrationPlan
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import JSONObject, QMPError
from testbed.guests.systems import RunningGuest
from testbed.migrations import arrangement
from testbed.migrations.arrangement import Ends, last_acknowledged, records
from testbed.peers import Peer, nbdkit, nbdstream_serve, run

# Seconds that a guest gets to write three more records; it may have waited for a reconnect
# before. Also for its disk to become local.
PATIENCE = 120.0
WATCH_SECONDS = 0.05
MORE_RECORDS = 3
TRIAL_SECONDS = 400.0


class Counts(Protocol):
    """Where the counts of a life go: `Moving` has the same two."""

    acknowledged: int
    found: int


class Moving:
    """A guest that moves, in the directory of ``ends``.

    Attributes:
        server: the source's nbdstream, None where the source is a plain file.
        disk: the disk as the plan has it. ``source_control`` follows a server that was
            started again.
        acknowledged: the records that the guest was told are durable.
        found: those that are on the copy that counts.
    """

    def __init__(self, source: str, leaf: str, ends: Ends, image: Path) -> None:
        """``source``: a plain file or a leaf that an nbdstream serves, and its format, such as
        ``leaf.qcow2``; ``leaf``: the format of the new leaf; ``image``: the guest's raw disk."""
        self.ends = ends
        self.acknowledged = self.found = 0
        self.server: Peer | None = None
        self.disk: DiskPlan
        self._source, self._leaf_format = source, leaf
        self._image = image
        self._leaf = Path(ends.path(source.replace("leaf", "here")))
        self._both_ran = False

    # -- what moves --------------------------------------------------------------------

    def start_source(
        self, stack: AsyncExitStack, *, stream: bool, reconnect_delay: int = 0
    ) -> Disk:
        """Make the source's disk, and serve it if it is a leaf; for its guest to boot from."""
        kind, image_format = self._source.split(".")
        disk = Disk.file(self._image)
        if kind == "leaf":
            far = stack.enter_context(nbdkit("file", self._image, readonly=True))
            serve = nbdstream_serve(self._leaf, far.uri, "--stream", "on" if stream else "off")
            self.server = stack.enter_context(serve)
            disk = Disk.nbd(self.server.uri, reconnect_delay)
        elif image_format == "raw":
            self._leaf = self._image
        else:
            convert = ["qemu-img", "convert", "-f", "raw", "-O", image_format]
            run([*convert, self._image, self._leaf])
            disk = Disk.file(self._leaf, image_format)
        control, node = (str(self.server.control), "") if self.server else ("", "disk0")
        self.disk = self.ends.disk(self._leaf_format, node=node, control=control)
        return disk

    def serve_source_again(self, stack: AsyncExitStack) -> Peer:
        """As its user would: the same leaf at the same address."""
        path = self.server.socket if self.server is not None else None
        again = stack.enter_context(nbdstream_serve(self._leaf, socket_path=path))
        if self.server is not None:
            self.server = again
            self.disk = dataclasses.replace(self.disk, source_control=str(again.control))
        return again

    def serve_destination_again(self) -> None:
        """As its user would, by docs/migration.md."""
        disk = self.disk
        command = [*nbdstream_command(), "serve", disk.leaf, "-U", disk.socket]
        Spawned([*command, "--control", disk.control], Path(disk.leaf + ".log"))

    def plan(self, **changes: object) -> MigrationPlan:
        """The plan. The destination's QEMU has a second QMP socket, for `watching`."""
        plan = self.ends.plan(self.disk)
        watch = f"unix:{self.ends.path('there.watch')},server=on,wait=off"
        more = ("-pidfile", self.ends.path("there.pid"), "-qmp", watch)
        plan = dataclasses.replace(plan, command=(*plan.command, *more))
        return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]

    def end_destination(self, *, qemu_only: bool = False) -> None:
        """Whatever was started there and is still there."""
        with suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.kill(int(Path(self.ends.path("there.pid")).read_text()), signal.SIGKILL)
        if not qemu_only:
            with suppress(OSError):
                os.kill(listener(self.disk.control), signal.SIGKILL)

    async def carry_out(
        self, life: Callable[[AsyncExitStack], Awaitable[None]], counts: Counts
    ) -> None:
        """Let the guest live its ``life``, and note the counts of records whatever comes of it.

        Images are deleted afterwards; if it failed they stay, to be looked at.
        """
        try:
            with trio.fail_after(TRIAL_SECONDS):
                async with AsyncExitStack() as stack:
                    await life(stack)
        finally:
            counts.acknowledged, counts.found = self.acknowledged, self.found
        self._delete_images()

    def _delete_images(self) -> None:
        """Make room; logs stay."""
        for pattern in ("*.raw", "*.q*", "*.partition"):
            for image in self.ends.directory.glob(pattern):
                image.unlink()

    # -- what must hold ----------------------------------------------------------------

    @asynccontextmanager
    async def watching(self, guest: RunningGuest) -> AsyncIterator[None]:
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

    async def judge_source(self, guest: RunningGuest, before: Settings) -> None:
        """The guest goes on here as if nothing had happened, and nothing is left there."""
        seen = last_acknowledged(guest.console.transcript)
        await guest.console.wait_for(rf"ACK {seen + MORE_RECORDS}\b", PATIENCE)
        assert await Settings.of(guest.guest.qmp) == before
        await self.judge_nothing_there()
        assert await guest.guest.qmp.execute("query-block-exports") == []
        await guest.guest.kill()
        await self.judge_source_disk(guest)

    async def judge_nothing_there(self) -> None:
        """No leaf and no process is left at the destination."""
        assert not os.path.lexists(self.disk.leaf)  # noqa: ASYNC240
        for path in (self.disk.control, self.plan().destination_qmp):
            assert not await _listens(path), path

    async def judge_source_disk(self, guest: RunningGuest) -> None:
        """The source's QEMU has ended: its copy of the disk counts, and may be written."""
        if self.server is not None:
            assert (await stats(str(self.server.control)))["owner"]
            assert read_seal(str(self._leaf)) is None
        text = await whole_console(guest)
        self._check_console(text)
        if self.server is not None:
            self._judge_disk(text, self.server.uri, "raw")
        else:
            self._judge_disk(text, str(self._leaf), self._source.split(".")[1])

    async def judge_destination(self, guest: RunningGuest, *, sealed: bool) -> None:
        """The guest goes on there and needs nothing of us. ``sealed``: the source's server is
        the one that sealed its leaf, and still there."""
        log = Path(self.ends.path("there.console"))
        here = guest.console.transcript
        seen = max(last_acknowledged(here), last_acknowledged(_text(log)))
        await arrangement.wait_acknowledged(self.ends, seen + MORE_RECORDS, PATIENCE)
        await self.wait_local()
        if self.server is not None and sealed:
            assert not (await stats(str(self.server.control)))["owner"]
        seen = last_acknowledged(_text(log))
        await arrangement.wait_acknowledged(self.ends, seen + MORE_RECORDS, PATIENCE)
        await self.judge_destination_disk(here)

    async def judge_destination_disk(self, here: str) -> None:
        """End the guest there, if it still runs: the destination's copy counts. ``here`` is
        what the guest said on the source's console."""
        assert (await stats(self.disk.control))["owner"]
        self.end_destination(qemu_only=True)
        await arrangement.end_server(self.disk.control)
        self._check_console(here)
        there = _text(Path(self.ends.path("there.console")))
        self._judge_disk(here + there, self.disk.leaf, self._leaf_format)

    async def wait_local(self) -> None:
        """Wait until the destination's disk needs its source no more."""
        with trio.fail_after(PATIENCE):
            while True:
                with suppress(QMPError):
                    if "backing" not in await stats(self.disk.control):
                        return
                await trio.sleep(0.1)

    def _judge_disk(self, console: str, image: str, image_format: str) -> None:
        self._check_console(console)
        self.acknowledged = last_acknowledged(console)
        raw = Path(self.ends.path("look.raw"))
        run(["qemu-img", "convert", "-f", image_format, "-O", "raw", image, raw])
        self.found = records(raw)
        assert not self._both_ran, "both sides ran the guest"
        assert self.found >= self.acknowledged > MORE_RECORDS

    def _check_console(self, text: str) -> None:
        for trouble in ("I/O error", "read-only", "EXT4-fs error"):
            assert trouble not in text, text[-2000:]


def options(plan: MigrationPlan) -> list[str]:
    """The plan of one disk as arguments of ``nbdstream migrate``, after its other options."""
    (disk,) = plan.disks
    values = {
        key.replace("_", "-"): value for key, value in dataclasses.asdict(disk).items() if value
    }
    spelled = ",".join(f"{key}={value}" for key, value in values.items())
    options = ["--source-qmp", plan.source_qmp, "--destination-qmp", plan.destination_qmp]
    options += ["--memory", plan.memory, "--disk", spelled]
    options += ["--memory-listen", plan.memory_listen] if plan.memory_listen else []
    # The destination's server is looked at afterwards.
    options += ["--max-bandwidth", str(plan.max_bandwidth), "--no-pivot"]
    options += ["--postcopy-ram"] if plan.postcopy_ram else []
    return [*options, "--", *plan.command]


async def cancel(plan: MigrationPlan) -> tuple[bool, str]:
    """What `nbdstream migrate --cancel` says, and whether it took the migration back."""
    command = [*nbdstream_command(), "migrate", "--cancel", *options(plan)]
    done = await trio.run_process(command, check=False, capture_stdout=True, capture_stderr=True)
    said = (done.stdout + done.stderr).decode()
    print(said)
    return done.returncode == 0, said


async def whole_console(guest: RunningGuest) -> str:
    """All that the guest said before its QEMU ended."""
    with trio.fail_after(PATIENCE), suppress(ConsoleClosedError):
        await guest.console.wait_for(r"\Z(?!)", PATIENCE)
    return guest.console.transcript


def listener(path: str) -> int:
    """The process that listens on a unix socket. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", credentials)[0]
        return pid


async def run_state(qmp: QMPClient) -> str:
    """QEMU's word for what its guest does."""
    status: str = (await qmp.execute("query-status"))["status"]
    return status


async def stats(control: str) -> JSONObject:
    """What the nbdstream at a control socket counts. Raises QMPError."""
    async with QMPClient.connect(control) as qmp:
        answer: JSONObject = await qmp.execute("x-nbdstream-stats")
        return answer


async def _listens(path: str) -> bool:
    with suppress(OSError):
        await (await trio.open_unix_socket(path)).aclose()
        return True
    return False


def _text(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""
