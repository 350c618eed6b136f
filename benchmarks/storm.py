# SPDX-License-Identifier: Apache-2.0
"""Many guests of one image on one host: how often does a byte cross the origin's link?

Guests are clients that replay a boot-like trace: bursts of sequential reads all over the image,
with pauses in which a guest would compute. Each has a leaf and a server of its own: each for
itself, by way of the host's image store, and thin on the store's image. Streams are off, so that
what is counted is what guests touch. Bytes are counted by the far server's own log. The link has a
delay and no rate, so that it is the limit for neither. Then eight hosts in two racks with four
guests each, streams on (`benchmarks.racks`).

At the end the image is made wholly local, and misses that the store's image answers are compared
with hits of a guest's own leaf.
"""

import enum
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.racks import GUESTS_EACH, HOSTS_EACH, RACKS, local_everywhere
from benchmarks.report import Cell, Options, Report, judged, median, progress, ratio
from testbed.far import memory_directory
from testbed.fleet import network
from testbed.hosts import Host, client, image, store_host
from testbed.link.model import Shape
from testbed.peers import Peer, make_image, nbdstream_serve
from testbed.processes import resident_bytes

MIB = 1 << 20
SIZE = 256 * MIB
LINK = Shape(delay=0.005)
GUESTS = (1, 4, 16, 32)
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


class Way(enum.Enum):
    """How guests get the image's data."""

    ALONE = "each for itself"
    STORE = "store"
    THIN = "thin"


@contextmanager
def _guest(host: Host, name: str, way: Way) -> Iterator[Peer]:
    thin = ("--thin",) if way is Way.THIN else ()
    opening = (
        nbdstream_serve(host.leaves / name, host.uri, *ALONE)
        if way is Way.ALONE
        else host.guest(name, *ALONE, *thin)
    )
    with opening as server:
        yield server


def _storm(source: Path, count: int, way: Way) -> Storm:
    """Start so many guests together on a host that has nothing."""
    with memory_directory() as directory, ExitStack() as stack:
        place = stack.enter_context(store_host(source, directory, shape=LINK))
        names = [f"leaf{number}.qcow2" for number in range(count)]
        with ThreadPoolExecutor(count) as pool:
            servers = list(
                pool.map(lambda name: stack.enter_context(_guest(place, name, way)), names)
            )
            bursts = trace()
            times = list(pool.map(lambda server: replay(server.uri, bursts), servers))
        memory = median(resident_bytes(server.pid, peak=True) for server in servers)
        processes = [resident_bytes(pid, peak=True) for pid in place.processes()]
        fetched = sum(length for _, length in place.fetched())
        mean = sum(times) / len(times)
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


def _latency(source: Path, rounds: int) -> tuple[float | None, float | None, float | None]:
    """Of what the store has: misses of a thin leaf, misses of another one, and then its hits."""
    thin, misses, hits = [], [], []
    with memory_directory() as directory, store_host(source, directory) as host:
        image("pull", host.uri, "--store", host.store, "--wait")
        for number in range(rounds):
            with host.guest(f"thin{number}.qcow2", *ALONE, "--thin") as server:
                thin.append(_probe(server.uri))
            with host.guest(f"leaf{number}.qcow2", *ALONE) as server:
                misses.append(_probe(server.uri))
                hits.append(_probe(server.uri))
    return median(thin), median(misses), median(hits)


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
        for way in Way:
            lone: Storm | None = None
            for count in GUESTS:
                progress(count, way.value)
                found = _storm(source, count, way)
                lone, first = lone or found, first or found
                report.rows.append(_row(f"{count}, {way.value}", found, lone, first, way))
        progress("racks")
        _racks(source, report)
        progress("latency")
        thin, miss, hit = _latency(source, options.rounds)
    for name, value in (("thin leaf", thin), ("leaf that is filled", miss)):
        words = f"miss that the store has, {name} / hit of the leaf, p50"
        report.ratios.append([words, judged(ratio(value, hit), most=1.5)])
    microseconds = [f"{1e6 * (value or 0):.0f}" for value in (thin, miss, hit)]
    report.notes.append(
        f"p50 of a miss that the store has: thin {microseconds[0]} µs, filled {microseconds[1]} µs;"
        f" of a hit {microseconds[2]} µs. Trace: {_touched() / MIB:.1f} MiB."
    )
    return report


def _racks(source: Path, report: Report) -> None:
    """Add what racks.py measures."""
    if network.missing():
        report.notes.append(f"racks: {network.missing()}")
        return
    found = local_everywhere(source, lambda uri: replay(uri, trace()))
    hosts = f"{RACKS * HOSTS_EACH} hosts in {RACKS} racks"
    words = f"{hosts}, all local: over the origin's link / image data"
    report.ratios.append([words, judged(ratio(found.sent, SIZE), most=2.05)])
    report.notes.append(
        f"{hosts}, {GUESTS_EACH} thin guests each: last guest {found.last:.1f} s, all local after "
        f"{found.local:.1f} s, {found.asked} requests to the origin."
    )


def _touched() -> int:
    return sum(length for burst in trace() for _, length in burst)


def _row(name: str, found: Storm, lone: Storm, first: Storm, way: Way) -> list[Cell]:
    part, slower = ratio(found.fetched, first.fetched), ratio(found.last, lone.last)
    memory = found.server_memory / MIB
    shared = way is not Way.ALONE
    return [
        name,
        found.fetched / MIB,
        judged(part, most=1.02) if shared else part,
        found.mean,
        found.last,
        judged(slower, most=1.3) if shared else slower,
        judged(memory, most=60) if shared else memory,
        judged(found.store_memory / MIB, most=150) if found.store_memory else None,
    ]
