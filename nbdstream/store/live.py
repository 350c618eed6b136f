# SPDX-License-Identifier: Apache-2.0
"""The live map of an image: what its file has now, for other processes to see.

The image's own map says what is durable, a few seconds late. Guests' servers that read the image's
file themselves want to know at once. So its process also writes a bit for each block of 4 KiB
into a file, as soon as the block is in the page cache. The least significant bit of a byte is the
first.

What is in the page cache outlives the process that wrote it, and does not outlive the kernel. So
the file's name has the kernel's boot ID: after a reboot it is not found, and the next process of
the image deletes it. Bits are never cleared. If a sync fails, the page cache proves nothing any
more: then the file is cut to nothing, and a reader finds no bit in it.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path

from nbdstream.extents import align_up
from nbdstream.leaf import MAP_SUFFIX
from nbdstream.leaf.base import read_range
from nbdstream.leaf.bits import set_bits
from nbdstream.leaf.raw.leaf import RawLeaf
from nbdstream.leaf.raw.map import BLOCK_SHIFT, BLOCK_SIZE, local_runs
from nbdstream.store.layout import Image

log = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PREFIX = "live-"


def live_path(image: Image) -> Path:
    """Where the live map of an image is while this kernel runs. Raises OSError."""
    return image.directory / f"{_PREFIX}{_BOOT_ID.read_text().strip()}"


class LiveMap:
    """The live map, as the image's process writes it; the file is made, and brought up to the
    image's own map, when this is. It is open for as long as the leaf, and longer."""

    def __init__(self, image: Image, leaf: RawLeaf) -> None:
        """``leaf`` is the image's, open for writing. Raises LeafError, OSError."""
        path = live_path(image)
        for other in image.directory.glob(f"{_PREFIX}*"):
            if other != path:
                other.unlink(missing_ok=True)
        self._size = leaf.size
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            length = align_up(leaf.size, 8 * BLOCK_SIZE) // (8 * BLOCK_SIZE)
            # What a predecessor wrote is true still, though its own map lost a part of it.
            self._bits = bytearray(read_range(self._fd, 0, length))
            for start, end in local_runs(f"{leaf.path}{MAP_SUFFIX}"):
                self._set(start, end - start)
            with suppress(OSError):  # a full disk: readers ask the process
                os.pwrite(self._fd, self._bits, 0)
        except BaseException:
            os.close(self._fd)
            raise
        leaf.on_allocated = self.mark
        leaf.on_failed_sync(self.forget)

    def mark(self, offset: int, length: int) -> None:
        """The whole blocks of a range are in the file. A full disk costs the news, no more."""
        start, stop = self._set(offset, length)
        if stop > start:
            with suppress(OSError):
                os.pwrite(self._fd, memoryview(self._bits)[start:stop], start)

    def _set(self, offset: int, length: int) -> tuple[int, int]:
        """Set the bits in memory; the bytes that they are in."""
        end = offset + length
        first = align_up(offset, BLOCK_SIZE) >> BLOCK_SHIFT
        stop = (align_up(end, BLOCK_SIZE) if end == self._size else end) >> BLOCK_SHIFT
        if stop <= first or not self._bits:
            return 0, 0
        set_bits(self._bits, first, stop - first)
        return first >> 3, (stop + 7) >> 3

    def forget(self) -> None:
        """Have no reader rely on the page cache from now on (any thread)."""
        self._bits = bytearray()
        try:
            os.ftruncate(self._fd, 0)
        except OSError as error:
            log.critical("cannot withdraw what was said of the page cache: %s", error)

    def close(self) -> None:
        """The file stays: what it says stays true."""
        os.close(self._fd)
