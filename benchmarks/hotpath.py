# SPDX-License-Identifier: Apache-2.0
"""Wholly local data in the page cache: what a server itself costs.

fio's nbd engine over unix sockets, one connection; every server has an image of its own
with the same content, all run at the same time, and only one is under load at a time.
"""

import contextlib
import shutil
from contextlib import ExitStack
from pathlib import Path

from benchmarks.load import fio, fio_command
from benchmarks.report import Options, Report, judged, median, progress, ratio
from testbed.peers import (
    Peer,
    make_image,
    nbdkit,
    nbdstream_serve,
    qemu_nbd,
    temporary_directory,
)
from testbed.peers import (
    run as run_program,
)

IMAGE_SIZE = 512 << 20

LOADS = {
    "4k randread qd16 IOPS": ("randread", "4k", 16),
    "4k randwrite qd16 IOPS": ("randwrite", "4k", 16),
    "256k read qd16 MB/s": ("read", "256k", 16),
    "4k randread qd1 IOPS": ("randread", "4k", 1),
}
# Ratio rows: (a, b, the least that a / b should be for each load, None: just report).
RATIOS = (
    ("nbdstream raw", "nbdkit file", (1.5, None, 0.9, 0.9)),
    ("nbdstream raw", "qemu-nbd raw", (3.0, 2.0, None, None)),
    ("nbdstream qcow2", "qemu-nbd qcow2", (None, None, None, None)),
)


def _servers(directory: Path) -> dict[str, contextlib.AbstractContextManager[Peer]]:
    source = directory / "source.raw"
    make_image(source, IMAGE_SIZE, sparse=False)
    for name in ("nbdstream.raw", "nbdkit.raw", "qemu.raw"):
        shutil.copyfile(source, directory / name)
    for name in ("nbdstream.qcow2", "qemu.qcow2"):
        run_program(["qemu-img", "convert", "-O", "qcow2", source, directory / name])
    source.unlink()
    return {
        "nbdstream raw": nbdstream_serve(directory / "nbdstream.raw"),
        "nbdkit file": nbdkit("file", directory / "nbdkit.raw"),
        "qemu-nbd raw": qemu_nbd(directory / "qemu.raw", "raw"),
        "nbdstream qcow2": nbdstream_serve(directory / "nbdstream.qcow2"),
        "qemu-nbd qcow2": qemu_nbd(directory / "qemu.qcow2", "qcow2"),
    }


def run(options: Options) -> Report:
    report = Report("Local data, page cache warm", ["server", *LOADS])
    samples: dict[tuple[str, str], list[float]] = {}
    with temporary_directory() as directory, ExitStack() as stack:
        peers = {name: stack.enter_context(server) for name, server in _servers(directory).items()}
        for peer in peers.values():
            report.add_peer(peer, directory)
        for load, (rw, block, depth) in LOADS.items():
            report.add_recipe(fio_command("URI", rw, block, depth, "--time_based"))
            for _ in range(options.rounds):
                for name, peer in peers.items():
                    progress(load, name)
                    result = fio(peer.uri, rw, block, depth, options.seconds)
                    figure = result.rate / 1e6 if "MB/s" in load else result.iops
                    samples.setdefault((name, load), []).append(figure)
    medians = {key: median(values) for key, values in samples.items()}
    for name in peers:
        report.rows.append([name, *(medians[name, load] for load in LOADS)])
    for a, b, targets in RATIOS:
        values = [ratio(medians[a, load], medians[b, load]) for load in LOADS]
        report.ratios.append(
            [
                f"{a} / {b}",
                *(
                    value if least is None else judged(value, least=least)
                    for value, least in zip(values, targets, strict=True)
                ),
            ]
        )
    return report
