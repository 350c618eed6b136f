# SPDX-License-Identifier: Apache-2.0
"""A host with an image store, and the far end of an image: an nbdkit that logs what is read."""

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbd

from testbed.peers import Peer, binary, nbdkit, nbdstream_serve, run, temporary_directory


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
    log: Path

    @property
    def uri(self) -> str:
        return self.far.uri

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

    def process(self) -> int:
        """The pid of the image's process."""
        control = self.the_image()["control"]
        (pid,) = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and _serves(entry, control)
        ]
        return pid


def _serves(entry: Path, control: str) -> bool:
    try:
        words = (entry / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    image_id = Path(control).parent.name.encode()
    return b"serve" in words and image_id in words and b"--detach" in words


@contextlib.contextmanager
def store_host(source: Path, directory: Path, *args: str) -> Iterator[Host]:
    """A host without images, whose leaves are in `directory`, and nbdkit with `source`; `args` are
    nbdkit's.
    """
    log = directory / "far.log"
    with temporary_directory() as short:
        with nbdkit("file", source, f"logfile={log}", *args, filters=["log"], readonly=True) as far:
            place = Host(short / "s", directory, source, far, log)
            try:
                yield place
            finally:
                for found in place.images():
                    if found["served"]:
                        os.kill(place.process(), signal.SIGKILL)


@contextlib.contextmanager
def client(uri: str) -> Iterator[nbd.NBD]:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    yield handle
    handle.shutdown()
