# SPDX-License-Identifier: Apache-2.0
"""The far side of the streaming benchmarks, and QEMU's way to stream from it.

The backing export is nbdkit with a raw file or a generated pattern, behind an emulated
link on unix sockets. QEMU's leaf is a qcow2 overlay in its storage daemon, exported over
NBD above a `copy-on-read` filter, with a `block-stream` job on demand: what QEMU users
have today.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testbed.link.control import LinkProcess, link_process
from testbed.link.model import Shape
from testbed.peers import Peer, Qmp, nbdkit, qemu_storage_daemon, temporary_directory, unix_uri

BACKING_THREADS = 16
# More than a handshake: bulk data has begun to come.
BULK_BYTES = 64 * 1024
PATIENCE = 60.0
MEMORY = Path("/dev/shm")


@contextlib.contextmanager
def memory_directory() -> Iterator[Path]:
    """A temporary directory in memory where there is such a thing, for leaves and copies: no
    disk sets the pace, and durable writes cost nothing.
    """
    with tempfile.TemporaryDirectory(
        prefix="nbds-", dir=MEMORY if MEMORY.is_dir() else None
    ) as name:
        yield Path(name)


@dataclass
class Far:
    """A backing export and the link to it; `uri` leads through the link."""

    server: Peer
    link: LinkProcess

    @property
    def uri(self) -> str:
        return self.link.uri()

    @property
    def socket(self) -> Path:
        return Path(self.link.address.path)

    def received(self) -> int:
        """Bytes that have come over the link."""
        return int(self.link.stats()["down"]["bytes"])

    def wait_bulk(self, since: int) -> float:
        """When (monotonic seconds) bulk data began to come after `since` bytes had.

        Raises TimeoutError.
        """
        start = time.monotonic()
        while self.received() - since < BULK_BYTES:
            if time.monotonic() - start > PATIENCE:
                raise TimeoutError("no data came over the link")
            time.sleep(0.001)
        return time.monotonic()


@contextlib.contextmanager
def far_backing(shape: Shape, *plugin: str | Path) -> Iterator[Far]:
    """An nbdkit plugin with its parameters, far away."""
    with temporary_directory() as directory:
        with nbdkit(*plugin, threads=BACKING_THREADS, readonly=True) as server:
            address = f"unix:{directory}/link"
            with link_process(address, f"unix:{server.socket}", shape) as link:
                yield Far(server, link)


@dataclass
class QemuLeaf:
    """A qcow2 overlay over a far backing, in QEMU's storage daemon."""

    peer: Peer
    qmp: Qmp

    @property
    def uri(self) -> str:
        return unix_uri(self.peer.socket)

    def stream(self) -> None:
        self.qmp.execute("block-stream", job_id="stream", device="leaf")

    def streamed(self) -> int | None:
        """The job's offset; None when it has ended."""
        jobs = self.qmp.execute("query-block-jobs")
        return int(jobs[0]["offset"]) if jobs else None


@contextlib.contextmanager
def qemu_leaf(image: Path, backing_socket: Path) -> Iterator[QemuLeaf]:
    """Open the overlay `image` over the export on `backing_socket`, and export it."""
    with qemu_storage_daemon() as peer:
        assert peer.control
        with Qmp(peer.control) as qmp:
            qmp.execute(
                "blockdev-add",
                node_name="backing",
                driver="nbd",
                read_only=True,
                server={"type": "unix", "path": str(backing_socket)},
            )
            qmp.execute(
                "blockdev-add",
                node_name="leaf",
                driver="qcow2",
                file={"driver": "file", "filename": str(image)},
                backing="backing",
            )
            qmp.execute("blockdev-add", node_name="top", driver="copy-on-read", file="leaf")
            address = {"type": "unix", "data": {"path": str(peer.socket)}}
            qmp.execute("nbd-server-start", addr=address)
            qmp.execute(
                "block-export-add", type="nbd", id="leaf", node_name="top", name="", writable=True
            )
            yield QemuLeaf(peer, qmp)
