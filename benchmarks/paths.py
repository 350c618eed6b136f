# SPDX-License-Identifier: Apache-2.0
"""How fast does everything become local from servers that have no one round trip?

Time from the start of a stream to wholly local, as a multiple of what `nbdcopy` takes from the
same server; alone, and beside a guest: 512 KiB reads at random, five a second, or 4 KiB reads
and writes in turn at random, fifty a second. The servers: every read 5 ms; half of the
image at 0.2 ms and half at 25 ms; 20 to 120 ms at random; 5 ms and 200 Mbit/s; and with no delay
nginx over HTTPS, moto's S3 server and OpenSSH's sshd, of which nbdcopy reads by nbdkit's own curl,
S3 and ssh plugins. `p95 / idle` is the 95th percentile of the guest's requests, beside the stream
and before it. A stream that is not done in `LIMIT` times nbdcopy's time is given up, and counts as
that.

nbdkit's token bucket holds what its rate gives in two seconds. So each run against it, nbdcopy's
included, begins after a rest in which the bucket fills.
"""

import contextlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import nbd

from benchmarks.load import NO_PROFILE
from benchmarks.report import Cell, Options, Report, judged, median, progress, ratio
from testbed.far import memory_directory
from testbed.peers import (
    Peer,
    Qmp,
    binary,
    make_image,
    nbdkit,
    nbdstream_serve,
    temporary_directory,
)
from testbed.remotes import s3_server, ssh_server
from testbed.web import nginx

# Of the image; less from moto, which is slow.
SIZE = 512 << 20
SLOW_SIZE = 64 << 20
LIMIT = 20.0
PLUGIN = Path(__file__).parent.parent / "testbed" / "uneven_plugin.py"
THREADS = 64
GUEST_THREADS = 8
IDLE_SECONDS = 5.0
BUCKET_SECONDS = 3.0


