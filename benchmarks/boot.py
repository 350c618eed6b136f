# SPDX-License-Identifier: Apache-2.0
"""How long until a guest that boots over a slow link asks for a login? Debian, over a link of
100 Mbit/s and 100 ms round trip, beside the same guest from a local file and beside QEMU's
own copy-on-read.

The clock starts when the guest is asked for, so making a leaf, starting a server and
shaking hands over the link count; it stops when the console shows the login prompt. The
second boot has no option, but a profile that nbdstream kept by itself while the same image was
booted from another leaf, over a link without limits; the first boot has none. Leaves, overlays
and the local file are new files in TMPDIR, as users have them on a disk. The far image is in the
page cache from the first boot on.

What the far side was asked for is taken from its own log, so no count of ours is relied on.
`fetched twice` is what was read there beyond once, up to the login. For a whole life, the
link loses its limit after the login, and the guest stays up until the stream job has
completed. Left out are the samples of the content that identify the image
(`nbdstream.backing.identity`), which nothing keeps.

Under TCG a boot is the work of one processor, whose speed may vary between one boot and the
next where other machines share it. QEMU's processor time shows that: what the login took
beyond it is what was waited for.

`--seconds` means nothing here: a boot takes what it takes, about 20 s under TCG on an idle
machine.
"""

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from benchmarks.report import Options, Report, judged, median, progress, ratio
from nbdstream.backing.identity import sample_ranges
from nbdstream.guest.disks import Disk
from testbed.far import BACKING_THREADS
from testbed.guests.images import copy_image, debian
from testbed.guests.systems import DEBIAN, start
from testbed.link.control import LinkProcess, link_process
from testbed.link.model import Shape
from testbed.peers import (
    Peer,
    PeerError,
    Qmp,
    make_qcow2,
    nbdkit,
    nbdstream_serve,
    temporary_directory,
)
from testbed.processes import processor_seconds

LINK = Shape(rate=100e6, delay=0.050)
NO_LIMIT = Shape()
STREAM_SECONDS = 300.0

_LOGGED_READ = re.compile(r" Read id=\d+ offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)")

Extent = tuple[int, int]  # offset, length


@dataclass(frozen=True)
class Reads:
    """What was read from the far image: bytes in all, and those beyond once."""

    fetched: int
    twice: int


@dataclass(frozen=True)
class Sample:
    """Seconds until the login, and of processor time that QEMU used for it; what was read by
    then, and until all was local."""

    login: float
    processor: float
    boot: Reads | None = None
    life: Reads | None = None


@dataclass
class FarImage:
    """The image at the far end of a link, and the log of what was read of it."""

    server: Peer
    link: LinkProcess
    size: int
    log: Path

    def reads(self) -> Reads:
        found = [(int(at, 16), int(n, 16)) for at, n in _LOGGED_READ.findall(self.log.read_text())]
        return count(found, sample_ranges(self.size))


def count(reads: list[Extent], ignored: list[Extent]) -> Reads:
    """What `reads` come to without those that are, to the byte, in `ignored`."""
    samples = set(ignored)
    kept = sorted(read for read in reads if read not in samples)
    fetched = twice = reached = 0
    for offset, length in kept:
        fetched += length
        twice += max(0, min(offset + length, reached) - offset)
        reached = max(reached, offset + length)
    return Reads(fetched, twice)


@contextlib.contextmanager
def far_image(image: Path, shape: Shape) -> Iterator[FarImage]:
    with temporary_directory() as directory:
        log = directory / "log"
        plugin = ("file", image, f"logfile={log}")
        with nbdkit(*plugin, filters=["log"], threads=BACKING_THREADS, readonly=True) as server:
            address = f"unix:{directory}/link"
            with link_process(address, f"unix:{server.socket}", shape) as link:
                yield FarImage(server, link, image.stat().st_size, log)


def until_login(
    began: float, *disks: Disk, extra: tuple[str, ...] = (), then: Callable[[], None] | None = None
) -> tuple[float, float]:
    """Boot a guest, wait for its login, do `then` while it is up, and pull its plug.

    Returns when the login was, in seconds since `began`, and QEMU's processor seconds.
    """

    async def boot() -> tuple[float, float]:
        async with start(DEBIAN, *disks, extra=extra) as guest:
            await guest.wait_login()
            took = time.monotonic() - began, processor_seconds(guest.guest.process.pid)
            if then is not None:
                await trio.to_thread.run_sync(then)
            await guest.guest.kill()
        return took

    return trio.run(boot)


def from_file(image: Path, directory: Path) -> Sample:
    """From a local raw file."""
    copy = copy_image(image, directory / "disk.raw")
    return Sample(*until_login(time.monotonic(), Disk.file(copy)))


def from_local_leaf(image: Path, directory: Path) -> Sample:
    """From a leaf of nbdstream that is all local: what is left is what a server costs."""
    leaf = copy_image(image, directory / "leaf.raw")
    began = time.monotonic()
    with nbdstream_serve(leaf) as server:
        return Sample(*until_login(began, Disk.nbd(server.uri)))


def with_nbdstream(image: Path, directory: Path, leaf: str, *options: str) -> Sample:
    """From a new leaf over the link; once up, the rest streams without a limit."""
    with far_image(image, LINK) as far:
        began = time.monotonic()
        with nbdstream_serve(directory / leaf, far.link.uri(), *options) as server:
            at_login: list[Reads] = []

            def complete() -> None:
                at_login.append(far.reads())
                far.link.set(NO_LIMIT)
                _wait_complete(server)

            login = until_login(began, Disk.nbd(server.uri), then=complete)
            return Sample(*login, at_login[0], far.reads())


