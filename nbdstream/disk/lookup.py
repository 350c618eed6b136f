# SPDX-License-Identifier: Apache-2.0
"""What the leaf has of a range, as the disk's decisions need it: plain calls that change
nothing, to be made in one step with what is done about the answer.

All of them may raise ColdMetadata.
"""

from collections.abc import Iterator
from itertools import islice

from nbdstream.backing.base import Backing
from nbdstream.disk.fetch import Fetch
from nbdstream.extents import align_down, align_up
from nbdstream.leaf.base import Leaf, LeafExtent, State, joined

# A range of the disk cut by who has its data: extents, each with the fetch if one has it.
Plan = list[tuple[LeafExtent, Fetch | None]]


class Lookup:
    """Answers for one leaf; ``backing`` is asked what it knows to be zero.

    Attributes:
        trusting: whether what the backing knew a moment ago still counts.
    """

    def __init__(self, leaf: Leaf, backing: Backing | None) -> None:
        self.trusting = True
        self._leaf = leaf
        self._backing = backing

    # -- extents -----------------------------------------------------------------------

    def extents(self, offset: int, length: int) -> list[LeafExtent]:
        """The longest extents that tile the range."""
        return list(joined(self._leaf.extents(offset, length)))

    def some_extents(self, offset: int, length: int, limit: int) -> list[LeafExtent]:
        """The first ``limit`` of them."""
        return list(islice(joined(self._leaf.extents(offset, length)), limit))

    def unallocated(self, offset: int, length: int) -> list[LeafExtent]:
        """Those that only the backing has."""
        return list(filter(is_remote, self.extents(offset, length)))

    def missing(self, offset: int, length: int) -> list[LeafExtent]:
        """Those of them that have to be fetched: the backing may have data there."""
        return [part for part in self.unallocated(offset, length) if not self.known_zero(part)]

    def first_unallocated(self, offset: int, length: int) -> LeafExtent | None:
        """The first of those."""
        return next(filter(is_remote, joined(self._leaf.extents(offset, length))), None)

    def plan(self, offset: int, length: int, fetched: list[Fetch]) -> Plan:
        """Where to take a range from. What the backing is known to have as zeroes is ZERO."""
        plan: Plan = []
        for extent in self.extents(offset, length):
            if not is_remote(extent):
                plan.append((extent, None))
            elif self.known_zero(extent):
                plan.append((extent._replace(state=State.ZERO), None))
            else:
                plan += _by_fetch(extent, fetched)
        return plan

    # -- questions -----------------------------------------------------------------------

    def known_zero(self, extent: LeafExtent) -> bool:
        """Whether the backing is known to read as zeroes there."""
        if self._backing is None or not self.trusting:
            return False
        return self._backing.known_zero(extent.offset, extent.length)

    def reads_zero(self, offset: int, length: int) -> bool:
        """Whether the range is without data anywhere, and reads as zeroes."""
        return all(
            part.state is State.ZERO or (is_remote(part) and self.known_zero(part))
            for part in self._leaf.extents(offset, length)
        )

    def slow_to_zero(self, offset: int, length: int) -> bool:
        """Whether zeroing a part of a block here needs more than a write."""
        return length > 0 and any(
            part.state is State.COMPRESSED or (is_remote(part) and not self.known_zero(part))
            for part in self._leaf.extents(offset, length)
        )

    def obstacle(self, offset: int, length: int) -> LeafExtent | None:
        """What the leaf must have as DATA before it takes a write or zero of this range:
        blocks that it covers in part, and compressed clusters that it covers in part."""
        block_size = self._leaf.block_size
        end = offset + length
        edges = set()
        if offset % block_size:
            edges.add(align_down(offset, block_size))
        if end % block_size and end != self._leaf.size:
            edges.add(align_down(end, block_size))
        for edge in edges:
            for extent in self._leaf.extents(edge, min(block_size, self._leaf.size - edge)):
                if extent.state is not State.DATA:
                    return extent
        if not self._leaf.may_compress:
            return None
        for extent in self._leaf.extents(offset, length):
            if extent.state is State.COMPRESSED:
                cluster, size = self.cluster(extent.offset)
                if cluster < offset or cluster + size > end:
                    return extent
        return None

    # -- geometry ------------------------------------------------------------------------

    def whole_blocks(self, offset: int, length: int) -> tuple[int, int]:
        """The (start, end) of the whole blocks in a range; the disk's last block counts
        as whole, however short. Empty: start is not below end."""
        end = offset + length
        start = align_up(offset, self._leaf.block_size)
        return start, end if end == self._leaf.size else align_down(end, self._leaf.block_size)

    def cluster(self, offset: int) -> tuple[int, int]:
        """The (offset, length) of the cluster around an offset, within the disk."""
        start = align_down(offset, self._leaf.cluster_size)
        return start, min(self._leaf.cluster_size, self._leaf.size - start)


def is_remote(extent: LeafExtent) -> bool:
    """Whether only the backing has it."""
    return extent.state is State.UNALLOCATED


def same_place(part: LeafExtent, extent: LeafExtent) -> bool:
    """Whether a part of an extent is still where the extent had it."""
    if extent.state is State.COMPRESSED:
        return part.state is State.COMPRESSED and part.host == extent.host
    return part.state is State.DATA and part.host - extent.host == part.offset - extent.offset


def _by_fetch(
    extent: LeafExtent, fetched: list[Fetch]
) -> Iterator[tuple[LeafExtent, Fetch | None]]:
    """Cut an unallocated extent by the fetches that have its data."""
    offset = extent.offset
    while offset < extent.end:
        source: Fetch | None = None
        end = extent.end
        for fetch in fetched:
            if fetch.covers(offset, 1):
                source, end = fetch, min(end, fetch.offset + fetch.length)
                break
            if offset < fetch.offset < end:
                end = fetch.offset
        yield LeafExtent(offset, end - offset, State.UNALLOCATED), source
        offset = end
