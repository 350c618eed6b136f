# SPDX-License-Identifier: Apache-2.0
"""How fast does everything become local? The rate of streaming over links of growing
length and unlimited rate, beside `nbdcopy` to a raw file and QEMU's `block-stream`.

The backing export holds random data only, in the page cache, so that the link is what is
measured. (Not in /dev/shm: block status is slow there, and QEMU waits for every one.) Time
runs from the first bulk data that comes over the link until the command says that it is
done: connecting and starting up is left out for everybody. Leaves and copies are in
memory (/dev/shm where there is one), so that no disk sets the pace, and durable writes
cost nothing. QEMU's job takes minutes on long links: its rate is what its offset
gains in the time of one load.
"""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import NO_PROFILE
from benchmarks.report import Cell, Options, Report, judged, median, progress, ratio
from testbed.far import Far, far_backing, memory_directory, qemu_leaf
from testbed.link.model import Shape
from testbed.peers import (
    PeerError,
    Qmp,
    binary,
    make_image,
    make_qcow2,
    nbdstream_serve,
    temporary_directory,
)
from testbed.processes import children_seconds, processor_seconds

SIZE = 1 << 30
ROUND_TRIPS = (0.0, 0.010, 0.050, 0.200)


@dataclass(frozen=True)
class Sample:
    """Bytes per second, and processor seconds per GiB (None: not known)."""

    rate: float
    processor: float | None


def nbdcopy_command(uri: str, target: Path) -> list[str]:
    return [binary("NBDCOPY"), uri, str(target)]


def _nbdcopy(far: Far, directory: Path, _: Options) -> Sample:
    used = children_seconds()
    before = far.received()
    copy = subprocess.Popen(nbdcopy_command(far.uri, directory / "copy.raw"))
    started = far.wait_bulk(before)
    if copy.wait() != 0:
        raise PeerError(f"nbdcopy exited with {copy.returncode}")
    took = time.monotonic() - started
    return Sample(SIZE / took, (children_seconds() - used) * 2**30 / SIZE)


def _nbdstream(leaf: str, far: Far, directory: Path, _: Options) -> Sample:
    with nbdstream_serve(directory / leaf, far.uri, "--stream", "paused", *NO_PROFILE) as peer:
        assert peer.control
        with Qmp(peer.control, timeout=600) as qmp:
            used = processor_seconds(peer.pid)
            before = far.received()  # the image's fingerprint has come over the link already
            (job,) = qmp.execute("query-block-jobs")
            qmp.execute("block-job-resume", device=job["device"])
            started = far.wait_bulk(before)
            event = qmp.wait_event("BLOCK_JOB_COMPLETED")
            took = time.monotonic() - started
            used = processor_seconds(peer.pid) - used
    if "error" in event["data"]:
        raise PeerError(f"the stream job failed: {event['data']}")
    return Sample(SIZE / took, used * 2**30 / SIZE)


def _qemu(far: Far, directory: Path, options: Options) -> Sample:
    image = directory / "qemu.qcow2"
    make_qcow2(image, SIZE)
    before = far.received()
    with qemu_leaf(image, far.socket) as leaf:
        used = processor_seconds(leaf.peer.pid)
        leaf.stream()
        started = far.wait_bulk(before)
        first = leaf.streamed() or 0
        while True:
            time.sleep(0.01)
            now, offset = time.monotonic(), leaf.streamed()
            if offset is None or now - started >= options.seconds:
                break
        gained = (SIZE if offset is None else offset) - first
        used = processor_seconds(leaf.peer.pid) - used
        if gained <= 0:
            raise PeerError(f"QEMU's job did not move in {options.seconds} s")
        return Sample(gained / (now - started), used * 2**30 / gained)


RUNNERS: dict[str, Callable[[Far, Path, Options], Sample]] = {
    "nbdcopy": _nbdcopy,
    "nbdstream raw": lambda far, d, options: _nbdstream("leaf.raw", far, d, options),
    "nbdstream qcow2": lambda far, d, options: _nbdstream("leaf.qcow2", far, d, options),
    "QEMU block-stream": _qemu,
}


def run(options: Options) -> Report:
    columns = [f"{1000 * rtt:g} ms MB/s" for rtt in ROUND_TRIPS]
    costs = [f"{1000 * rtt:g} ms s/GiB" for rtt in ROUND_TRIPS]
    report = Report("Streaming by round-trip time, unlimited rate", ["", *columns, *costs])
    report.notes.append("s/GiB: processor seconds of the receiving side per GiB streamed.")
    samples: dict[tuple[str, float], list[Sample]] = {}
    with temporary_directory() as directory:
        image = directory / "far.raw"
        make_image(image, SIZE, sparse=False)
        for round_trip in ROUND_TRIPS:
            with far_backing(Shape(delay=round_trip / 2), "file", image) as far:
                report.add_peer(far.server, directory)
                for _ in range(options.rounds):
                    for name, runner in RUNNERS.items():
                        # The one before is gone: memory holds one copy at a time.
                        progress(f"{1000 * round_trip:g} ms", name)
                        with memory_directory() as scratch:
                            sample = runner(far, scratch, options)
                        samples.setdefault((name, round_trip), []).append(sample)
    report.add_link("--delay", "D")
    report.add_recipe(["nbdcopy", "URI", "copy.raw"])
    report.add_recipe(["nbdstream", "serve", "leaf.raw", "-b", "URI", "--stream", "paused"])
    _fill(report, samples)
    return report


def _fill(report: Report, samples: dict[tuple[str, float], list[Sample]]) -> None:
    rate = {key: median(sample.rate / 1e6 for sample in found) for key, found in samples.items()}
    cost = {
        key: median(sample.processor for sample in found if sample.processor is not None)
        for key, found in samples.items()
    }
    for name in RUNNERS:
        rates: list[Cell] = [rate[name, rtt] for rtt in ROUND_TRIPS]
        report.rows.append([name, *rates, *(cost[name, rtt] for rtt in ROUND_TRIPS)])
    for name in ("nbdstream raw", "nbdstream qcow2"):
        against_copy = [ratio(rate[name, rtt], rate["nbdcopy", rtt]) for rtt in ROUND_TRIPS]
        report.ratios.append(
            [
                f"{name} / nbdcopy",
                *(
                    judged(value, least=0.95 if rtt else 0.6)
                    for value, rtt in zip(against_copy, ROUND_TRIPS, strict=True)
                ),
                *(ratio(cost[name, rtt], cost["nbdcopy", rtt]) for rtt in ROUND_TRIPS),
            ]
        )
    against_qemu = [
        ratio(rate["nbdstream raw", rtt], rate["QEMU block-stream", rtt]) for rtt in ROUND_TRIPS
    ]
    report.ratios.append(
        [
            "nbdstream raw / QEMU",
            *(
                judged(value, least=50) if rtt == 0.050 else value
                for value, rtt in zip(against_qemu, ROUND_TRIPS, strict=True)
            ),
            *(None for _ in ROUND_TRIPS),
        ]
    )