def _wait_complete(server: Peer) -> None:
    """Wait until everything is local. Raises PeerError if it does not become so."""
    assert server.control
    deadline = time.monotonic() + STREAM_SECONDS
    with Qmp(server.control) as qmp:
        while qmp.execute("query-block-jobs"):
            if time.monotonic() > deadline:
                raise PeerError(f"the stream job did not end in {STREAM_SECONDS:g} s")
            time.sleep(0.1)
        if "backing" in qmp.execute("x-nbdstream-stats"):
            raise PeerError(f"the stream job failed: {server.stderr()}")


def with_qemu(image: Path, directory: Path) -> Sample:
    """From a qcow2 overlay that QEMU fills by copy-on-read; nothing is streamed."""
    with far_image(image, LINK) as far:
        began = time.monotonic()
        overlay = directory / "overlay.qcow2"
        make_qcow2(overlay, backing=far.link.uri())
        drive = f"file={overlay},format=qcow2,if=none,id=disk0,copy-on-read=on,discard=unmap"
        device = "virtio-blk-pci,drive=disk0,bootindex=1"
        login = until_login(began, extra=("-drive", drive, "-device", device))
        return Sample(*login, far.reads())


def record_profile(image: Path, directory: Path) -> None:
    """Boot the image from another leaf, so that the user's collection has its boot profile."""
    leaf = directory / "first.raw"
    with far_image(image, NO_LIMIT) as far, nbdstream_serve(leaf, far.link.uri()) as server:
        until_login(time.monotonic(), Disk.nbd(server.uri))


def with_profiles(state: Path, image: Path, directory: Path) -> Sample:
    """From a new leaf over the link, with the user's collection of profiles in ``state``."""
    old = os.environ["XDG_STATE_HOME"]
    os.environ["XDG_STATE_HOME"] = str(state)
    try:
        return with_nbdstream(image, directory, "leaf.raw")
    finally:
        os.environ["XDG_STATE_HOME"] = old


LOCAL = "local raw file"
LOCAL_LEAF = "nbdstream, all local"
PROFILE = "nbdstream, second boot"
NO_PROFILE = "nbdstream, first boot"
QEMU = "QEMU copy-on-read"


def run(options: Options) -> Report:
    columns = [
        "",
        "login after s",
        "QEMU's CPU s",
        "fetched by then MB",
        "fetched twice MB",
        "in its life MB",
    ]
    report = Report("A Debian guest boots over 100 Mbit/s, 100 ms", [*columns, "twice MB"])
    samples: dict[str, list[Sample]] = {}
    image = debian() / "disk.raw"
    with tempfile.TemporaryDirectory(prefix="nbds-") as kept:
        progress("recording a boot profile")
        with temporary_directory() as scratch:
            record_profile(image, scratch)
        known = shutil.copytree(os.environ["XDG_STATE_HOME"], Path(kept) / "known")
        ways: dict[str, Callable[[Path], Sample]] = {
            LOCAL: lambda scratch: from_file(image, scratch),
            LOCAL_LEAF: lambda scratch: from_local_leaf(image, scratch),
            PROFILE: lambda scratch: with_profiles(known, image, scratch),
            NO_PROFILE: lambda scratch: with_profiles(scratch / "none", image, scratch),
            QEMU: lambda scratch: with_qemu(image, scratch),
        }
        for _ in range(options.rounds):
            for name, way in ways.items():
                with temporary_directory() as scratch:
                    sample = way(scratch)
                progress(name, f"{sample.login:.1f} s, QEMU {sample.processor:.1f} s")
                samples.setdefault(name, []).append(sample)
    report.add_link("--rate", "100M", "--delay", "50ms")
    report.add_recipe(["nbdkit", "file", "disk.raw", "--filter=log"])
    report.add_recipe(["nbdstream", "serve", "leaf.raw", "-b", "URI"])
    report.add_recipe(["qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", "URI", "overlay"])
    report.add_recipe(["qemu", "-drive", "file=overlay.qcow2,copy-on-read=on"])
    _fill(report, samples)
    return report


def _fill(report: Report, samples: dict[str, list[Sample]]) -> None:
    login = {name: median(sample.login for sample in found) for name, found in samples.items()}
    for name, found in samples.items():
        boots = [sample.boot for sample in found if sample.boot is not None]
        lives = [sample.life for sample in found if sample.life is not None]
        figures = [
            median(getattr(reads, of) / 1e6 for reads in group)
            for group in (boots, lives)
            for of in ("fetched", "twice")
        ]
        processor = median(sample.processor for sample in found)
        report.rows.append([name, login[name], processor, *figures])
    blank = [None, None, None, None, None]
    with_profile = judged(ratio(login[PROFILE], login[LOCAL]), most=1.1)
    report.ratios.append(["second boot / local", with_profile, *blank])
    local_leaf = ratio(login[PROFILE], login[LOCAL_LEAF])
    report.ratios.append(["second boot / nbdstream, all local", local_leaf, *blank])
    without = judged(ratio(login[NO_PROFILE], login[QEMU]), most=0.4)
    report.ratios.append(["first boot / QEMU", without, *blank])
    most = max(
        sample.life.twice
        for found in samples.values()
        for sample in found
        if sample.life is not None
    )
    twice = judged(most, most=0)
    report.ratios.append(["bytes fetched more than once, whole life of a leaf", *blank, twice])
