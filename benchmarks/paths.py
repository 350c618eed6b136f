# SPDX-License-Identifier: Apache-2.0
"""How fast does everything become local from servers that have no one round trip?

Time from the start of a stream to wholly local, as a multiple of what `nbdcopy` takes from the
same server; alone, and beside a guest: 512 KiB reads at random, five a second, or 4 KiB reads
and writes in turn at random, fifty a second. The servers: every read 5 ms; half of the
image at 0.2 ms and half at 25 ms; 20 to 120 ms at random; 5 ms and 200 Mbit/s.
A stream that is not done in `LIMIT` times nbdcopy's time is given up, and counts as that.
"""

import contextlib
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbd

from benchmarks.load import NO_PROFILE
from benchmarks.report import Cell, Options, Report, judged, median, progress
from testbed.far import memory_directory
from testbed.peers import Peer, Qmp, binary, make_image, nbdkit, nbdstream_serve

SIZE = 128 << 20
LIMIT = 20.0
PLUGIN = Path(__file__).parent.parent / "testbed" / "uneven_plugin.py"
THREADS = 64
GUEST_THREADS = 8


@dataclass
class Guest:
    """Reads and writes at random times until it is stopped.

    ``latencies``: seconds of each request.
    """

    uri: str
    length: int
    per_second: float
    writes: bool
    latencies: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._run, args=(number, stop))
            for number in range(GUEST_THREADS)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _run(self, number: int, stop: threading.Event) -> None:
        handle = nbd.NBD()
        handle.connect_uri(self.uri)
        rng = random.Random(number)
        while not stop.wait(rng.expovariate(self.per_second / GUEST_THREADS)):
            offset = rng.randrange(SIZE // self.length) * self.length
            began = time.monotonic()
            if self.writes and rng.random() < 0.5:
                handle.pwrite(bytes(self.length // 2), offset)  # a part of a block
            else:
                handle.pread(self.length, offset)
            self.latencies.append(time.monotonic() - began)
        handle.shutdown()


GUESTS = {"alone": None, "512 KiB reads": (512 << 10, 5.0, False), "mixed": (4096, 50.0, True)}


@contextlib.contextmanager
def _server(name: str, image: Path) -> Iterator[Peer]:
    python: list[str | Path] = ["python", PLUGIN, f"file={image}"]
    with {
        "5 ms": lambda: nbdkit("file", image, "rdelay=5ms", filters=["delay"], threads=THREADS),
        "0.2 and 25 ms": lambda: nbdkit(*python, "tiers=0.0002,0.025", threads=THREADS),
        "20 to 120 ms": lambda: nbdkit(*python, "random=0.02,0.12", threads=THREADS),
        "5 ms, 200 Mbit/s": lambda: nbdkit(
            "file", image, "rdelay=5ms", "rate=200M", filters=["delay", "rate"], threads=THREADS
        ),
    }[name]() as peer:
        yield peer


SERVERS = ("5 ms", "0.2 and 25 ms", "20 to 120 ms", "5 ms, 200 Mbit/s")


def _copy(uri: str) -> float:
    with memory_directory() as directory:
        began = time.monotonic()
        subprocess.run([binary("NBDCOPY"), uri, str(directory / "copy.raw")], check=True)
        return time.monotonic() - began


def _stream(uri: str, guest: str, limit: float) -> float:
    """Seconds from resuming the job to its end, or ``limit``."""
    with memory_directory() as directory:
        leaf = directory / "leaf.raw"
        with nbdstream_serve(leaf, uri, "--stream", "paused", *NO_PROFILE) as peer:
            assert peer.control
            with Qmp(peer.control, timeout=600) as qmp, contextlib.ExitStack() as stack:
                kind = GUESTS[guest]
                if kind is not None:
                    stack.enter_context(Guest(peer.uri, *kind).at_work())
                (job,) = qmp.execute("query-block-jobs")
                began = time.monotonic()
                qmp.execute("block-job-resume", device=job["device"])
                while qmp.execute("query-block-jobs"):
                    if time.monotonic() - began > limit:
                        return limit
                    time.sleep(0.02)
                return time.monotonic() - began


def run(options: Options) -> Report:
    columns = ["server", "nbdcopy s", *(f"{guest}, / nbdcopy" for guest in GUESTS)]
    report = Report("Streaming from servers that have no one round trip", columns)
    worst: tuple[float, str] = (0.0, "")
    with memory_directory() as directory:
        image = directory / "far.raw"
        make_image(image, SIZE, sparse=False)
        for name in SERVERS:
            with _server(name, image) as server:
                report.add_peer(server, directory)
                copies: list[float] = []
                taken: dict[str, list[float]] = {guest: [] for guest in GUESTS}
                for _ in range(options.rounds):
                    progress(name, "nbdcopy")
                    copies.append(_copy(server.uri))
                    for guest in GUESTS:
                        progress(name, guest)
                        taken[guest].append(_stream(server.uri, guest, LIMIT * copies[-1]))
            copy = median(copies) or 1.0
            row: list[Cell] = [name, copy]
            for guest, times in taken.items():
                value = (median(times) or 0.0) / copy
                worst = max(worst, (value, f"{name}, {guest}"))
                row.append(judged(value, most=1.15 if guest == "alone" else 1.5))
            report.rows.append(row)
    report.notes.append(f"Worst: {worst[1]}, {worst[0]:.2f} times nbdcopy.")
    return report
