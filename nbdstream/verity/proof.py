# SPDX-License-Identifier: Apache-2.0
"""Proofs of ranges: which tree blocks are missing, and whether what came fits the root hash.

The order of a check: ask the `HashTree` for a `Proof` of a range, read the tree blocks that it
wants, let it check them, then compare the digests with those of the data. A proof keeps the blocks
that were known when it was made, so nothing that happens between these steps takes them away.
Only blocks that fit the root hash are kept.
"""

from collections import OrderedDict
from collections.abc import Mapping

from nbdstream.errors import VerificationError
from nbdstream.verity.layout import BLOCK, Layout
from nbdstream.verity.superblock import Superblock

# How many tree blocks are kept: 16 MiB, which prove 2 GiB of an image hashed with SHA-256.
KEPT_MOST = 4096


class HashTree:
    """A tree as far as it is known. ``name`` is for messages."""

    def __init__(
        self, superblock: Superblock, root: bytes, name: str, kept_most: int = KEPT_MOST
    ) -> None:
        """Raises:
        VerificationError: the root hash is of another algorithm than the tree.
        """
        self.kind = superblock.kind
        self.layout = Layout(superblock.blocks, self.kind.length)
        self.name = name
        self.root = root
        if len(root) != self.kind.length:
            raise VerificationError(
                f"{name}: the hash tree uses {self.kind.algorithm}, and the root hash has "
                f"{8 * len(root)} bits: it is of another tree"
            )
        self._kept_most = kept_most
        self._known: OrderedDict[int, bytes] = OrderedDict()  # used last: last

    def proof(self, first: int, count: int) -> "Proof":
        """What proves ``count`` data blocks from ``first`` on.

        Raises:
            ValueError: the tree does not cover all of them.
        """
        if count <= 0 or first < 0 or first + count > self.layout.blocks:
            raise ValueError(f"blocks {first} to {first + count - 1} of {self.layout.blocks}")
        path = self.layout.path(first, count)
        found = {position: self._get(position) for level in path for position in level}
        known = {position: block for position, block in found.items() if block is not None}
        return Proof(self, first, count, path, known)

    def _get(self, position: int) -> bytes | None:
        block = self._known.get(position)
        if block is not None:
            self._known.move_to_end(position)
        return block

    def keep(self, position: int, block: bytes) -> None:
        """Remember a block that was checked. For `Proof`."""
        self._known[position] = block
        self._known.move_to_end(position)
        while len(self._known) > self._kept_most:
            self._known.popitem(last=False)


class Proof:
    """Made by `HashTree.proof`.

    Attributes:
        wanted: positions of the tree blocks that have to be read, in ascending order: the top of
            the tree first.
    """

    def __init__(
        self,
        tree: HashTree,
        first: int,
        count: int,
        path: list[range],
        known: dict[int, bytes],
    ) -> None:
        self._tree = tree
        self._first = first
        self._count = count
        self._path = path
        self._known = known
        self.wanted = sorted(
            position for level in path for position in level if position not in known
        )

    def settle(self, read: Mapping[int, bytes]) -> list[bytes]:
        """Check the wanted tree blocks, and return the digest of each data block.

        Blocks that are right are kept, also if another one is not.

        Raises:
            VerificationError: a tree block does not fit the root hash.
        """
        expected = [self._tree.root]
        for level in reversed(range(len(self._path))):
            positions = self._path[level]
            for position, digest in zip(positions, expected, strict=True):
                self._check(position, digest, read)
            expected = self._below(level)
        return expected

    def _check(self, position: int, digest: bytes, read: Mapping[int, bytes]) -> None:
        """Take a tree block if it has this digest; those that are known had it."""
        if position in self._known:
            return
        block = read[position]
        if len(block) != BLOCK or self._tree.kind.digests(memoryview(block), BLOCK) != [digest]:
            raise VerificationError(
                f"{self._tree.name}: the hash tree does not fit the root hash at offset "
                f"{position * BLOCK}"
            )
        self._known[position] = block
        self._tree.keep(position, block)

    def _below(self, level: int) -> list[bytes]:
        """The digests of what is needed below a level: of tree blocks, or of the data."""
        layout = self._tree.layout
        positions = self._path[level]
        if level:
            start = self._path[level - 1].start - layout.starts[level - 1]
            count = len(self._path[level - 1])
        else:
            start, count = self._first, self._count
        joined = b"".join(self._known[position] for position in positions)
        skipped = (start - (positions.start - layout.starts[level]) * layout.fan) * layout.digest
        ends = range(skipped, skipped + count * layout.digest, layout.digest)
        return [joined[begin : begin + layout.digest] for begin in ends]
