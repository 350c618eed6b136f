# SPDX-License-Identifier: Apache-2.0
"""The demo of a recovery: a lost guest runs from its backup at once.

    ./dev demo recovery [--rate 200M] [--delay 10ms] [--data 3G] [--size 8G]

It takes about eight minutes, and needs root, libvirt and 12 GB of disk space.

1. A Debian domain of libvirt is backed up by virtnbdbackup: fully, and, after it has booted and
   written a file, incrementally. Then it is lost.
2. The backups are at the far end of a slow link. The guest starts from them through nbdstream,
   keeps a journal of synced records while the rest is copied, and finds its file.
3. The same link without nbdstream: the backups are copied, virtnbdrestore makes an image of
   them, and the guest starts from that. One table compares the two.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import trio

from nbdstream.guest.disks import Disk
from nbdstream.units import parse_size
from testbed import backups
from testbed.demo.show import Result, Show
from testbed.demo.ways import (
    Task,
    bring_up,
    far_end,
    power_off,
    shown_link,
    slow_remote,
    stream_with_nbdstream,
)
from testbed.guests import images
from testbed.guests.systems import DEBIAN, start
from testbed.link.control import parse_bit_rate, parse_seconds
from testbed.link.model import Shape
from testbed.migrations.libvirt import Host, host, ready
from testbed.peers import nbdkit, run

NOTE = "written after the full backup"
# A database's journal, as far as a disk can tell.
WORK = (
    f'[ "$(cat /root/note)" = "{NOTE}" ] && for i in $(seq 50); do echo record $i '
    "| dd of=/root/journal oflag=append conv=notrunc,fsync status=none || exit 1; done"
)
WORK_DONE = "found its file, and synced 50 records"


def main() -> None:
    """Run the demo as the command line says."""
    parser = argparse.ArgumentParser(description="Start a lost guest from its backup.")
    parser.add_argument("--rate", default="200M", help="of the link, bits per second")
    parser.add_argument("--delay", default="10ms", help="of the link, one way")
    parser.add_argument("--data", default="3G", help="on the disk")
    parser.add_argument("--size", default="8G", help="of the disk")
    arguments = parser.parse_args()
    shape = Shape(rate=parse_bit_rate(arguments.rate), delay=parse_seconds(arguments.delay))
    trio.run(demo, shape, parse_size(arguments.size), parse_size(arguments.data))


async def demo(shape: Shape, size: int, data: int) -> None:
    """Run all parts; temporary files are gone afterwards."""
    show = Show()
    with tempfile.TemporaryDirectory(prefix="nbds-") as short:
        with host("here", Path(short) / "h") as here:
            await ready(here)
            # Large files do not belong into /tmp; a socket's path has to be short.
            with tempfile.TemporaryDirectory(dir=images.beside(), prefix="demo-") as name:
                directory = Path(name)
                backup = await lose_a_guest(show, here, directory, Path(short), size, data)
                results = [
                    await recover(show, backup, shape, directory),
                    await restore_then_boot(show, here, backup, shape, directory),
                ]
    rate = "unlimited" if shape.rate is None else f"{shape.rate / 1e6:g} Mbit/s"
    show.table(f"{rate}, {2000 * shape.delay:g} ms round trip", results)
    ratio = results[0].login / results[1].login
    show.note(f"login: nbdstream / restore, then boot: {ratio:.2f}")


async def lose_a_guest(
    show: Show, here: Host, directory: Path, sockets: Path, size: int, data: int
) -> Path:
    """Part 1. Returns: the directory of the backups."""
    show.begin("A guest is backed up, and lost")
    raw = images.copy_image(images.debian() / "disk.raw", directory / "vm.raw")
    images.grow(raw, size, max(data - raw.stat().st_blocks * 512, 0))
    disk, backup = directory / "vm.qcow2", directory / "backup"
    run(["qemu-img", "convert", "-O", "qcow2", raw, disk])
    raw.unlink()
    xml = backups.file_xml(sockets, DEBIAN, disk)
    async with backups.running_domain(here, xml, sockets, DEBIAN) as console:
        show.note("the guest is up; virtnbdbackup makes a full backup …")
        await backups.back_up(here, "full", backup)
        show.note("virtnbdbackup has made a full backup")
        await console.run(f"echo {NOTE} > /root/note && sync")
        await backups.back_up(here, "inc", backup)
        show.note("the guest has written a file; an incremental backup has it")
    disk.unlink()
    show.note("the guest and its disk are gone")
    return backup


async def recover(show: Show, backup: Path, shape: Shape, directory: Path) -> Result:
    """Part 2: from the backups through nbdstream, until the disk is wholly local."""
    parameters = [f"file={file}" for file in backups.files(backup)]
    with nbdkit("python", backups.PLUGIN, *parameters, readonly=True) as server:
        with far_end(server, shape) as link:
            show.begin("It starts from its backup at once")
            task = Task(DEBIAN, WORK, WORK_DONE, link, show)
            return await stream_with_nbdstream(task, directory / "leaf.qcow2")


async def restore_then_boot(
    show: Show, here: Host, backup: Path, shape: Shape, directory: Path
) -> Result:
    """Part 3: the backups come over the same link, are restored, and then the guest starts."""
    show.begin("For comparison: restore, then boot")
    near, restored = directory / "near", directory / "restored"
    shutil.copytree(backup, near, ignore=shutil.ignore_patterns("*.data"))
    moved = 0
    for file in backups.files(backup):
        with slow_remote(file, shape) as link:
            task = Task(DEBIAN, WORK, WORK_DONE, link, show)
            async with shown_link(task):
                await trio.run_process(["nbdcopy", link.uri(), str(near / file.name)])
            moved += task.moved()
    show.note("the backups have been copied; virtnbdrestore makes an image of them …")
    image = await backups.restore(here, near, restored)
    local = show.elapsed
    show.note("the image is there")
    async with start(DEBIAN, Disk.file(image, "qcow2")) as guest:
        login = await bring_up(task, guest)
        await power_off(task, guest)
    return Result("restore, then boot", login, local, moved)


if __name__ == "__main__":
    main()
