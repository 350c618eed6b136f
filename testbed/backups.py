# SPDX-License-Identifier: Apache-2.0
"""Domains of libvirt with a disk of their own, and their backups by virtnbdbackup."""

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import trio

from nbdstream.guest.console import Console
from nbdstream.tasks import open_background_nursery
from testbed.guests import systems
from testbed.guests.systems import System
from testbed.migrations.libvirt import DOMAIN, Host, domain_xml
from testbed.processes import TOP

PLUGIN = TOP / "plugins/virtnbdbackup_plugin.py"
# The domain's name in file names, and its disk's in those of backups.
NAME = "vm"
FULL, INCREMENTS = "vda.full.data", "vda.inc.*.data"

_NETWORK_DISK = re.compile(r"<disk type='network'.*?</source>", re.S)


class BackupError(RuntimeError):
    """One of virtnbdbackup's programs failed; the message has its words."""


def network_xml(directory: Path, system: System) -> str:
    """The domain with the NBD export at ``vm.nbd`` in *directory* as its disk."""
    return domain_xml(NAME, directory, system)


def file_xml(directory: Path, system: System, disk: Path) -> str:
    """The domain with a qcow2 file as its disk."""
    driver = "<driver name='qemu' type='qcow2'/>"
    element = f"<disk type='file' device='disk'>{driver}<source file='{disk}'/>"
    return _NETWORK_DISK.sub(element, network_xml(directory, system))


@asynccontextmanager
async def running_domain(
    host: Host, xml: str, directory: Path, system: System
) -> AsyncIterator[Console]:
    """The domain boots up to its prompt; it is destroyed with the block."""
    file = directory / f"{NAME}.xml"
    file.write_text(xml)
    await host.virsh("define", str(file))
    await host.virsh("start", "--paused", DOMAIN)
    stream = await trio.open_unix_socket(str(directory / f"{NAME}.serial"))
    async with stream, open_background_nursery() as nursery:
        console = Console(stream)
        nursery.start_soon(console.pump)
        await host.virsh("resume", DOMAIN)
        await console.wait_for(system.login, systems.BOOT_TIMEOUT)
        await console.wait_for(system.prompt, systems.BOOT_TIMEOUT)
        yield console
        await host.virsh("destroy", DOMAIN)


async def back_up(host: Host, level: str, directory: Path) -> None:
    """Back the running domain up. Raises BackupError."""
    await _run("virtnbdbackup", host, "-d", DOMAIN, "-l", level, "-o", directory)


async def restore(host: Host, backup: Path, target: Path) -> Path:
    """Restore the domain's disk into the directory *target*. Raises BackupError.

    Returns: the image, in qcow2 format.
    """
    await _run("virtnbdrestore", host, "-i", backup, "-o", target)
    (image,) = target.glob("*.qcow2")  # noqa: ASYNC240
    return image


def files(backup: Path) -> list[Path]:
    """The backups of the domain's disk, in order; fewer than ten incremental ones."""
    return [backup / FULL, *sorted(backup.glob(INCREMENTS))]


async def _run(program: str, host: Host, *arguments: str | Path) -> None:
    # A URI with a transport in it is another host's for virtnbdbackup.
    uri = host.uri.replace("qemu+unix:", "qemu:")
    command = [program, "-U", uri, *map(str, arguments)]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    if done.returncode != 0:
        raise BackupError(f"{program}: {done.stdout.decode()}{done.stderr.decode()}")


def backup_uri(files: Sequence[Path]) -> str:
    """The backing that shows the disk as it was at the last of these backups."""
    named = "".join(f"&file={quote(str(file))}" for file in files)
    return f"nbdkit:python?script={quote(str(PLUGIN))}{named}"
