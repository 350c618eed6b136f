# SPDX-License-Identifier: Apache-2.0
"""Many guests of one image on one host: how often does a byte cross the origin's link?

Guests are clients that replay a boot-like trace: bursts of sequential reads all over the image,
with pauses in which a guest would compute. Each has a leaf and a server of its own, once with
the host's image store and once each for itself. Streams are off, so that what is counted is
what guests touch. Bytes are counted by the far server's own log. The link has a delay and no
rate, so that it is the limit for neither.

At the end the image is made wholly local, and misses that the store answers are compared with
hits of the same guest's leaf.
"""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Cell, Options, Report, judged, median, progress, ratio
from testbed.far import memory_directory
from testbed.hosts import Host, client, image, store_host
from testbed.link.model import Shape
from testbed.peers import Peer, make_image, nbdstream_serve
from testbed.processes import resident_bytes

MIB = 1 << 20
SIZE = 256 * MIB
LINK = Shape(delay=0.005)
GUESTS = (1, 4, 16)
BURSTS = 150
# Only what guests ask for: a profile that the first run records would help all others.
ALONE = ("--stream", "off", "--prefetch", "off")
# Seconds in which a guest computes after a burst.
PAUSE = 0.01
# Reads in each measurement of latency, each of another MiB.
PROBES = 200

Read = tuple[int, int]


def trace(seed: int = 1) -> list[list[Read]]:
    """Bursts of reads, in order: the same ones for the same seed."""
    numbers = random.Random(seed)
    bursts = []
    for _ in range(BURSTS):
        offset = numbers.randrange(SIZE // 4096) * 4096
        burst = []
        for _ in range(numbers.choice((1, 1, 2, 4, 16))):
            length = min(numbers.choice((4096, 16384, 65536, 131072)), SIZE - offset)
            if length:
                burst.append((offset, length))
            offset += length
        bursts.append(burst)
    return bursts


def replay(uri: str, bursts: list[list[Read]]) -> float:
    """Read the trace as a guest would; the seconds that it took."""
    start = time.monotonic()
    with client(uri) as handle:
        for burst in bursts:
            for offset, length in burst:
                handle.pread(length, offset)
            time.sleep(PAUSE)
    return time.monotonic() - start


@dataclass(frozen=True)
class Storm:
    """``fetched`` in bytes over the link; ``last`` and ``mean`` in seconds; memory in bytes."""

    fetched: int
    last: float
    mean: float
    server_memory: float
    store_memory: int


@contextmanager
def _alone(host: Host, name: str) -> Iterator[Peer]:
    with nbdstream_serve(host.leaves / name, host.uri, *ALONE) as server:
        yield server


def _storm(source: Path, count: int, *, store: bool) -> Storm:
    """Start so many guests together on a host that has nothing."""
    with memory_directory() as directory, ExitStack() as stack:
        host = stack.enter_context(store_host(source, directory, shape=LINK))
        open_guest: Callable[[str], AbstractContextManager[Peer]] = (
            (lambda name: host.guest(name, *ALONE)) if store else (lambda name: _alone(host, name))
        )
        names = [f"leaf{number}.qcow2" for number in range(count)]
        with ThreadPoolExecutor(count) as pool:
            servers = list(pool.map(lambda name: stack.enter_context(open_guest(name)), names))
            bursts = trace()
            times = list(pool.map(lambda server: replay(server.uri, bursts), servers))
        memory = median(resident_bytes(server.pid, peak=True) for server in servers)
        processes = [resident_bytes(pid, peak=True) for pid in host.processes()]
        fetched = sum(length for _, length in host.fetched())
        mean = sum(times) / count
        return Storm(fetched, max(times), mean, memory or 0.0, max(processes, default=0))


def _probe(uri: str) -> float:
    """The median time of single 4 KiB reads, each of another MiB, in seconds."""
    times = []
    with client(uri) as handle:
        handle.pread(4096, SIZE - 4096)
        for number in range(PROBES):
            start = time.perf_counter()
            handle.pread(4096, number * MIB)
            times.append(time.perf_counter() - start)
    return median(times) or 0.0


def _latency(source: Path, rounds: int) -> tuple[float | None, float | None]:
    """Misses that the store has, and then the same reads from the leaf."""
    misses, hits = [], []
    with memory_directory() as directory, store_host(source, directory) as host:
        image("pull", host.uri, "--store", host.store, "--wait")
        for number in range(rounds):
            with host.guest(f"leaf{number}.qcow2", *ALONE) as server:
                misses.append(_probe(server.uri))
                hits.append(_probe(server.uri))
    return median(misses), median(hits)


def run(options: Options) -> Report:
    columns = ["guests", "fetched MiB", "of one alone", "mean s", "last s", "last / lone"]
    report = Report(
        "Guests of one image that start together", [*columns, "server MiB", "store MiB"]
    )
    report.add_recipe(["nbdstream", "serve", "LEAF", "-b", "URI", "--store", *ALONE])
    with memory_directory() as directory:
        source = directory / "source"
        make_image(source, SIZE, sparse=False)
        first: Storm | None = None
        for store in (False, True):
            lone: Storm | None = None
            for count in GUESTS:
                progress(count, "with the store" if store else "each for itself")
                found = _storm(source, count, store=store)
                lone, first = lone or found, first or found
                report.rows.append(_row(found, count, lone, first, store=store))
        progress("latency")
        miss, hit = _latency(source, options.rounds)
    report.ratios.append(
        ["miss that the store has / hit of the leaf, p50", judged(ratio(miss, hit), most=1.5)]
    )
    microseconds = [f"{1e6 * (value or 0):.0f}" for value in (miss, hit)]
    report.notes.append(f"p50 of a miss that the store has {microseconds[0]} µs, of a hit ")
    report.notes[-1] += f"{microseconds[1]} µs. Trace: {_touched() / MIB:.1f} MiB."
    return report


def _touched() -> int:
    return sum(length for burst in trace() for _, length in burst)


def _row(found: Storm, count: int, lone: Storm, first: Storm, *, store: bool) -> list[Cell]:
    name = f"{count}, {'store' if store else 'each for itself'}"
    part, slower = ratio(found.fetched, first.fetched), ratio(found.last, lone.last)
    return [
        name,
        found.fetched / MIB,
        judged(part, most=1.02) if store else part,
        found.mean,
        found.last,
        judged(slower, most=1.3) if store else slower,
        judged(found.server_memory / MIB, most=60) if store else found.server_memory / MIB,
        judged(found.store_memory / MIB, most=150) if store else None,
    ]
