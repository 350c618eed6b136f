# SPDX-License-Identifier: Apache-2.0
"""What does streaming cost a guest that misses? A link of 100 Mbit/s and 20 ms round trip
with one FIFO queue, and a client that makes 20 random demand reads of 4 KiB a second.

For each way to stream, the same reads are made with it off and with it on. `use` is what
share of the link's rate came over it, after a few seconds to settle. The reads go to the
far half of the image, which no streaming reaches meanwhile, so that they are misses.

"Fixed window" rows read the backing directly, beside an nbdcopy with a fixed number of
requests in flight: what a bigger window does when nothing adapts it. The queue is deep (a
second's worth), as many are.
"""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import NO_PROFILE, Result, fio, fio_command
from benchmarks.report import Cell, Options, Report, judged, median, progress, ratio
from testbed.far import Far, far_backing, qemu_leaf
from testbed.link.model import Shape
from testbed.peers import (
    Peer,
    Qmp,
    binary,
    make_qcow2,
    nbdstream_serve,
    temporary_directory,
)

SIZE = 4 << 30
LINK = Shape(rate=100e6, delay=0.010)
READS_PER_SECOND = 20
SETTLE_SECONDS = 4.0
# Enough reads that the 99th percentile is not the very worst one.
SECONDS_FACTOR = 5


@dataclass(frozen=True)
class Streaming:
    """An export over the link, and how to begin to stream below it."""

    uri: str
    begin: Callable[[], AbstractContextManager[None]]


@contextlib.contextmanager
def _nbdstream(suffix: str, far: Far, directory: Path) -> Iterator[Streaming]:
    leaf = directory / f"leaf.{suffix}"
    with nbdstream_serve(leaf, far.uri, "--stream", "paused", *NO_PROFILE) as peer:
        yield Streaming(peer.uri, lambda: _resumed(peer))


@contextlib.contextmanager
def _resumed(peer: Peer) -> Iterator[None]:
    assert peer.control
    with Qmp(peer.control) as qmp:
        (job,) = qmp.execute("query-block-jobs")
        qmp.execute("block-job-resume", device=job["device"])
        yield


@contextlib.contextmanager
def _qemu(far: Far, directory: Path) -> Iterator[Streaming]:
    image = directory / "qemu.qcow2"
    make_qcow2(image, SIZE)
    with qemu_leaf(image, far.socket) as leaf:

        @contextlib.contextmanager
        def begin() -> Iterator[None]:
            leaf.stream()
            yield

        yield Streaming(leaf.uri, begin)


@contextlib.contextmanager
def _fixed(requests: int, request_size: int, far: Far, _: Path) -> Iterator[Streaming]:
    command = [binary("NBDCOPY"), "--connections=1", f"--requests={requests}"]
    command += [f"--request-size={request_size}", f"--queue-size={requests * request_size}"]

    @contextlib.contextmanager
    def begin() -> Iterator[None]:
        copy = subprocess.Popen([*command, far.uri, "null:"])
        try:
            yield
        finally:
            copy.terminate()
            copy.wait()

    yield Streaming(far.uri, begin)


WAYS: dict[str, Callable[[Far, Path], AbstractContextManager[Streaming]]] = {
    "nbdstream raw": lambda far, d: _nbdstream("raw", far, d),
    "nbdstream qcow2": lambda far, d: _nbdstream("qcow2", far, d),
    "QEMU copy-on-read, block-stream": _qemu,
    "fixed window, 64 x 1 MiB": lambda far, d: _fixed(64, 1 << 20, far, d),
    "fixed window, 1 x 512 KiB": lambda far, d: _fixed(1, 512 << 10, far, d),
}


@dataclass(frozen=True)
class Sample:
    demand: Result
    use: float  # of the link's rate


def _demand(uri: str, seconds: float, seed: int) -> Result:
    """Another seed, other places: what one run read is local in the next."""
    region = [f"--offset={SIZE // 2}", f"--size={SIZE // 2}", "--rate_process=poisson"]
    pace = [
        f"--rate_iops={READS_PER_SECOND}",
        f"--ramp_time={round(SETTLE_SECONDS * 1000)}ms",
        # fio minds the seed only if it need not repeat itself.
        "--randrepeat=0",
        f"--randseed={seed}",
    ]
    return fio(uri, "randread", "4k", 32, seconds, *region, *pace)


def _measure(far: Far, uri: str, seconds: float, seed: int) -> Sample:
    with ThreadPoolExecutor() as pool:
        demand = pool.submit(_demand, uri, seconds, seed)
        time.sleep(SETTLE_SECONDS)
        before = far.link.stats()
        time.sleep(seconds)
        after = far.link.stats()
        got = (after["down"]["bytes"] - before["down"]["bytes"]) * 8
        assert LINK.rate
        return Sample(demand.result(), got / LINK.rate / (after["time"] - before["time"]))


def _off_and_on(name: str, seconds: float) -> tuple[Sample, Sample]:
    """Everything is new for each: leaf, link and server."""
    with far_backing(LINK, "pattern", f"size={SIZE}") as far, temporary_directory() as directory:
        with WAYS[name](far, directory) as streaming:
            off = _measure(far, streaming.uri, seconds, seed=1)
            with streaming.begin():
                return off, _measure(far, streaming.uri, seconds, seed=2)


def run(options: Options) -> Report:
    columns = ["", "use of the link", "p50 off ms", "p50 on ms", "p99 off ms", "p99 on ms"]
    report = Report("100 Mbit/s, 20 ms, FIFO: streaming and demand reads", [*columns, "p99 on/off"])
    report.add_link("--rate", "100M", "--delay", "10ms")
    report.add_recipe(["nbdkit", "pattern", f"size={SIZE}"])
    pace = f"--rate_iops={READS_PER_SECOND}"
    report.add_recipe(fio_command("URI", "randread", "4k", 32, pace, "--rate_process=poisson"))
    samples: dict[str, list[tuple[Sample, Sample]]] = {}
    for _ in range(options.rounds):
        for name in WAYS:
            progress(name)
            sample = _off_and_on(name, SECONDS_FACTOR * options.seconds)
            samples.setdefault(name, []).append(sample)
    for name, pairs in samples.items():
        report.rows.append([name, *_row(pairs, name.startswith("nbdstream"))])
    return report


def _row(pairs: list[tuple[Sample, Sample]], ours: bool) -> list[Cell]:
    off, on = zip(*pairs, strict=True)
    use = median(sample.use for sample in on)
    calm, loaded = median(s.demand.p99 for s in off), median(s.demand.p99 for s in on)
    slower = ratio(loaded, calm)
    return [
        judged(use, least=0.92) if ours else use,
        median(sample.demand.p50 for sample in off),
        median(sample.demand.p50 for sample in on),
        calm,
        loaded,
        judged(slower, most=1.5) if ours else slower,
    ]
