# SPDX-License-Identifier: Apache-2.0
"""A small streamed disk in memory, whose backing answers when a test lets it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nbdstream.disk import DetectZeroes, StreamedDisk, open_disk
from nbdstream.export import Hit
from tests.doubles import GatedBacking, MemoryLeaf

SIZE = 64 * 1024 + 300  # the last block is a short one
CONTENT = bytes(1 + i * 7 % 251 for i in range(SIZE))


@asynccontextmanager
async def gated_disk(
    *, copy_on_read: bool = True, detect_zeroes: DetectZeroes = DetectZeroes.OFF
) -> AsyncIterator[tuple[StreamedDisk, MemoryLeaf, GatedBacking]]:
    """A disk of `SIZE` bytes over a backing of `CONTENT`, which waits at its gate."""
    leaf = MemoryLeaf(SIZE)
    backing = GatedBacking(CONTENT, gated=True)
    async with open_disk(
        leaf, backing, copy_on_read=copy_on_read, detect_zeroes=detect_zeroes
    ) as disk:
        yield disk, leaf, backing
    leaf.close()


async def read(disk: StreamedDisk, offset: int, length: int) -> bytes:
    """What a guest reads, at once or after a miss."""
    data = bytearray(length)
    view = memoryview(data)
    hit = disk.read_nowait(view, offset)
    if hit is Hit.MISS:
        await disk.read(view, offset)
    return bytes(data)
