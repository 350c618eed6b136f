# SPDX-License-Identifier: Apache-2.0
"""What the tool starts at the destination: an nbdstream for each disk, and QEMU.

Both outlive the tool, in sessions of their own; what they have to say goes to files beside
the leaf (``LEAF.log``) and the QMP socket. A command prefix (``ip netns exec …``) runs them
where they belong.
"""

import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

import trio

from nbdstream.guest.disks import Disk
from nbdstream.leaf import MAP_SUFFIX
from nbdstream.migrate.plan import DiskPlan, MigrationError, MigrationPlan
from nbdstream.migrate.sources import Offer
from nbdstream.migrate.switchover import There
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import JSONObject, QMPError

# Seconds until a process that was started has its socket, and one that was told to end ends.
START_SECONDS = 60.0
END_SECONDS = 20.0
# Seconds that a QEMU which we did not start gets to answer that it will quit.
QUIT_SECONDS = 5.0
# Seconds for which the destination's QEMU holds the guest's requests while its nbdstream is
# away, to be started again.
RECONNECT_DELAY = 600
# Seconds between two looks at whether a server listens: the guest's move waits for it.
_POLL = 0.01
_WORDS = 2048


class Spawned:
    """A process that goes on when the tool ends; its output is in a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        """Start it. Raises MigrationError if there is no such program."""
        self.log = log
        self._status: int | None = None
        with open(os.devnull, "rb") as nothing, open(log, "ab") as output:
            streams = ((nothing.fileno(), 0), (output.fileno(), 1), (output.fileno(), 2))
            actions = [(os.POSIX_SPAWN_DUP2, *pair) for pair in streams]
            try:
                # Not by subprocess, which minds when a child is left alone.
                self.pid = os.posix_spawnp(
                    command[0], command, os.environ, file_actions=actions, setsid=True
                )
            except OSError as error:
                raise MigrationError(f"cannot run {command[0]}: {error.strerror}") from error

    def _ended(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    async def wait_socket(self, path: str) -> None:
        """Return when the socket is there. Raises MigrationError if the process ends first."""
        with trio.move_on_after(START_SECONDS):
            while not await _listens(path):
                if self._ended():
                    raise MigrationError(f"{self.log}: {self._words()}")
                await trio.sleep(_POLL)
            return
        raise MigrationError(
            f"no server listens at {path} after {START_SECONDS:g} s; see {self.log}"
        )

    async def end(self, patience: float = END_SECONDS) -> None:
        """Have it end, gracefully if that takes no longer than ``patience`` seconds."""
        if self._ended():
            return
        os.kill(self.pid, signal.SIGTERM)
        with trio.move_on_after(patience):
            while not self._ended():  # noqa: ASYNC110 - no event says so
                await trio.sleep(_POLL)
            return
        os.kill(self.pid, signal.SIGKILL)
        self._status = os.waitpid(self.pid, 0)[1]  # noqa: ASYNC222 - it takes no time now

    def _words(self) -> str:
        tail = self.log.read_text(errors="replace")[-_WORDS:].strip()
        return tail.splitlines()[-1] if tail else f"ended with status {self._status}"


class DestinationDisk:
    """One disk's nbdstream at the destination."""

    def __init__(self, plan: DiskPlan, prefix: tuple[str, ...], pivot: str = "") -> None:
        """``pivot``: the QMP socket of the QEMU that is to use the leaf in the end, if it is."""
        self.plan = plan
        self._prefix = prefix
        self._pivot = ("--pivot", pivot) if pivot else ()
        self.process: Spawned | None = None

    async def start(self, offer: Offer) -> None:
        """Make the leaf, and have it stand by. Raises MigrationError."""
        plan = self.plan
        command = [*self._prefix, *nbdstream_command(), "serve", plan.leaf, "-b", offer.uri]
        command += ["-U", plan.socket, "--control", plan.control, "--standby", *self._pivot]
        for path in (plan.socket, plan.control):
            if os.path.lexists(path) and not Path(path).is_socket():  # noqa: ASYNC240
                raise MigrationError(f"{path} exists and is no socket")
            Path(path).unlink(missing_ok=True)  # noqa: ASYNC240
        self.process = Spawned(command, Path(plan.leaf + ".log"))
        await self.process.wait_socket(plan.control)

    async def check(self, offer: Offer) -> None:
        """Find out, while the guest still runs, whether `activate` would accept this. Raises
        QMPError."""
        arguments = {"generation": offer.generation, "size": offer.size, "check": True}
        await self._ask("x-nbdstream-activate", arguments)

    async def activate(self, offer: Offer) -> None:
        """The source is sealed: from now on this is the disk. Raises QMPError."""
        arguments = {"generation": offer.generation, "size": offer.size}
        await self._ask("x-nbdstream-activate", arguments)

    async def report(self) -> JSONObject:
        """What ``x-nbdstream-stats`` returns. Raises QMPError."""
        return await self._ask("x-nbdstream-stats")

    async def discard(self) -> None:
        """End the server, and delete the leaf if it was made here."""
        if self.process is None:
            return
        # At once: nothing of the leaf is of any use.
        await self.process.end(patience=0)
        delete_leaf(self.plan)

    async def _ask(self, command: str, arguments: JSONObject | None = None) -> JSONObject:
        async with QMPClient.connect(self.plan.control) as qmp:
            answer: JSONObject = await qmp.execute(command, arguments)
            return answer


