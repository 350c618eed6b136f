# SPDX-License-Identifier: Apache-2.0
"""A backing of which each block is checked against a root hash before its data is used.

The tree blocks that prove a read are read together with its data. What does not fit is read once
more, because a faulty cache or memory may have been the reason, and is refused then.

Nothing that the image's server says of holes is believed or asked for: the tree says which blocks
are zeroes.
"""

from nbdstream.backing.base import Backing, Grant, Priority
from nbdstream.backing.extentmap import ExtentMap
from nbdstream.backing.wrapped import WrappedBacking
from nbdstream.errors import BackingMismatchError, VerificationError
from nbdstream.extents import BackingExtent, align_down, align_up, clip
from nbdstream.tasks import in_worker, together
from nbdstream.verity import BLOCK, HashTree

# Up to so many blocks are hashed at once, which takes less time than to start a worker.
INLINE_BLOCKS = 16
# Of so many bytes the tree is looked at in one step.
STATUS_MOST = 16 << 20


class VerifiedBacking(WrappedBacking):
    """``backing``, checked with ``tree``, whose blocks are read from ``hashes``.

    A read raises VerificationError, besides what `Backing.read` raises.
    """

    def __init__(self, backing: Backing, tree: HashTree, hashes: Backing) -> None:
        """Raises BackingMismatchError: the tree is of an image of another size."""
        super().__init__(backing)
        covered = tree.layout.blocks * BLOCK
        if backing.size != covered:
            raise BackingMismatchError(
                f"{backing.uri}: has {backing.size} bytes, and the hash tree {tree.name} covers "
                f"{covered}: it is of another image"
            )
        if hashes.size < tree.layout.end * BLOCK:
            raise VerificationError(
                f"{tree.name}: has {hashes.size} bytes, and the hash tree needs "
                f"{tree.layout.end * BLOCK}: it was cut short"
            )
        self.local = None  # unchecked
        self._tree = tree
        self._hashes = hashes
        self._known = ExtentMap()
        [self._zeroes] = tree.kind.digests(memoryview(bytes(BLOCK)), BLOCK)

    async def read(
        self, view: memoryview, offset: int, priority: Priority, grant: Grant | None = None
    ) -> None:
        """See `Backing.read`. Reads whole blocks."""
        start, end = align_down(offset, BLOCK), align_up(offset + len(view), BLOCK)
        if end - start == len(view):
            await self._read(view, offset, priority, grant)
            return
        data = bytearray(end - start)
        await self._read(memoryview(data), start, priority, grant)
        view[:] = data[offset - start : offset - start + len(view)]

    async def bring(self, offset: int, length: int) -> bool:
        """See `Backing.bring`. There is no local copy."""
        return False

    def known_zero(self, offset: int, length: int) -> bool:
        """See `Backing.known_zero`."""
        return self._known.is_zero(offset, length)

    async def extents(self, offset: int, length: int) -> list[BackingExtent]:
        """See `Backing.extents`. Raises VerificationError as well."""
        start = align_down(offset, BLOCK)
        end = min(align_up(offset + length, BLOCK), start + STATUS_MOST)
        found: list[BackingExtent] = []
        for digest in await self._digests(start // BLOCK, (end - start) // BLOCK):
            zero = digest == self._zeroes
            if found and found[-1].zero is zero:
                found[-1] = found[-1]._replace(length=found[-1].length + BLOCK)
            else:
                found.append(BackingExtent(found[-1].end if found else start, BLOCK, zero))
        self._known.add(found)
        return list(clip(found, offset, length))

    async def _read(
        self, view: memoryview, offset: int, priority: Priority, grant: Grant | None
    ) -> None:
        """Read whole blocks, and check them."""
        if not view:
            return
        digests: list[bytes] = []

        async def prove() -> None:
            digests.extend(await self._digests(offset // BLOCK, len(view) // BLOCK))

        await together(lambda: self._backing.read(view, offset, priority, grant), prove)
        for index in await self._unlike(view, digests):
            start = index * BLOCK
            block = view[start : start + BLOCK]
            await self._backing.read(block, offset + start, Priority.DEMAND)
            if self._tree.kind.digests(block, BLOCK) != [digests[index]]:
                raise VerificationError(
                    f"{self.uri}: the block at offset {offset + start} does not fit the root hash, "
                    "and was refused: the image was changed, or damaged on its way"
                )

    async def _unlike(self, view: memoryview, digests: list[bytes]) -> list[int]:
        """The indexes of the blocks that have another digest."""
        if len(digests) <= INLINE_BLOCKS:
            found = self._tree.kind.digests(view, BLOCK)
        else:
            found = await in_worker(self._tree.kind.digests, view, BLOCK)
        return [index for index, digest in enumerate(digests) if found[index] != digest]

    async def _digests(self, first: int, count: int) -> list[bytes]:
        """The digests that data blocks must have; tree blocks that do not fit are read again."""
        proof = self._tree.proof(first, count)
        try:
            return proof.settle(await self._tree_blocks(proof.wanted))
        except VerificationError:
            return proof.settle(await self._tree_blocks(proof.wanted))

    async def _tree_blocks(self, positions: list[int]) -> dict[int, bytes]:
        """Read tree blocks, neighbours by one request."""
        runs: list[range] = []
        for position in positions:
            if runs and runs[-1].stop == position:
                runs[-1] = range(runs[-1].start, position + 1)
            else:
                runs.append(range(position, position + 1))
        read: dict[int, bytes] = {}

        async def take(run: range) -> None:
            data = bytearray(len(run) * BLOCK)
            await self._hashes.read(memoryview(data), run.start * BLOCK, Priority.DEMAND)
            for index, position in enumerate(run):
                read[position] = bytes(data[index * BLOCK : (index + 1) * BLOCK])

        await together(*(lambda run=run: take(run) for run in runs))
        return read
