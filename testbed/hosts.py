# SPDX-License-Identifier: Apache-2.0
"""A host with an image store, and the far end of an image: an nbdkit that logs what is read."""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbd

from testbed.link.control import link_process
from testbed.link.model import Shape
from testbed.peers import (
    Peer,
    binary,
    make_image,
    nbdkit,
    nbdstream_serve,
    run,
    temporary_directory,
)


def image(*args: str | Path) -> str:
    """`nbdstream image ARGS`. Raises PeerError with its words if it fails."""
    return run([binary("NBDSTREAM"), "image", *args])


@dataclass
class Host:
    """A store, a place for leaves, and the far end, whose reads nbdkit logs."""

    store: Path
    leaves: Path
    source: Path
    far: Peer
    uri: str
    log: Path
    exits: contextlib.ExitStack
    serve_far: Callable[[Path], contextlib.AbstractContextManager[Peer]]

    def images(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(image("ls", "--store", self.store, "--json"))
        return found

    def the_image(self) -> dict[str, Any]:
        (found,) = self.images()
        return found

    def forget_answers(self) -> None:
        """Have the far end asked again what the URI leads to."""
        for path in (self.store / "names").iterdir():
            path.unlink()

    def fetched(self) -> list[tuple[int, int]]:
        """What the far end was asked to read, in order of time."""
        reads = re.findall(
            r"\bRead .*?offset=0x([0-9a-f]+) count=0x([0-9a-f]+)", self.log.read_text()
        )
        return [(int(offset, 16), int(count, 16)) for offset, count in reads]

    @contextlib.contextmanager
    def guest(self, name: str, *args: str, **options: Any) -> Iterator[Peer]:
        """A guest's server with a leaf of this name."""
        leaf = self.leaves / name
        with nbdstream_serve(leaf, self.uri, f"--store={self.store}", *args, **options) as server:
            yield server

    def processes(self) -> set[int]:
        """The pids of images' processes."""
        return image_processes(self.store)

    def wait_for_process(self, other_than: set[int]) -> int:
        """The pid of an image's process that is none of these, as soon as there is one."""
        wait_until(lambda: self.processes() - other_than, "an image's process")
        return min(self.processes() - other_than)

    def wait_for_bytes(self, count: int) -> None:
        """Return when the far end was asked for so many bytes in all."""
        wait_until(
            lambda: sum(length for _, length in self.fetched()) >= count, "reads of the far end"
        )

    def wait_for_read(self, offset: int, after: int) -> None:
        """Return when the far end was asked for this offset, in a read after so many others."""
        wait_until(
            lambda: any(begin == offset for begin, _ in self.fetched()[after:]),
            f"read of the far end at {offset}",
        )

    def kill_process(self) -> None:
        """End the processes of all images, as a crash would."""
        end_images(self.store)

    def restart_far(self) -> None:
        """Serve what `source` is now, at the same address."""
        self.far.kill()
        self.far = self.exits.enter_context(self.serve_far(self.far.socket))


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait for what no event tells of. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} in {seconds} s")
        time.sleep(0.01)


def image_processes(store: Path) -> set[int]:
    """The pids of the processes of a store's images."""
    return {
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _serves_an_image(entry, str(store).encode())
    }


def end_images(store: Path) -> None:
    """End these processes, as a crash would."""
    for pid in image_processes(store):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not image_processes(store), "the end of the images' processes")


def _serves_an_image(entry: Path, store: bytes) -> bool:
    """Whether a process of /proc serves an image, and has left the one that started it."""
    try:
        words = (entry / "cmdline").read_bytes().split(b"\0")
        parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return False
    return parent == 1 and {b"image", b"serve", store} <= set(words)


@contextlib.contextmanager
def store_host(
    source: Path, directory: Path, *args: str, shape: Shape | None = None, threads: int = 1
) -> Iterator[Host]:
    """A host without images, whose leaves are in `directory`, and nbdkit with `source`, behind a
    link of this shape if there is one; `args` and `threads` are nbdkit's.

    With one thread for a connection clients may be killed: nbdkit 1.32 may abort when one dies
    while several threads answer it ("raw_send_socket: Assertion `sock >= 0' failed").
    """
    log = directory / "far.log"

    def serve_far(socket_path: Path | None = None) -> contextlib.AbstractContextManager[Peer]:
        plugin = ["file", str(source), f"logfile={log}", "logappend=true", *args]
        return nbdkit(
            *plugin, filters=["log"], threads=threads, readonly=True, socket_path=socket_path
        )

    with temporary_directory() as short, contextlib.ExitStack() as exits:
        far = exits.enter_context(serve_far())
        uri = far.uri
        if shape is not None:
            link = link_process(f"unix:{short}/link", f"unix:{far.socket}", shape)
            uri = exits.enter_context(link).uri()
        place = Host(short / "s", directory, source, far, uri, log, exits, serve_far)
        (place.store / "images").mkdir(parents=True)
        try:
            yield place
        finally:
            place.kill_process()


@contextlib.contextmanager
def host_of_random_data(directory: Path, size: int) -> Iterator[Host]:
    """`store_host` with a source of so many bytes, none of them a hole."""
    source = directory / "source"
    make_image(source, size, sparse=False)
    with store_host(source, directory) as host:
        yield host


@contextlib.contextmanager
def client(uri: str) -> Iterator[nbd.NBD]:
    """A libnbd client."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    yield handle
    handle.shutdown()
