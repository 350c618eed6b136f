# SPDX-License-Identifier: Apache-2.0
"""Where the hash of each block is in a hash tree.

Level 0 has the digests of the data blocks, each level above it those of the level below. The top
level is one block, and the root hash is its digest. An image of a single block has no levels: the
root hash is the digest of that block.

The levels are stored one after another, the top first. All blocks have `BLOCK` bytes. In front of
them is one block with the superblock. Positions count blocks from the start, the superblock's
included.

Source: "Hash Tree" in the kernel's Documentation/admin-guide/device-mapper/verity.rst.
"""

from dataclasses import dataclass
from functools import cached_property

BLOCK = 4096
_FIRST = 1  # behind the superblock


@dataclass(frozen=True)
class Layout:
    """The tree over ``blocks`` data blocks with digests of ``digest`` bytes (a power of two)."""

    blocks: int
    digest: int

    @property
    def fan(self) -> int:
        """How many digests a block has."""
        return BLOCK // self.digest

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """How many blocks each level has, level 0 first."""
        widths = []
        below = self.blocks
        while below > 1:
            below = -(-below // self.fan)
            widths.append(below)
        return tuple(widths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The position of each level's first block, level 0 first."""
        return tuple(_FIRST + sum(self.widths[level + 1 :]) for level in range(len(self.widths)))

    @property
    def end(self) -> int:
        """The position behind the last block."""
        return _FIRST + sum(self.widths)

    def path(self, first: int, count: int) -> list[range]:
        """Positions of the blocks that prove ``count`` > 0 data blocks from ``first`` on, as one
        range for each level, level 0 first."""
        last = first + count - 1
        ranges = []
        for start in self.starts:
            first //= self.fan
            last //= self.fan
            ranges.append(range(start + first, start + last + 1))
        return ranges
