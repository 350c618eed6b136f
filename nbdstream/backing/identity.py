# SPDX-License-Identifier: Apache-2.0
"""What tells one backing image from another: a hash of its size and of samples.

A leaf records the fingerprint of the backing that it was made for and refuses any
other (invariant 6). Reading all of a remote image is out of the question, so blocks are
sampled at places that depend on the size alone: both ends, where boot sectors,
partition tables, superblocks and their backups live, and a comb in between. One round
trip: all samples are read at once.

It guards against mistakes (another image, an image that was replaced), not against
an attacker who makes two images that agree in every sampled block.
"""

import hashlib
from collections.abc import Awaitable, Callable
from functools import partial

from nbdstream.backing.base import Backing, Priority
from nbdstream.extents import align_down
from nbdstream.tasks import together

# Names what is sampled and how it is hashed: any change of either needs a new one.
VERSION = "s1"
END_LENGTH = 64 << 10
COMB_LENGTH = 4 << 10
COMB_TEETH = 16

Read = Callable[[memoryview, int], Awaitable[object]]


def sample_ranges(size: int) -> list[tuple[int, int]]:
    """The (offset, length) of each sample of an image of ``size`` bytes, in order."""
    ends = {(0, min(size, END_LENGTH))}
    if size > END_LENGTH:
        ends.add((max(size - END_LENGTH, END_LENGTH), min(END_LENGTH, size - END_LENGTH)))
    comb = set()
    for tooth in range(1, COMB_TEETH + 1):
        offset = align_down(size * tooth // (COMB_TEETH + 1), COMB_LENGTH)
        if offset >= END_LENGTH and offset + COMB_LENGTH <= size - END_LENGTH:
            comb.add((offset, COMB_LENGTH))
    return sorted(ends | comb)


async def fingerprint(backing: Backing) -> str:
    """The identity of an open backing, such as ``s1:5f0c…``. Raises as `Backing.read` does."""

    async def read(view: memoryview, offset: int) -> None:
        await backing.read(view, offset, Priority.DEMAND)

    return await fingerprint_of(backing.size, read)


async def fingerprint_of(size: int, read: Read) -> str:
    """The identity of an image of ``size`` bytes that ``read(view, offset)`` reads.

    Raises what ``read`` raises; the other samples are cancelled then.
    """
    samples = [(offset, bytearray(length)) for offset, length in sample_ranges(size)]
    await together(*(partial(read, memoryview(data), offset) for offset, data in samples))
    digest = hashlib.sha256(f"{VERSION} {size}\n".encode())
    for _, data in samples:
        digest.update(data)
    return f"{VERSION}:{digest.hexdigest()}"
