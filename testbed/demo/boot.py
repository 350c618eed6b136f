# SPDX-License-Identifier: Apache-2.0
"""The demo: a real guest boots at once from a slow remote image, and ends up local.

    ./dev demo [--format raw|qcow2|qed] [--rate 100M] [--delay 10ms] [--data 2G] [--brief]

It takes about a quarter of an hour, most of which is 2 GiB that come over the link three times.

1. A Debian guest boots through nbdstream from an image behind a slow link while the rest
   of its disk is streamed. It verifies some files and writes one. When the disk is local, QEMU
   opens the leaf itself, and nbdstream ends (pivot).
2. The remote is cut off. The same guest boots again from the leaf alone, verifies all of
   its files, and finds what it wrote.
3. The image is booted a second time, with a new leaf: its boot profile was recorded.
4. The same guest without nbdstream: image copied first, QEMU's own copy-on-read with its own
   stream job (given up after twice the time that nbdstream took), and from the local file. One
   table compares them.
"""

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import trio

from nbdstream.guest.disks import Disk
from nbdstream.units import format_size, parse_size
from testbed.demo.show import Result, Show
from testbed.demo.ways import (
    Task,
    boot_from_file,
    copy_then_boot,
    slow_remote,
    stream_with_nbdstream,
    stream_with_qemu,
)
from testbed.guests import images
from testbed.guests.systems import DEBIAN, boot, check_filesystem
from testbed.link.control import parse_bit_rate, parse_seconds
from testbed.link.model import Shape

CHECK = "cd /srv/check && sha256sum --quiet -c SHA256SUMS"
EVERYTHING = "cd /srv/payload && sha256sum --quiet -c SHA256SUMS"
NOTE = "written while the disk was far away"
WORK = f"{CHECK} && echo {NOTE} > /root/note && sync /root/note"
WORK_DONE = "verified some files and written one"


def main() -> None:
    """Run the demo as the command line says."""
    parser = argparse.ArgumentParser(description="Boot a Debian guest from a slow remote image.")
    parser.add_argument("--format", default="raw", choices=["raw", "qcow2", "qed"])
    parser.add_argument("--rate", default="100M", help="of the link, bits per second")
    parser.add_argument("--delay", default="10ms", help="of the link, one way")
    parser.add_argument("--data", default="2G", help="on the image")
    parser.add_argument("--brief", action="store_true", help="leave the comparison away")
    arguments = parser.parse_args()
    shape = Shape(rate=parse_bit_rate(arguments.rate), delay=parse_seconds(arguments.delay))
    data = parse_size(arguments.data)
    trio.run(demo, shape, arguments.format, data, arguments.brief)


async def demo(shape: Shape, leaf_format: str, data: int, brief: bool) -> None:
    """Run all parts; temporary files are gone afterwards."""
    show = Show()
    with tempfile.TemporaryDirectory(dir=images.beside(), prefix="demo-") as name:
        directory = Path(name)
        image = images.copy_image(images.debian() / "disk.raw", directory / "remote.raw")
        status = image.stat()
        missing = max(data - status.st_blocks * 512, 0)
        images.grow(image, status.st_size + missing, missing)
        leaf = directory / f"leaf.{leaf_format}"
        results = [await boot_at_once(show, image, shape, leaf)]
        await boot_from_leaf(show, leaf)
        if not brief:
            again = directory / f"again.{leaf_format}"
            results.append(await boot_again(show, image, shape, again))
            results += await compare(show, image, shape, directory, results[0])
        rate = "unlimited" if shape.rate is None else f"{shape.rate / 1e6:g} Mbit/s"
        show.table(f"{rate}, {2000 * shape.delay:g} ms round trip", results)
        if not brief:
            first, second, copied, _, local = (result.login for result in results)
            show.note(f"login: nbdstream / copy, then boot: {first / copied:.2f}")
            show.note(f"login: second boot / from a local file: {second / local:.2f}")


async def boot_at_once(show: Show, image: Path, shape: Shape, leaf: Path) -> Result:
    """Part 1: boot through nbdstream, until the disk is wholly local and nbdstream gone."""
    with slow_remote(image, shape) as link:
        show.begin("A guest boots at once from a slow remote image")
        show.note(f"remote: {link.uri()}, {describe(image)}")
        task = Task(DEBIAN, WORK, WORK_DONE, link, show)
        return await stream_with_nbdstream(task, leaf)


async def boot_from_leaf(show: Show, leaf: Path) -> None:
    """Part 2: the remote is gone; the leaf alone must do."""
    show.begin("The remote is cut off: the same guest from the leaf alone")
    show_command(show, "nbdstream", "info", str(leaf))
    image_format = leaf.suffix.removeprefix(".")
    async with boot(DEBIAN, Disk.file(leaf, image_format)) as guest:
        show.note("the guest is up; its QEMU uses the file, there is no nbdstream")
        await guest.run(CHECK)
        await guest.run(EVERYTHING)
        show.note("every checksum in the guest is right")
        if (await guest.run("cat /root/note")).strip() != NOTE:
            raise RuntimeError("the guest lost what it had written")
        show.note(f"and it reads: {NOTE}")
        await guest.power_off()
    check_filesystem(leaf, image_format)
    show.note("e2fsck finds nothing wrong with its file system")


async def boot_again(show: Show, image: Path, shape: Shape, leaf: Path) -> Result:
    """Part 3: a new leaf of the same image; nothing is told of the first boot."""
    with slow_remote(image, shape) as link:
        show.begin("A second boot of the image, with a new leaf")
        task = Task(DEBIAN, WORK, WORK_DONE, link, show)
        way = "second boot"
        return await stream_with_nbdstream(task, leaf, way, until="worked")


async def compare(
    show: Show, image: Path, shape: Shape, directory: Path, ours: Result
) -> list[Result]:
    """Part 4: the same with the peers, each with a link of its own that is alike."""
    patience = 2 * (ours.local or 0)
    results = []
    for title, way in (
        ("For comparison: copy the image, then boot", copy_then_boot),
        (
            "For comparison: QEMU's own copy-on-read and block-stream",
            partial(stream_with_qemu, patience=patience),
        ),
    ):
        with slow_remote(image, shape) as link:
            show.begin(title)
            task = Task(DEBIAN, WORK, WORK_DONE, link, show)
            results.append(await way(task, directory))
    show.begin("For comparison: from a local file")
    results.append(await boot_from_file(task, Disk.file(directory / "copy.raw")))
    return results


def describe(image: Path) -> str:
    """The image's size, and how much of it is data."""
    status = image.stat()
    return f"{format_size(status.st_size)}, {format_size(status.st_blocks * 512)} of it data"


def show_command(show: Show, *command: str) -> None:
    """Run one of our own commands and show what it prints."""
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run([program, *command[1:]], check=True, capture_output=True, text=True)
    show.note("$ " + " ".join(command))
    for line in done.stdout.splitlines():
        show.note(f"  {line}")


if __name__ == "__main__":
    main()
