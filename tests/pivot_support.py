# SPDX-License-Identifier: Apache-2.0
"""A real QEMU whose disks are served, to be pivoted; written through its monitor, no guest."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from nbdstream.guest.accelerator import qemu_binary
from nbdstream.guest.disks import Disk
from nbdstream.pivot import run as pivot_run
from nbdstream.pivot.leftovers import PivotDisk
from nbdstream.pivot.servers import ControlledServer, Monitor
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import GenericError
from testbed.peers import Peer, make_image

SIZE = 2 << 20


def image_file(tmp_path: Path) -> Path:
    """The backing's content. A test module makes a fixture of it."""
    path = tmp_path / "image"
    make_image(path, SIZE)
    return path


@contextmanager
def qemu(directory: Path, *disks: Disk, arguments: tuple[str, ...] = ()) -> Iterator[str]:
    """A QEMU with these disks as nodes d0, d1, …; its QMP socket."""
    with qemu_process(directory, *disks, arguments=arguments) as (path, _):
        yield path


@contextmanager
def qemu_process(
    directory: Path, *disks: Disk, arguments: tuple[str, ...] = ()
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """As `qemu`, with its process."""
    path = directory / "vm.qmp"
    command = [
        "stdbuf",
        "-oL",
        qemu_binary(),
        "-nodefaults",
        "-display",
        "none",
        "-accel",
        "tcg",
        "-m",
        "32",
    ]
    command += ["-qmp", f"unix:{path},server=on,wait=off", *arguments]
    for number, disk in enumerate(disks):
        command += ["-blockdev", disk.named(f"d{number}")]
        command += ["-device", f"virtio-blk-pci,drive=d{number},share-rw=on"]
    with _printed(path).open("wb") as printed:
        process = subprocess.Popen(command, stdout=printed)
    try:
        while not listens(path):
            assert process.poll() is None
            time.sleep(0.01)
        yield str(path), process
    finally:
        process.kill()
        process.wait()


def listens(path: Path) -> bool:
    with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        return True
    return False


async def ask(path: str, name: str, **arguments: Any) -> Any:
    with trio.fail_after(20):
        async with QMPClient.connect(path) as qmp:
            return await qmp.execute(name, {k.replace("_", "-"): v for k, v in arguments.items()})


async def qemu_io(path: str, node: str, text: str) -> str:
    """Carry out a command of qemu-io on a node (or ``-d QOM-PATH``, a device); what it printed.

    Raises:
        AssertionError: it failed, or what was read is not what the command expects.
    """
    printed = _printed(Path(path))
    before = printed.stat().st_size
    line = f'qemu-io {node} "{text}"'
    # The answer says why the command was not carried out; QEMU itself prints how it went.
    refused: str = await ask(path, "human-monitor-command", command_line=line)
    assert not refused, refused
    said = printed.read_bytes()[before:].decode()
    assert "rror" not in said and "failed" not in said, said
    return said


def _printed(path: Path) -> Path:
    """What the QEMU with this QMP socket prints on stdout."""
    return path.with_suffix(".out")


async def wait_local(peer: Peer) -> None:
    with trio.fail_after(20):
        while "backing" in await ask(str(peer.control), "x-nbdstream-stats"):  # noqa: ASYNC110
            await trio.sleep(0.01)


def disk_of(peer: Peer) -> PivotDisk:
    return PivotDisk(ControlledServer(str(peer.control)))


async def pivot(path: str, disks: list[PivotDisk]) -> float:
    return await pivot_run.pivot(Monitor.at(path), disks)


async def is_running(path: str) -> bool:
    return bool((await ask(path, "query-status"))["running"])


async def inserted(path: str) -> list[Any]:
    """What the guest's disks are, as QEMU describes it."""
    devices = await ask(path, "query-block")
    return [device["inserted"] for device in devices if "inserted" in device]


_execute = QMPClient.execute


async def without_reopening(self: QMPClient, name: str, *args: Any, **more: Any) -> Any:
    """`QMPClient.execute` of a QEMU that cannot replace the file of a disk."""
    if name == "blockdev-reopen":
        raise GenericError("told to fail")
    return await _execute(self, name, *args, **more)
