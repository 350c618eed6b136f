# SPDX-License-Identifier: Apache-2.0
"""Hosts of a fleet: each with an image store, and with guests' servers on the store."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdstream.store.layout import Store
from nbdstream.store.upkeep import all_facts
from testbed.fleet.network import Machine
from testbed.hosts import end_images
from testbed.peers import Peer, nbdstream_serve

IMAGE = "golden.raw"
URL = f"http://images.rack/images/{IMAGE}"


@dataclass(frozen=True)
class StoreHost:
    """``directory`` has the store and the leaves; its path is short."""

    machine: Machine
    directory: Path

    @property
    def store(self) -> Path:
        return self.directory / "s"

    @contextlib.contextmanager
    def guest(self, name: str, *args: str) -> Iterator[Peer]:
        """A guest's server, on the image that the rack's cache has."""
        leaf, prefix = self.directory / name, self.machine.enter()
        opening = nbdstream_serve(leaf, URL, f"--store={self.store}", *args, prefix=prefix)
        with opening as server:
            yield server

    def local(self) -> float:
        """The part of its image that is local, as far as is durable."""
        found = all_facts(Store(self.store))
        return found[0].local / found[0].image.record.size if found else 0.0


@contextlib.contextmanager
def store_host(machine: Machine, directory: Path) -> Iterator[StoreHost]:
    """A host with an empty store; its images' processes end with the block."""
    (directory / machine.name).mkdir()
    host = StoreHost(machine, directory / machine.name)
    (host.store / "images").mkdir(mode=0o700, parents=True)
    host.store.chmod(0o700)
    try:
        yield host
    finally:
        end_images(host.store)
