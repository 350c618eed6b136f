# SPDX-License-Identifier: Apache-2.0
"""Run a guest under QEMU, with a QMP connection and its serial console at hand.

    async with run_qemu(Machine(disks=(Disk.nbd(uri),))) as guest:
        await guest.console.wait_for("login:", within=60)

QMP and the console are socket pairs made before QEMU starts: there is no path to choose,
nothing to wait for, and the end of the process is the end of both streams. When the block
ends, QEMU is told to end (it flushes its disks), and killed if it does not.
"""

import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import trio

from nbdstream.errors import NbdstreamError, UsageError
from nbdstream.guest.accelerator import Accelerator, probe_accelerator, qemu_binary
from nbdstream.guest.console import Console, ConsoleClosedError
from nbdstream.guest.disks import Disk
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import QMPConnectionError
from nbdstream.tasks import open_background_nursery

MiB = 1 << 20

QUIT_TIMEOUT = 10.0
"""Seconds that QEMU gets to flush its disks and quit, before it is killed."""
_STDERR_TAIL = 4096


class QEMUError(NbdstreamError):
    """QEMU did not start, or died. The message holds what it said."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A guest to run. The first disk is the one it boots from."""

    disks: tuple[Disk, ...] = ()
    memory: int = 512 * MiB
    """Bytes, in whole MiB."""
    cpus: int = 1
    accelerator: Accelerator | None = None
    """None: the best that works here."""
    serial: Literal["console", "terminal"] | str = "console"
    """``console``: captured, see ``Guest.console``; ``terminal``: our own terminal, with
    QEMU's monitor behind Ctrl-A C; anything else is QEMU's ``-serial`` argument."""
    network: bool = False
    """A virtio network card behind QEMU's own NAT."""
    extra: tuple[str, ...] = ()
    """Further QEMU arguments, as they are."""
    prefix: tuple[str, ...] = ()
    """Put before QEMU's command, such as ``ip netns exec NAME``; it has to become QEMU."""

    def arguments(self, accelerator: Accelerator) -> list[str]:
        """Return QEMU's arguments, but for QMP and the captured console."""
        arguments = [
            "-nodefaults", "-no-user-config", "-display", "none",
            # Firmware and boot loader speak on the serial port.
            "-machine", "pc,graphics=off",
            "-accel", accelerator, "-cpu", "host" if accelerator == "kvm" else "max",
            "-smp", str(self.cpus), "-m", f"{self.memory // MiB}M",
            "-device", "virtio-rng-pci",
        ]  # fmt: skip
        for number, disk in enumerate(self.disks):
            name = f"disk{number}"
            arguments += ["-blockdev", disk.named(name)]
            device = f"virtio-blk-pci,drive={name},id=virtio-{name},discard=on"
            # 0 is what QEMU gives to a kernel that it boots by itself.
            arguments += ["-device", f"{device},bootindex={number + 1}"]
        if self.network:
            arguments += ["-netdev", "user,id=net0", "-device"]
            arguments += ["virtio-net-pci,netdev=net0,romfile="]
        if self.serial != "console":
            arguments += ["-serial", "mon:stdio" if self.serial == "terminal" else self.serial]
        return [*arguments, *self.extra]


class Guest:
    """A running QEMU."""

    def __init__(self, process: trio.Process, qmp: QMPClient, console: Console | None) -> None:
        self.process = process
        self.qmp = qmp
        self._console = console

    @property
    def console(self) -> Console:
        """The captured serial console. Raises UsageError if the machine has none."""
        if self._console is None:
            raise UsageError("this guest's serial port was sent elsewhere")
        return self._console

    async def wait(self) -> int:
        """Wait until QEMU ends and return its exit status."""
        return await self.process.wait()

    async def power_down(self) -> int:
        """Press the power button, wait until the guest switched itself off; see ``wait``.

        A guest may ignore the button: put a timeout around it.
        """
        await self.qmp.execute("system_powerdown")
        return await self.wait()

    async def quit(self) -> None:
        """Pull the plug: no chance for the guest, but QEMU flushes what it was given.

        Kills QEMU after QUIT_TIMEOUT seconds. Does nothing if it has ended already.
        """
        await _end(self.process)

    async def kill(self) -> None:
        """End QEMU at once, as a crash of the host would."""
        await _end(self.process, at_once=True)


