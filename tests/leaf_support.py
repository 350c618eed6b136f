# SPDX-License-Identifier: Apache-2.0
"""What tests of leaf formats share: kinds of images, and driving a leaf as the disk does."""

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from nbdstream.extents import align_down, align_up
from nbdstream.leaf import create_leaf, open_leaf
from nbdstream.leaf.base import (
    ALL_ZERO,
    SCATTERED,
    BackingReference,
    Leaf,
    LeafExtent,
    State,
    read_exactly,
)
from nbdstream.leaf.qcow2 import create
from testbed.leaves import drive
from testbed.peers import binary

T = TypeVar("T")

SECTOR = 512
BACKING = BackingReference("nbd://localhost:10809/disk", "raw", 0, "sha256:0123456789abcdef")


@dataclass(frozen=True)
class ImageKind:
    """A way to make an image: a format with its settings.

    ``make`` creates the image at a path, of a size in bytes, with a backing or none.
    ``size_unit``: disk sizes are multiples of it. ``size_most``: no larger disk can be
    made, or its tables would take too long.
    """

    name: str
    format: str
    make: Callable[[Path, int, BackingReference | None], None]
    size_unit: int = 512
    size_most: int = 8 << 40

    def __str__(self) -> str:
        return self.name

    def new(self, path: Path, size: int, backing: BackingReference | None = BACKING) -> Leaf:
        """Make an image and open it."""
        self.make(path, size, backing)
        return self.open(path)

    def open(self, path: Path, *, read_only: bool = False) -> Leaf:
        return open_leaf(str(path), read_only=read_only, format=self.format)


def ours(
    format_name: str,
    cluster_size: int | None = None,
    *,
    size_unit: int = 512,
    size_most: int = 8 << 40,
) -> ImageKind:
    """Images as ``nbdstream create`` makes them."""

    def make(path: Path, size: int, backing: BackingReference | None) -> None:
        create_leaf(
            str(path), format=format_name, size=size, cluster_size=cluster_size, backing=backing
        )

    suffix = "" if cluster_size is None else f"-{cluster_size}"
    return ImageKind(f"{format_name}{suffix}", format_name, make, size_unit, size_most)


def by_qemu(format_name: str, options: str, *, size_most: int = 8 << 40) -> ImageKind:
    """Images as ``qemu-img create -o OPTIONS`` makes them."""

    def make(path: Path, size: int, backing: BackingReference | None) -> None:
        command = [binary("QEMU_IMG"), "create", "-q", "-f", format_name, "-o", options]
        if backing is not None:
            command += ["-u", "-b", backing.uri, "-F", backing.format]
        subprocess.run([*command, str(path), str(size)], check=True, capture_output=True)

    name = f"qemu-{format_name}-{options}"
    return ImageKind(name, format_name, make, size_most=size_most)


# -- driving a leaf -------------------------------------------------------------------------


def write(leaf: Leaf, offset: int, data: bytes) -> None:
    drive(leaf, lambda: leaf.write(offset, memoryview(data)))


def zero(leaf: Leaf, offset: int, length: int, *, unmap: bool = True) -> None:
    drive(leaf, lambda: leaf.zero(offset, length, unmap=unmap))


def extents(leaf: Leaf, offset: int = 0, length: int | None = None) -> list[LeafExtent]:
    """The extents of a range, after checking that they tile it."""
    size = leaf.size - offset if length is None else length
    found = drive(leaf, lambda: list(leaf.extents(offset, size)))
    position = offset
    for extent in found:
        assert extent.offset == position and extent.length > 0, found
        position = extent.end
    assert position == offset + size, found
    return found


def read(leaf: Leaf, offset: int, length: int, backing: bytes) -> bytes:
    """What a guest sees, with ``backing`` (as long as it likes) below the leaf."""
    result = bytearray(length)
    view = memoryview(result)
    for extent in extents(leaf, offset, length):
        part = view[extent.offset - offset : extent.end - offset]
        if extent.state is State.UNALLOCATED:
            below = backing[extent.offset : extent.end]
            part[:] = below.ljust(extent.length, b"\0")
        elif extent.state is not State.ZERO:
            leaf.read(extent, part)
    return bytes(result)


