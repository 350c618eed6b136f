# SPDX-License-Identifier: Apache-2.0
"""Do guest writes wait for the network? 4 KiB random writes, each to another cluster that
is not local yet, over a backing 50 ms (round trip) away, against the same writes to a leaf
that has no backing. Every round has a new leaf, in memory.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.load import NO_PROFILE, Result, fio, fio_command
from benchmarks.report import Cell, Options, Report, judged, median, progress, ratio
from testbed.far import Far, far_backing, memory_directory, qemu_leaf
from testbed.link.model import Shape
from testbed.peers import make_qcow2, nbdstream_serve, qemu_nbd

# So large that hardly two writes meet in a cluster.
SIZE = 64 << 30
ROUND_TRIP = 0.05
DEPTHS = (1, 16)

# What a server is given: a directory of its own and the backing, None for a local leaf.
Leaf = Callable[[Path, Far | None], AbstractContextManager[str]]


@contextlib.contextmanager
def _nbdstream(suffix: str, directory: Path, far: Far | None) -> Iterator[str]:
    leaf = directory / f"leaf.{suffix}"
    if far is None and suffix == "raw":
        with open(leaf, "wb") as image:
            image.truncate(SIZE)
    elif far is None:
        # As nbdstream makes its own.
        make_qcow2(leaf, SIZE, options="extended_l2=on,lazy_refcounts=on")
    with nbdstream_serve(leaf, far.uri if far else None, "--stream", "off", *NO_PROFILE) as peer:
        yield peer.uri


@contextlib.contextmanager
def _qemu(options: str, directory: Path, far: Far | None) -> Iterator[str]:
    leaf = directory / "leaf.qcow2"
    make_qcow2(leaf, SIZE, options=options)
    if far is None:
        with qemu_nbd(leaf, "qcow2") as peer:
            yield peer.uri
    else:
        with qemu_leaf(leaf, far.socket) as qemu:
            yield qemu.uri


LEAVES: dict[str, Leaf] = {
    "nbdstream raw": lambda d, far: _nbdstream("raw", d, far),
    "nbdstream qcow2": lambda d, far: _nbdstream("qcow2", d, far),
    "QEMU qcow2": lambda d, far: _qemu("", d, far),
    "QEMU qcow2, extended L2": lambda d, far: _qemu("extended_l2=on", d, far),
}


def _write(start: Leaf, far: Far | None, depth: int, seconds: float) -> Result:
    with memory_directory() as directory, start(directory, far) as uri:
        return fio(uri, "randwrite", "4k", depth, seconds, "--norandommap")


def run(options: Options) -> Report:
    columns = ["leaf"]
    for depth in DEPTHS:
        columns += [f"qd{depth} local ms", f"qd{depth} 50 ms away ms", f"qd{depth} ratio"]
    report = Report("4 KiB writes to clusters that are not local, mean latency", columns)
    samples: dict[tuple[str, int, bool], list[float]] = {}
    with far_backing(Shape(delay=ROUND_TRIP / 2), "pattern", f"size={SIZE}") as far:
        report.add_peer(far.server)
        report.add_recipe(fio_command("URI", "randwrite", "4k", 1, "--norandommap"))
        report.add_recipe(["nbdstream", "serve", "LEAF", "-b", "URI", "--stream", "off"])
        for _ in range(options.rounds):
            for name, start in LEAVES.items():
                for depth in DEPTHS:
                    for where in (None, far):
                        progress(name, f"qd{depth}", "local" if where is None else "far")
                        result = _write(start, where, depth, options.seconds)
                        samples.setdefault((name, depth, where is far), []).append(result.mean)
    for name in LEAVES:
        row: list[Cell] = [name]
        for depth in DEPTHS:
            local, away = (median(samples[name, depth, is_far]) for is_far in (False, True))
            slower = ratio(away, local)
            ours = name.startswith("nbdstream")
            row += [local, away, judged(slower, most=1.5) if ours else slower]
        report.rows.append(row)
    return report
