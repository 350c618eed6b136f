# SPDX-License-Identifier: Apache-2.0
"""Memory and start-up time on a leaf of 8 TiB, before and after 1 GiB of mixed traffic.

The traffic is random over all 8 TiB: half reads, half writes, of 4 KiB and 64 KiB. The
backing has data everywhere. Start-up is the time from the command to the first moment
that clients can connect, the first time (the leaf is made) and once more with what the
traffic left.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.load import NO_PROFILE, fio_command, run_fio
from benchmarks.report import Cell, Options, Report, judged, progress
from testbed.peers import (
    Peer,
    make_qcow2,
    nbdkit,
    nbdstream_serve,
    qemu_nbd,
    temporary_directory,
)
from testbed.processes import resident_bytes

SIZE = 8 << 40
MIB = 1 << 20
TRAFFIC_SECONDS = 600

Start = Callable[[], AbstractContextManager[Peer]]


def _sparse(path: Path) -> Path:
    with open(path, "wb") as image:
        image.truncate(SIZE)
    return path


def _servers(directory: Path, backing: str) -> dict[str, Start]:
    plain = _sparse(directory / "plain.raw")
    nbdkit_image = _sparse(directory / "nbdkit.raw")
    overlay = directory / "qemu.qcow2"
    make_qcow2(overlay, SIZE, backing=backing)

    def serve(name: str) -> Start:
        return lambda: nbdstream_serve(directory / name, backing, "--stream", "off", *NO_PROFILE)

    return {
        "nbdstream raw, backing": serve("leaf.raw"),
        "nbdstream qcow2, backing": serve("leaf.qcow2"),
        "nbdstream raw, no backing": lambda: nbdstream_serve(plain),
        "nbdkit file": lambda: nbdkit("file", nbdkit_image),
        "qemu-nbd qcow2, backing": lambda: qemu_nbd(overlay, "qcow2"),
    }


def _traffic(uri: str) -> list[str]:
    mix = ["--bssplit=4k/60:64k/40", "--io_size=1g", "--norandommap"]
    # The usual generator repeats itself before it has seen all of so large an export.
    return fio_command(uri, "randrw", "4k", 16, *mix, "--random_generator=tausworthe64")


def _measure(start: Start) -> list[Cell]:
    began = time.monotonic()
    with start() as peer:
        first = time.monotonic() - began
        idle = resident_bytes(peer.pid) / MIB
        run_fio(_traffic(peer.uri), TRAFFIC_SECONDS)
        loaded = resident_bytes(peer.pid) / MIB
        peak = resident_bytes(peer.pid, peak=True) / MIB
    began = time.monotonic()
    with start():
        return [first, time.monotonic() - began, idle, loaded, peak]


def run(options: Options) -> Report:
    """One round: memory does not vary from round to round as rates do."""
    columns = ["server", "first start s", "next start s", "RSS idle MiB", "RSS after MiB"]
    report = Report("An 8 TiB leaf, 1 GiB of traffic", [*columns, "peak MiB"])
    report.add_recipe(_traffic("URI"))
    with temporary_directory() as directory:
        with nbdkit("pattern", f"size={SIZE}") as backing:
            report.add_peer(backing)
            for name, start in _servers(directory, backing.uri).items():
                progress(name)
                cells = _measure(start)
                if name.startswith("nbdstream"):
                    cells = [
                        judged(value, most=limit) if isinstance(value, float) and limit else value
                        for value, limit in zip(cells, (1, 1, None, None, 200), strict=True)
                    ]
                report.rows.append([name, *cells])
    return report
