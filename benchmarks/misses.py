# SPDX-License-Identifier: Apache-2.0
"""Do slow misses hold up hits? The rate of hits while reads of remote data wait.

The first part of the leaf is made local. Hits are 4 KiB random reads of it at queue depth
16; beside them another client reads 4 KiB of remote data 100 times a second, never of the
same MiB twice, from a backing that takes 200 ms for each read.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from benchmarks.load import NO_PROFILE, Result, fio, fio_command, run_fio
from benchmarks.report import Cell, Options, Report, judged, median, progress, ratio
from testbed.far import qemu_leaf
from testbed.peers import Peer, make_qcow2, nbdkit, nbdstream_serve, temporary_directory

LOCAL_SIZE = 256 << 20
MISSES_PER_SECOND = 100
MISS_STRIDE = 1 << 20
# Misses go on for so long before and after the hits are measured.
MARGIN_SECONDS = 1.0


def _round_size(options: Options) -> int:
    """Remote bytes for the misses of one round, and half as much again."""
    seconds = options.seconds + 2 * MARGIN_SECONDS
    return int(1.5 * seconds * MISSES_PER_SECOND) * MISS_STRIDE


def _hits(uri: str, options: Options) -> Result:
    return fio(uri, "randread", "4k", 16, options.seconds, f"--size={LOCAL_SIZE}")


def _misses(uri: str, options: Options, number: int) -> Result:
    size = _round_size(options)
    region = [f"--offset={LOCAL_SIZE + number * size}", f"--size={size}"]
    seconds = options.seconds + 2 * MARGIN_SECONDS
    pace = f"--rate_iops={MISSES_PER_SECOND}"
    # Read 4 KiB, skip to the next MiB.
    return fio(uri, f"read:{MISS_STRIDE - 4096}", "4k", 128, seconds, *region, pace)


def _both(uri: str, options: Options, number: int) -> tuple[Result, Result]:
    with ThreadPoolExecutor() as pool:
        misses = pool.submit(_misses, uri, options, number)
        time.sleep(MARGIN_SECONDS)
        return _hits(uri, options), misses.result()


def _make_local(uri: str) -> None:
    run_fio(fio_command(uri, "read", "1M", 16, f"--size={LOCAL_SIZE}"), 0)


@contextmanager
def _leaves(directory: Path, backing: Peer, size: int) -> Iterator[dict[str, str]]:
    """The URIs of the leaves under test, by name."""
    qcow2 = directory / "qemu.qcow2"
    make_qcow2(qcow2, size)
    options = ("--stream", "off", *NO_PROFILE)
    with nbdstream_serve(directory / "leaf.raw", backing.uri, *options) as ours:
        with nbdstream_serve(directory / "leaf.qcow2", backing.uri, *options) as ours_2:
            with qemu_leaf(qcow2, backing.socket) as qemu:
                yield {
                    "nbdstream raw": ours.uri,
                    "nbdstream qcow2": ours_2.uri,
                    "QEMU qcow2, copy-on-read": qemu.uri,
                }


def run(options: Options) -> Report:
    columns = ["server", "hits alone IOPS", "hits beside misses IOPS", "ratio"]
    report = Report("Hits while misses wait 200 ms", [*columns, "misses/s", "miss p50 ms"])
    size = LOCAL_SIZE + options.rounds * _round_size(options)
    report.notes.append(f"{MISSES_PER_SECOND} misses a second are offered.")
    samples: dict[str, list[tuple[Result, Result, Result]]] = {}
    with temporary_directory() as directory:
        backing = nbdkit("pattern", f"size={size}", "rdelay=200ms", filters=["delay"], threads=64)
        with backing as far, _leaves(directory, far, size) as uris:
            report.add_peer(far)
            report.add_recipe(["nbdstream", "serve", "LEAF", "-b", "URI", "--stream", "off"])
            for uri in uris.values():
                _make_local(uri)
            for number in range(options.rounds):
                for name, uri in uris.items():
                    progress(name)
                    alone = _hits(uri, options)
                    samples.setdefault(name, []).append((alone, *_both(uri, options, number)))
    for name, results in samples.items():
        report.rows.append([name, *_row(results, name)])
    return report


def _row(results: list[tuple[Result, Result, Result]], name: str) -> list[Cell]:
    alone, beside, misses = zip(*results, strict=True)
    before, after = median(r.iops for r in alone), median(r.iops for r in beside)
    kept = ratio(after, before)
    verdict = judged(kept, least=0.8) if name.startswith("nbdstream") else kept
    return [before, after, verdict, median(r.iops for r in misses), median(r.p50 for r in misses)]
