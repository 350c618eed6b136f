# SPDX-License-Identifier: Apache-2.0
"""Compares what is local of an image with its source.

Nothing is locked and nothing is changed, so it can run while guests use the image: what was
durable when it began is compared, and that never changes.
"""

import os
from dataclasses import dataclass, field

import trio

from nbdstream.backing import open_backing
from nbdstream.backing.base import Backing, Grant, Priority
from nbdstream.leaf import MAP_SUFFIX
from nbdstream.leaf.raw.map import local_runs
from nbdstream.store.layout import Image
from nbdstream.tasks import in_worker

# Seconds that the source may be out of reach.
SOURCE_TIMEOUT = 30.0
# Ranges that are named.
DIFFERENCES_MOST = 16


@dataclass
class Comparison:
    """``compared`` and ``differing`` in bytes; ``ranges``: the first (offset, length) of pieces
    in which something differs."""

    compared: int = 0
    differing: int = 0
    ranges: list[tuple[int, int]] = field(default_factory=list)


async def verify(image: Image, uri: str) -> Comparison:
    """Read all that is local of an image from its source once more, and compare; ``uri`` is the
    source, with secrets.

    Raises:
        BackingMismatchError: the source serves another image now.
        BackingError: it cannot be read.
        LeafFormatError, OSError: the image cannot.
    """
    record, found = image.record, Comparison()

    def runs() -> list[tuple[int, int]]:
        try:
            return local_runs(f"{image.leaf}{MAP_SUFFIX}")
        except FileNotFoundError:
            return [(0, record.size)]

    opening = open_backing(uri, timeout=SOURCE_TIMEOUT, size=record.size, identity=record.identity)
    async with opening as backing:
        local = await in_worker(runs)
        fd = await in_worker(os.open, image.leaf, os.O_RDONLY | os.O_CLOEXEC)
        try:
            async with trio.open_nursery() as pieces:
                for start, end in local:
                    offset = start
                    while offset < end:
                        grant = await backing.wait_for_room(Priority.STREAM)
                        length = min(grant.length, end - offset)
                        pieces.start_soon(_compare, backing, fd, offset, length, grant, found)
                        offset += length
        finally:
            os.close(fd)
    found.ranges.sort()
    return found


async def _compare(
    backing: Backing, fd: int, offset: int, length: int, grant: Grant, found: Comparison
) -> None:
    """Compare one piece, for which there is room."""
    data = bytearray(length)
    await backing.read(memoryview(data), offset, Priority.STREAM, grant)
    if await in_worker(os.pread, fd, length, offset) != data:
        found.differing += length
        if len(found.ranges) < DIFFERENCES_MOST:
            found.ranges.append((offset, length))
    found.compared += length