@dataclass
class Guest:
    """Reads and writes at random times until it is stopped.

    ``size``: of the disk. ``latencies``: seconds of each request.
    """

    size: int
    length: int
    per_second: float
    writes: bool
    latencies: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def at_work(self, uri: str) -> Iterator[None]:
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._run, args=(uri, number, stop))
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

    def _run(self, uri: str, number: int, stop: threading.Event) -> None:
        handle = nbd.NBD()
        handle.connect_uri(uri)
        rng = random.Random(number)
        while not stop.wait(rng.expovariate(self.per_second / GUEST_THREADS)):
            offset = rng.randrange(self.size // self.length) * self.length
            began = time.monotonic()
            if self.writes and rng.random() < 0.5:
                handle.pwrite(bytes(self.length // 2), offset)  # a part of a block
            else:
                handle.pread(self.length, offset)
            self.latencies.append(time.monotonic() - began)
        handle.shutdown()


GUESTS: dict[str, Callable[[int], Guest | None]] = {
    "alone": lambda size: None,
    "512 KiB reads": lambda size: Guest(size, 512 << 10, 5.0, writes=False),
    "mixed": lambda size: Guest(size, 4096, 50.0, writes=True),
}


class Sample(NamedTuple):
    """Seconds that a stream took, and the 95th percentile of the guest's requests without it and
    beside it."""

    taken: float
    idle: float
    beside: float


@dataclass(frozen=True)
class Far:
    """An image as nbdstream is told of it, as an NBD server for nbdcopy, and what nbdstream's
    command has before it."""

    uri: str
    nbd: Peer
    prefix: Sequence[str] = ()


@contextlib.contextmanager
def _nbd(*plugin: str | Path, filters: Sequence[str] = ()) -> Iterator[Far]:
    with nbdkit(*plugin, filters=filters, threads=THREADS) as peer:
        yield Far(peer.uri, peer)


@contextlib.contextmanager
def _uneven(image: Path, times: str) -> Iterator[Far]:
    with _nbd("python", PLUGIN, f"file={image}", times) as far:
        yield far


@contextlib.contextmanager
def _https(image: Path) -> Iterator[Far]:
    with nginx(image.parent) as web, temporary_directory() as directory:
        url = web.tls_url(image.name)
        settings = directory / "http.toml"
        settings.write_text(f'["https://localhost:{web.tls_port}/"]\nca-file = "{web.authority}"\n')
        os.environ["NBDSTREAM_HTTP"] = str(settings)
        with nbdkit("curl", f"url={url}", f"cainfo={web.authority}", readonly=True) as peer:
            yield Far(url, peer)


@contextlib.contextmanager
def _s3(image: Path) -> Iterator[Far]:
    with s3_server() as store:
        store.put("images")
        store.put("images", image.name, image.read_bytes())
        os.environ.update(store.environment)
        parameters = ["bucket=images", f"key={image.name}", f"endpoint-url={store.endpoint}"]
        with nbdkit("S3", *parameters, readonly=True) as peer:
            yield Far(f"s3://images/{image.name}", peer)


@contextlib.contextmanager
def _ssh(image: Path) -> Iterator[Far]:
    with ssh_server() as server:
        parameters = ["host=127.0.0.1", f"port={server.port}", f"path={image}"]
        parameters += [f"identity={server.client / 'id_ed25519'}"]
        parameters += [f"known-hosts={server.client / 'known_hosts'}"]
        with nbdkit("ssh", *parameters, readonly=True) as peer:
            yield Far(server.uri(image), peer, server.prefix)


@dataclass(frozen=True)
class Server:
    """How to start one that serves an image, of what size, and the seconds that it is left alone
    before each run."""

    start: Callable[[Path], AbstractContextManager[Far]]
    size: int = SIZE
    rest: float = 0.0


SERVERS = {
    "5 ms": Server(lambda image: _nbd("file", image, "rdelay=5ms", filters=["delay"])),
    "0.2 and 25 ms": Server(lambda image: _uneven(image, "tiers=0.0002,0.025")),
    "20 to 120 ms": Server(lambda image: _uneven(image, "random=0.02,0.12")),
    "5 ms, 200 Mbit/s": Server(
        lambda image: _nbd("file", image, "rdelay=5ms", "rate=200M", filters=["delay", "rate"]),
        rest=BUCKET_SECONDS,
    ),
    "nginx, HTTPS": Server(_https),
    "S3": Server(_s3, SLOW_SIZE),
    "sshd": Server(_ssh),
}


def _copy(uri: str) -> float:
    with memory_directory() as directory:
        began = time.monotonic()
        subprocess.run([binary("NBDCOPY"), uri, str(directory / "copy.raw")], check=True)
        return time.monotonic() - began


def _p95(latencies: Sequence[float]) -> float:
    return sorted(latencies)[int(len(latencies) * 0.95)] if latencies else 0.0


def _stream(far: Far, kind: Guest | None, limit: float) -> Sample:
    """From resuming the job to its end, or to ``limit``; the guest is alone for a while first."""
    with memory_directory() as directory, contextlib.ExitStack() as stack:
        options = ("--stream", "paused", *NO_PROFILE)
        peer = stack.enter_context(
            nbdstream_serve(directory / "leaf.raw", far.uri, *options, prefix=far.prefix)
        )
        assert peer.control
        qmp = stack.enter_context(Qmp(peer.control, timeout=600))
        idle = 0
        if kind is not None:
            stack.enter_context(kind.at_work(peer.uri))
            time.sleep(IDLE_SECONDS)
            idle = len(kind.latencies)
        (job,) = qmp.execute("query-block-jobs")
        began = time.monotonic()
        qmp.execute("block-job-resume", device=job["device"])
        while qmp.execute("query-block-jobs") and time.monotonic() - began < limit:
            time.sleep(0.02)
        taken = min(time.monotonic() - began, limit)
        if kind is None:
            return Sample(taken, 0.0, 0.0)
        return Sample(taken, _p95(kind.latencies[:idle]), _p95(kind.latencies[idle:]))


def run(options: Options) -> Report:
    columns = ["server", "nbdcopy s"]
    for guest in GUESTS:
        columns += [f"{guest}, / nbdcopy"] + (["p95 / idle"] if guest != "alone" else [])
    report = Report("Streaming from servers that have no one round trip", columns)
    worst: tuple[float, str] = (0.0, "")
    for name, server in SERVERS.items():
        copies: list[float] = []
        taken: dict[str, list[Sample]] = {guest: [] for guest in GUESTS}
        with memory_directory() as directory:
            image = directory / "far.raw"
            make_image(image, server.size, sparse=False)
            with server.start(image) as far:
                report.add_peer(far.nbd, directory)
                for _ in range(options.rounds):
                    time.sleep(server.rest)
                    copies.append(_copy(far.nbd.uri))
                    progress(name, f"nbdcopy {copies[-1]:.2f} s")
                    for guest, kind in GUESTS.items():
                        time.sleep(server.rest)
                        taken[guest].append(_stream(far, kind(server.size), LIMIT * copies[-1]))
                        progress(name, guest, taken[guest][-1])
        copy = median(copies) or 1.0
        row: list[Cell] = [name, copy]
        for guest, samples in taken.items():
            value = (median(sample.taken for sample in samples) or 0.0) / copy
            worst = max(worst, (value, f"{name}, {guest}"))
            alone = guest == "alone"
            row.append(judged(value, most=1.15 if alone else 1.5))
            if not alone:
                idle, beside = zip(*[sample[1:] for sample in samples], strict=True)
                row.append(judged(ratio(median(beside), median(idle)), most=1.5))
        report.rows.append(row)
    report.notes.append(f"Worst: {worst[1]}, {worst[0]:.2f} times nbdcopy.")
    return report