def delete_leaf(plan: DiskPlan) -> None:
    """Delete the destination's leaf, which is not served any more, and what goes with it."""
    for path in (plan.leaf, plan.leaf + MAP_SUFFIX, plan.socket, plan.control):
        Path(path).unlink(missing_ok=True)


async def _listens(path: str) -> bool:
    try:
        await (await trio.open_unix_socket(path)).aclose()
    except OSError:
        return False
    return True


def nbdstream_command() -> list[str]:
    """How to run this nbdstream."""
    program = shutil.which("nbdstream", path=str(Path(sys.executable).parent))
    return [program] if program else [sys.executable, "-m", "nbdstream"]


def qemu_command(plan: MigrationPlan) -> list[str]:
    """The destination's QEMU: what the user gave, waiting for a migration, with the disks as
    nodes ``disk0``, ``disk1``, … for its devices to use."""
    command = [*plan.prefix, *plan.command, "-incoming", "defer", "-S"]
    for number, disk in enumerate(plan.disks):
        node = Disk.nbd(f"nbd+unix:///?socket={disk.socket}", RECONNECT_DELAY)
        command += ["-blockdev", node.named(f"disk{number}")]
    return [*command, "-qmp", f"unix:{plan.destination_qmp},server=on,wait=off"]


async def start_qemu(plan: MigrationPlan) -> Spawned | None:
    """Start the destination's QEMU, or wait for the one that another tool starts; returns
    when its QMP socket is there. Raises MigrationError."""
    if plan.command:
        Path(plan.destination_qmp).unlink(missing_ok=True)  # noqa: ASYNC240
        qemu = Spawned(qemu_command(plan), Path(plan.destination_qmp + ".log"))
        try:
            await qemu.wait_socket(plan.destination_qmp)
        except BaseException:
            with trio.CancelScope(shield=True):
                await qemu.end()
            raise
        return qemu
    with trio.move_on_after(START_SECONDS):
        while not await _listens(plan.destination_qmp):  # noqa: ASYNC110 - no event says so
            await trio.sleep(_POLL)
        return None
    raise MigrationError(f"no QEMU at the destination listens at {plan.destination_qmp}")


async def state_of(destination: QMPClient) -> There:
    """How far the destination's QEMU is with taking the guest over. Raises QMPError."""
    status = await destination.execute("query-status")
    if status["running"]:
        return There.RUNNING
    if status["status"] == "inmigrate":
        return There.WAITING
    migration = await destination.execute("query-migrate")
    return There.COMPLETE if migration.get("status") == "completed" else There.WAITING


async def look_there(path: str) -> There:
    """`state_of` the QEMU whose QMP socket this is, if it answers."""
    with trio.move_on_after(QUIT_SECONDS):
        while True:
            try:
                async with QMPClient.connect(path) as qmp:
                    return await state_of(qmp)
            except QMPError as error:
                if isinstance(error.__cause__, ConnectionRefusedError | FileNotFoundError):
                    return There.GONE
            await trio.sleep(_POLL)  # one that hangs up is about to end
    return There.SILENT


async def expect_waiting(destination: QMPClient) -> None:
    """Make sure that the destination's QEMU waits for the guest, and will not run it by itself
    when it has it (as after ``-S``, whether or not it was started so).

    Raises:
        MigrationError: it does something else.
    """
    # While it waits, this only says that the guest shall not be started at the end.
    await destination.execute("stop")
    status = (await destination.execute("query-status"))["status"]
    if status != "inmigrate":
        raise MigrationError(f"the destination's QEMU waits for no migration but is {status}")


async def quit_qemu(path: str, process: Spawned | None) -> None:
    """End the destination's QEMU, which has never run its guest. Best effort: one that is out
    of reach still waits for a command to run, which never comes."""
    if process is not None:
        # At once: it has nothing to flush, and would wait for a server that is away.
        await process.end(patience=0)
    # What has ended may only have been the near end of an ssh.
    with suppress(QMPError), trio.move_on_after(QUIT_SECONDS):
        async with QMPClient.connect(path) as qmp:
            if not (await qmp.execute("query-status"))["running"]:
                await qmp.execute("quit")
