# SPDX-License-Identifier: Apache-2.0
"""How long from the command until an NBD client has its first answer?

Each server is started as a process of its own. A client connects to its Unix socket as soon as
there is one, and the clock stops when the server's greeting has arrived: nbdstream listens early,
but greets only when it knows what it serves. All images are in the page cache, and the far end
answers at once, so this is what the servers themselves take.

`--seconds` means nothing here.
"""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.report import Options, Report, judged, median, progress, ratio
from testbed.peers import (
    PeerError,
    binary,
    make_image,
    make_qcow2,
    nbdkit,
    temporary_directory,
)

IMAGE_SIZE = 64 << 20
TRIES = 5
GIVE_UP = 20.0
GREETING = b"NBDMAGIC"
MOST_SECONDS = 0.25


@dataclass(frozen=True)
class Start:
    """A command that serves on the socket `SOCKET`; ``made`` are files that it makes, removed
    before each start."""

    command: list[str]
    made: list[Path] = field(default_factory=list)


def seconds_to_greeting(start: Start, directory: Path) -> float:
    """Start a server, wait for its greeting, stop it. Raises PeerError."""
    path = directory / "nbd"
    for made in [path, *start.made]:
        made.unlink(missing_ok=True)
    command = [word.replace("SOCKET", str(path)) for word in start.command]
    with (directory / "stderr").open("wb") as stderr:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr
        )
    try:
        with _connected(process, path, began + GIVE_UP) as client:
            greeting = client.recv(len(GREETING), socket.MSG_WAITALL)
        took = time.perf_counter() - began
        if greeting != GREETING:
            raise PeerError(f"{command}: no greeting: {(directory / 'stderr').read_text()}")
        return took
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _connected(
    process: subprocess.Popen[bytes], path: Path, deadline: float
) -> Iterator[socket.socket]:
    """A client's socket, as soon as there is somewhere to connect to. Raises PeerError."""
    while True:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(GIVE_UP)
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            client.close()
            if process.poll() is not None or time.perf_counter() > deadline:
                raise PeerError(f"{process.args!r} does not listen") from None
            time.sleep(0.0005)
            continue
        with client:
            yield client
        return


def _starts(directory: Path, far_uri: str) -> dict[str, Start]:
    ours, far = binary("NBDSTREAM"), directory / "far.raw"
    local, leaf, overlay = (directory / name for name in ("local.raw", "leaf.qcow2", "over.qcow2"))
    shutil.copyfile(far, local)
    make_qcow2(overlay, backing=far_uri)
    qemu = [binary("QEMU_NBD"), "--persistent", "--socket", "SOCKET"]
    return {
        "nbdkit file": Start([binary("NBDKIT"), "-f", "-U", "SOCKET", "file", str(local)]),
        "qemu-nbd raw": Start([*qemu, "-f", "raw", str(local)]),
        "qemu-nbd qcow2 over NBD": Start([*qemu, "-f", "qcow2", str(overlay)]),
        "nbdstream raw": Start([ours, "serve", str(local), "-U", "SOCKET"]),
        "nbdstream new leaf over NBD": Start(
            [ours, "serve", str(leaf), "-b", far_uri, "-U", "SOCKET"], [leaf]
        ),
        "nbdstream new leaf over a file": Start(
            [ours, "serve", str(leaf), "-b", str(far), "-U", "SOCKET"], [leaf]
        ),
    }


RATIOS = (
    ("nbdstream raw", "nbdkit file"),
    ("nbdstream raw", "qemu-nbd raw"),
    ("nbdstream new leaf over NBD", "qemu-nbd qcow2 over NBD"),
    ("nbdstream new leaf over a file", "qemu-nbd qcow2 over NBD"),
)


def run(options: Options) -> Report:
    """Measure each server in alternating rounds of `TRIES` starts."""
    report = Report("From the command to a client's first answer", ["server", "seconds"])
    samples: dict[str, list[float]] = {}
    with temporary_directory() as directory:
        make_image(directory / "far.raw", IMAGE_SIZE, sparse=False)
        with nbdkit("file", directory / "far.raw", readonly=True) as far:
            starts = _starts(directory, far.uri)
            for number in range(options.rounds * TRIES):
                progress("round", number + 1)
                for name, start in starts.items():
                    took = seconds_to_greeting(start, directory)
                    samples.setdefault(name, []).append(took)
            for start in starts.values():
                report.add_recipe(start.command, directory, far.directory)
    medians = {name: median(found) for name, found in samples.items()}
    for name, seconds in medians.items():
        ours = name.startswith("nbdstream")
        report.rows.append([name, judged(seconds, most=MOST_SECONDS) if ours else seconds])
    for a, b in RATIOS:
        report.ratios.append([f"{a} / {b}", ratio(medians[a], medians[b])])
    return report
