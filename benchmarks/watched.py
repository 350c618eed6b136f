# SPDX-License-Identifier: Apache-2.0
"""Local data of a disk that is watched: what metrics, `watch` and two QMP clients cost.

Two servers of leaves that are local in their first half, whose jobs are paused. One is left alone.
The other one is scraped once a second, shown by `nbdstream watch` on a terminal, and asked for
statistics and jobs by two clients, each twice a second. On a machine with two
cores, which fio and the server keep busy, the ratio has the watchers' own processor time in it.
"""

import fcntl
import os
import pty
import socket
import struct
import subprocess
import termios
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.load import NO_PROFILE, fio, fio_command
from benchmarks.report import Options, Report, judged, median, progress, ratio
from testbed.peers import (
    Peer,
    Qmp,
    binary,
    make_image,
    nbdkit,
    nbdstream_serve,
    temporary_directory,
)

IMAGE_SIZE = 256 << 20
LOCAL = 128 << 20
LOADS = {
    "4k randread qd16 IOPS": ("randread", "4k", 16),
    "4k randwrite qd16 IOPS": ("randwrite", "4k", 16),
}
TARGET = 0.95


def run(options: Options) -> Report:
    report = Report("Local data of a disk that is watched", ["server", *LOADS])
    samples: dict[tuple[str, str], list[float]] = {}
    size = f"--size={LOCAL}"
    with temporary_directory() as directory, ExitStack() as stack:
        servers = _servers(directory, stack)
        for peer in servers.values():
            report.add_peer(peer, directory)
        for load, (rw, block, depth) in LOADS.items():
            report.add_recipe(fio_command("URI", rw, block, depth, "--time_based", size))
            for _ in range(options.rounds):
                for name, peer in servers.items():
                    progress(load, name)
                    with ExitStack() as watchers:
                        if name == "watched":
                            watchers.enter_context(_watching(peer))
                        result = fio(peer.uri, rw, block, depth, options.seconds, size)
                    samples.setdefault((name, load), []).append(result.iops)
    medians = {key: median(values) for key, values in samples.items()}
    for name in servers:
        report.rows.append([name, *(medians[name, load] for load in LOADS)])
    values = [ratio(medians["watched", load], medians["alone", load]) for load in LOADS]
    report.ratios.append(["watched / alone", *(judged(value, least=TARGET) for value in values)])
    return report


def _servers(directory: Path, stack: ExitStack) -> dict[str, Peer]:
    make_image(directory / "far.raw", IMAGE_SIZE, sparse=False)
    far = stack.enter_context(nbdkit("file", directory / "far.raw", readonly=True))
    servers = {}
    for name in ("alone", "watched"):
        arguments = ["--stream", "paused", *NO_PROFILE]
        if name == "watched":
            arguments += ["--metrics", f"127.0.0.1:{_free_port()}"]
        leaf = directory / f"{name}.raw"
        peer = stack.enter_context(nbdstream_serve(leaf, far.uri, *arguments, export="disk0"))
        assert peer.control is not None
        with Qmp(peer.control, timeout=120) as qmp:
            qmp.execute("x-nbdstream-stream", device="disk0", offset=0, length=LOCAL)
        servers[name] = peer
    return servers


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def _watching(peer: Peer) -> Iterator[None]:
    """A scraper, `watch` on a terminal, and two QMP clients, for the length of the block."""
    assert peer.control is not None
    url = f"http://{peer.command[peer.command.index('--metrics') + 1]}/metrics"
    end = threading.Event()

    def scrape() -> None:
        with urllib.request.urlopen(url, timeout=30) as response:
            response.read()

    def ask(qmp: Qmp) -> Callable[[], None]:
        def work() -> None:
            qmp.execute("x-nbdstream-stats")
            qmp.execute("query-block-jobs")

        return work

    def repeat(work: Callable[[], None], interval: float) -> None:
        while not end.wait(interval):
            work()

    with ExitStack() as stack:
        stack.enter_context(_screen(peer.control))
        clients = [stack.enter_context(Qmp(peer.control)) for _ in range(2)]
        tasks = [(scrape, 1.0), *((ask(each), 0.5) for each in clients)]
        threads = [threading.Thread(target=repeat, args=task) for task in tasks]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            end.set()
            for thread in threads:
                thread.join()


@contextmanager
def _screen(control: Path) -> Iterator[None]:
    """`nbdstream watch` on a terminal of 80 columns and 24 lines, once it has drawn the disk."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [binary("NBDSTREAM"), "watch", str(control)]
    environment = os.environ | {"TERM": "xterm-256color", "LANG": "C.UTF-8"}
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    drawn = threading.Event()

    def read() -> None:
        try:
            while data := os.read(master, 1 << 16):
                if "░".encode() in data:
                    drawn.set()
        except OSError:
            pass  # EIO: it has ended

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert drawn.wait(30), "watch has drawn nothing"
        yield
    finally:
        process.terminate()
        process.wait()
        reader.join()
        os.close(master)
