# SPDX-License-Identifier: Apache-2.0
"""Reads of what the leaf lacks, where a file of this host has it: as quick as hits.

The backing may have a local copy (`LocalCopy`): the host's image store has the same image for
other guests. What the leaf lacks is answered from there in the same step that finds it lacking,
so a guest's write is never passed by. Whether it is kept in the leaf as well is not for the guest
to wait for, but for the little that a copy of the same bytes takes. Where that is not possible (a
part of a block was read), whole clusters are copied afterwards.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from itertools import islice

from nbdstream.backing.base import Backing, LocalCopy, Priority
from nbdstream.disk.fetch import Fetcher
from nbdstream.disk.reads import COPY_PIECE
from nbdstream.disk.zeroes import zeroes
from nbdstream.errors import TROUBLE
from nbdstream.export import Hit
from nbdstream.extents import align_down, align_up
from nbdstream.leaf.base import ColdMetadata, Leaf, LeafExtent, State, joined

# Pieces of a range that are put together here. More are the slow path's.
EXTENTS_MOST = 16


class Beneath:
    """Reads through one leaf to the local copy of its backing."""

    def __init__(
        self,
        leaf: Leaf,
        backing: Backing,
        local: LocalCopy,
        fetcher: Fetcher,
        hot: int,
        keeps: Callable[[], bool],
    ) -> None:
        """``local`` is the backing's copy; ``hot``: the flags of preadv(2) for the leaf;
        ``keeps``: whether the leaf is to have what guests read."""
        self._leaf = leaf
        self._backing = backing
        self._local = local
        self._fetcher = fetcher
        self._hot = hot
        self._keeps = keeps

    def read_nowait(self, view: memoryview, offset: int) -> Hit:
        """Answer a read of which the leaf may have a part, without waiting, or not at all."""
        length = len(view)
        # A fetch that is under way may be readahead's mark, which wants to be noticed.
        if length > COPY_PIECE or self._fetcher.touches(offset, length):
            return Hit.MISS
        try:
            extents = self._extents(offset, length)
            if extents[-1].end < offset + length or not all(
                self._read(extent, view[extent.offset - offset : extent.end - offset])
                for extent in extents
            ):
                return Hit.MISS
        except (ColdMetadata, *TROUBLE):
            return Hit.MISS
        if self._keeps():
            self._keep(extents, view, offset)
        return Hit.DONE

    async def read(self, view: memoryview, offset: int) -> int:
        """Answer a read once the local copy has got what both lack. No fetch is needed for that:
        the process that keeps the copy fetches nothing twice.

        Returns how many bytes it had to get; 0 if the read cannot be answered in this way, and
        then the view's content is undefined.
        """
        try:
            extents = self._extents(offset, len(view))
        except (ColdMetadata, *TROUBLE):
            return 0
        missing = [extent for extent in extents if self._is_missing(extent)]
        if not missing:
            return 0
        cluster = self._leaf.cluster_size
        start = align_down(missing[0].offset, cluster)
        end = min(align_up(missing[-1].end, cluster), self._backing.size)
        if end - start > COPY_PIECE or self._fetcher.touches(start, end - start):
            return 0
        if await self._backing.bring(start, end - start):
            return end - start if self.read_nowait(view, offset) is Hit.DONE else 0
        return 0

    def _extents(self, offset: int, length: int) -> list[LeafExtent]:
        return list(islice(joined(self._leaf.extents(offset, length)), EXTENTS_MOST))

    def _is_missing(self, extent: LeafExtent) -> bool:
        return extent.state is State.UNALLOCATED and not self._local.has(*extent[:2])

    def _read(self, extent: LeafExtent, view: memoryview) -> bool:
        """One piece, if it is in memory. Raises OSError if it is not."""
        if extent.state is State.UNALLOCATED:
            local = self._local
            if not local.has(extent.offset, extent.length):
                return False
            return os.preadv(local.fd, (view,), extent.offset, local.hot) == len(view)
        if extent.state is State.DATA:
            return os.preadv(self._leaf.fd, (view,), extent.host, self._hot) == len(view)
        if extent.state is State.ZERO:
            view[:] = zeroes(len(view))
        return extent.state is State.ZERO

    def _keep(self, extents: list[LeafExtent], view: memoryview, offset: int) -> None:
        for extent in extents:
            if extent.state is State.UNALLOCATED:
                part = view[extent.offset - offset : extent.end - offset]
                with suppress(*TROUBLE):  # the fetch meets it, too, and says so
                    if self._fetcher.put_nowait(extent.offset, part):
                        continue
                self._fetcher.start(extent.offset, extent.length, Priority.READAHEAD, store=True)