@asynccontextmanager
async def run_qemu(
    machine: Machine, on_console: Callable[[str], None] | None = None
) -> AsyncIterator[Guest]:
    """Start *machine*; it is ended when the block ends, gracefully if possible.

    *on_console* sees the captured console's text as it comes. Raises UsageError if QEMU
    is not installed; QEMUError, with QEMU's own words, if it refuses to start or if the
    block fails because QEMU died. Cancelled: QEMU is ended just so.
    """
    accelerator = machine.accelerator or await probe_accelerator()
    command = [*machine.prefix, qemu_binary(), *machine.arguments(accelerator)]
    captured = machine.serial == "console"
    qmp_stream, qmp_there = _socket_pair()
    serial_stream, serial_there = _socket_pair()
    command += [*_socket_chardev("qmp", qmp_there), "-mon", "chardev=qmp,mode=control"]
    if captured:
        command += [*_socket_chardev("serial", serial_there), "-serial", "chardev:serial"]
    stderr = bytearray()
    async with qmp_stream, serial_stream, open_background_nursery() as nursery:
        with qmp_there, serial_there:
            process = await _start(command, (qmp_there.fileno(), serial_there.fileno()), machine)
        if process.stderr is not None:
            nursery.start_soon(_keep_tail, process.stderr, stderr)
        console = Console(serial_stream, on_console) if captured else None
        if console is not None:
            nursery.start_soon(console.pump)
        try:
            async with QMPClient.over(qmp_stream) as qmp:
                yield Guest(process, qmp, console)
        except (QMPConnectionError, ConsoleClosedError) as error:
            # If QEMU hung up because it died, that is what to tell.
            await _end(process)
            if process.returncode == 0:
                raise
            words = stderr.decode(errors="replace").strip()
            raise QEMUError(f"QEMU ended with status {process.returncode}: {words}") from error
        finally:
            await _end(process)


def _socket_pair() -> tuple[trio.SocketStream, socket.socket]:
    here, there = socket.socketpair()
    return trio.SocketStream(trio.socket.from_stdlib_socket(here)), there


def _socket_chardev(name: str, there: socket.socket) -> list[str]:
    return ["-chardev", f"socket,id={name},fd={there.fileno()}"]


async def _start(command: list[str], fds: tuple[int, ...], machine: Machine) -> trio.Process:
    on_terminal = machine.serial == "terminal"
    try:
        return await trio.lowlevel.open_process(
            command,
            stdin=None if on_terminal else subprocess.DEVNULL,
            stdout=None if on_terminal else subprocess.DEVNULL,
            stderr=None if on_terminal else subprocess.PIPE,
            pass_fds=fds,
        )
    except FileNotFoundError as error:
        raise UsageError(f"{command[0]} is not installed (qemu-system-x86)") from error


async def _keep_tail(stream: trio.abc.ReceiveStream, tail: bytearray) -> None:
    async with stream:
        async for data in stream:
            tail += data
            del tail[:-_STDERR_TAIL]


async def _end(process: trio.Process, *, at_once: bool = False) -> None:
    """End QEMU, if it has not ended, and wait for it; it may flush its disks before.

    By a signal: that works when this task, and the QMP client with it, is cancelled.
    """
    with trio.CancelScope(shield=True):
        if process.returncode is None and not at_once:
            process.terminate()
            with trio.move_on_after(QUIT_TIMEOUT):
                await process.wait()
        if process.returncode is None:
            process.kill()
        await process.wait()
