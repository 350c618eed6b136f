# SPDX-License-Identifier: Apache-2.0
"""Guests for tests: boot one, wait for its login, use its shell, switch it off.

No wait here is a sleep: each ends with what the guest prints, with its death, or with a
time limit, and the error shows the end of its console.
"""

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from nbdstream.guest.console import Console
from nbdstream.guest.disks import Disk
from nbdstream.guest.qemu import Guest, Machine, MiB, run_qemu
from testbed.guests import bootdisk, busybox_image

# Under TCG, on a machine that is busy with other things, with a disk far away.
BOOT_TIMEOUT = 240.0
POWER_OFF_TIMEOUT = 60.0


@dataclass(frozen=True)
class System:
    """What runs in the guest: how it tells that it is up, and how it is switched off."""

    login: str
    """Printed when a user could log in: the end of the boot."""
    prompt: str
    power_off: str
    memory: int


BUSYBOX = System(r"GUEST READY$", "guest# ", "sync; poweroff -f", 256 * MiB)
DEBIAN = System("debian login:", r"root@debian:.*# ", "systemctl poweroff", 512 * MiB)


@dataclass(frozen=True)
class RunningGuest:
    """A guest of a known system."""

    system: System
    guest: Guest

    @property
    def console(self) -> Console:
        return self.guest.console

    async def wait_login(self) -> None:
        """Wait for the end of the boot: a user could log in now."""
        await self.console.wait_for(self.system.login, BOOT_TIMEOUT)

    async def wait_shell(self) -> None:
        """Wait for the prompt: ``run`` may be used now."""
        await self.console.wait_for(self.system.prompt, BOOT_TIMEOUT)

    async def run(self, command: str, within: float = 120) -> str:
        """Run *command* in the guest's shell; see ``Console.run``."""
        return await self.console.run(command, within)

    async def power_off(self) -> None:
        """Switch the guest off as its user would, and see QEMU end well."""
        await self.console.send(f"{self.system.power_off}\n")
        with trio.fail_after(POWER_OFF_TIMEOUT):
            status = await self.guest.wait()
        assert status == 0, f"QEMU ended with status {status}"


@asynccontextmanager
async def start(
    system: System,
    *disks: Disk,
    on_console: Callable[[str], None] | None = None,
    extra: tuple[str, ...] = (),
    prefix: tuple[str, ...] = (),
) -> AsyncIterator[RunningGuest]:
    """Start *system* from the first of *disks*; QEMU has just begun when the block does."""
    arguments = ("-no-reboot", *extra)
    machine = Machine(disks=disks, memory=system.memory, extra=arguments, prefix=prefix)
    async with run_qemu(machine, on_console) as guest:
        yield RunningGuest(system, guest)


@asynccontextmanager
async def boot(
    system: System,
    *disks: Disk,
    on_console: Callable[[str], None] | None = None,
    extra: tuple[str, ...] = (),
    prefix: tuple[str, ...] = (),
) -> AsyncIterator[RunningGuest]:
    """As ``start``, but the guest is at its shell prompt when the block begins."""
    async with start(system, *disks, on_console=on_console, extra=extra, prefix=prefix) as guest:
        await guest.wait_login()
        await guest.wait_shell()
        yield guest


def direct_boot(image: Path) -> tuple[str, ...]:
    """QEMU arguments that start the busybox guest's kernel without firmware and GRUB.

    It takes half the time. *image* is the directory from ``images.busybox()``.
    """
    kernel, initrd = str(image / "vmlinuz"), str(image / "initrd")
    # An emulated timer on a busy machine may be too late for the kernel's check of it.
    arguments = f"{busybox_image.KERNEL_ARGUMENTS} no_timer_check"
    return ("-kernel", kernel, "-initrd", initrd, "-append", arguments)


def check_filesystem(disk: Path, image_format: str = "raw") -> None:
    """Check the guest's file system on the image *disk*; RuntimeError if it is damaged.

    Only looks. A guest that was not switched off properly leaves a journal to be
    replayed, which counts as damage here.
    """
    with tempfile.TemporaryDirectory(dir=disk.parent) as directory:
        raw = disk
        if image_format != "raw":
            raw = Path(directory, "disk.raw")
            bootdisk.run("qemu-img", "convert", "-f", image_format, "-O", "raw", disk, raw)
        bootdisk.run("e2fsck", "-f", "-n", f"{raw}?offset={bootdisk.PARTITION_OFFSET}")