def guest_write(leaf: Leaf, offset: int, data: bytes, backing: bytes) -> None:
    """A guest's write of any alignment: what must be DATA first is made so."""
    for extent in extents(leaf, *_whole_clusters(leaf, offset, len(data))):
        if extent.state is State.COMPRESSED:
            start, length = _whole_clusters(leaf, extent.offset, 1)
            write(leaf, start, read(leaf, start, length, backing))
    end = offset + len(data)
    for edge in {align_down(offset, leaf.block_size), align_down(end, leaf.block_size)}:
        length = min(leaf.block_size, leaf.size - edge)
        if edge >= end or (offset <= edge and edge + length <= end):
            continue
        if any(extent.state is not State.DATA for extent in extents(leaf, edge, length)):
            write(leaf, edge, read(leaf, edge, length, backing))
    write(leaf, offset, data)


def _whole_clusters(leaf: Leaf, offset: int, length: int) -> tuple[int, int]:
    start = align_down(offset, leaf.cluster_size)
    end = min(align_up(offset + length, leaf.cluster_size), leaf.size)
    return start, end - start


def check_locate(leaf: Leaf, offset: int, length: int, backing: bytes) -> None:
    """`Leaf.locate` must agree with what `read` and `extents` say."""
    host = leaf.locate(offset, length)
    if host == SCATTERED:
        return
    content = read(leaf, offset, length, backing)
    assert all(e.state in (State.DATA, State.ZERO) for e in extents(leaf, offset, length))
    if host == ALL_ZERO:
        assert not any(content)
    else:
        view = memoryview(bytearray(length))
        read_exactly(leaf.fd, view, host)
        assert view == content


def qemu_check(path: Path, format_name: str) -> dict[str, object]:
    """``qemu-img check``'s report; fails the test unless it found nothing at all.

    A format that qemu-img cannot check (raw) passes.
    """
    if format_name == "raw":
        return {}
    status, report = qemu_check_report(path, format_name)
    assert status == 0, (status, report)
    return report


def qemu_check_report(path: Path, format_name: str) -> tuple[int, dict[str, Any]]:
    """The exit status of ``qemu-img check``, and its report, whatever it found."""
    # Without the backing, which is not there (and is not what is checked).
    options = {
        "driver": format_name,
        "backing": None,
        "file": {"driver": "file", "filename": str(path)},
    }
    done = subprocess.run(
        [binary("QEMU_IMG"), "check", "--output=json", f"json:{json.dumps(options)}"],
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert isinstance(report, dict)
    return done.returncode, report


def pattern(offset: int, length: int, tag: int = 0) -> bytes:
    """Bytes that tell where they belong: each sector repeats its tag and its number."""
    assert offset % SECTOR == 0
    sectors = range(offset // SECTOR, -(-(offset + length) // SECTOR))
    return b"".join(sector_content(tag, sector) for sector in sectors)[:length]


def sector_content(tag: int, sector: int) -> bytes:
    """512 bytes that no other (tag, sector) has, and that are not zeroes."""
    return (tag << 32 | sector | 1 << 63).to_bytes(8, "little") * (SECTOR // 8)


@contextmanager
def cold_page_cache() -> Iterator[set[tuple[int, int]]]:
    """Reads that must not wait find each piece of a file out of the page cache, once.

    Yields what was asked for so far: (descriptor, offset).
    """
    real = os.preadv
    asked: set[tuple[int, int]] = set()

    def preadv(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT and (fd, offset) not in asked:
            asked.add((fd, offset))
            raise BlockingIOError(errno.EAGAIN, "cold")
        return real(fd, buffers, offset, flags)

    with mock.patch.object(os, "preadv", preadv):
        yield asked


@contextmanager
def full_disk() -> Iterator[None]:
    """Nothing can be written."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    with mock.patch.object(os, "pwrite", full), mock.patch.object(os, "pwritev", full):
        yield


def plain(cluster_size: int) -> ImageKind:
    """Images of ours without extended L2 entries."""

    def make(path: Path, size: int, backing: BackingReference | None) -> None:
        create(str(path), size=size, cluster_size=cluster_size, backing=backing, extended_l2=False)

    return ImageKind(f"qcow2-plain-{cluster_size}", "qcow2", make)
