# SPDX-License-Identifier: Apache-2.0
"""What the backing has said of itself so far: a bounded memory of block status.

Extents are kept by region, `REGION` bytes of the backing each; when there are more
than `LIMIT` in all, the regions that were used longest ago are forgotten. Forgetting is
always right: it only means that the backing is asked again. A backing does not change,
so nothing in here ever becomes wrong.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable

from nbdstream.extents import BackingExtent

REGION = 1 << 30
# About 120 bytes each.
LIMIT = 1 << 17


class ExtentMap:
    """Extents of one backing, as far as they are known and still remembered."""

    def __init__(self) -> None:
        # Per region: sorted, disjoint extents, in two lists of the same length.
        self._regions: OrderedDict[int, tuple[list[int], list[BackingExtent]]] = OrderedDict()
        self._count = 0

    def add(self, extents: Iterable[BackingExtent]) -> None:
        """Remember extents (sorted, without overlaps among themselves)."""
        for extent in extents:
            start = extent.offset
            while start < extent.end:
                end = min(extent.end, (start // REGION + 1) * REGION)
                self._add(BackingExtent(start, end - start, extent.zero))
                start = end
        while self._count > LIMIT:
            _, (starts, _) = self._regions.popitem(last=False)
            self._count -= len(starts)

    def _add(self, extent: BackingExtent) -> None:
        """Remember an extent that lies within one region; known neighbours are joined."""
        region = extent.offset // REGION
        starts, extents = self._regions.setdefault(region, ([], []))
        self._regions.move_to_end(region)
        # All that this one overlaps goes; what sticks out is put back around it.
        first = bisect_right(starts, extent.offset) - 1
        if first < 0 or extents[first].end < extent.offset:
            first += 1
        last = bisect_right(starts, extent.end)
        new: list[BackingExtent] = []
        for old in extents[first:last]:
            if old.offset < extent.offset:
                new.append(BackingExtent(old.offset, extent.offset - old.offset, old.zero))
        new.append(extent)
        for old in extents[first:last]:
            if old.end > extent.end:
                new.append(BackingExtent(extent.end, old.end - extent.end, old.zero))
        new = _merged(new)
        starts[first:last] = [part.offset for part in new]
        extents[first:last] = new
        self._count += len(new) - (last - first)

    def find(self, offset: int, length: int) -> list[BackingExtent]:
        """What is known from ``offset`` on without a gap, within ``length``; maybe nothing."""
        found: list[BackingExtent] = []
        end = offset + length
        while offset < end:
            known = self._at(offset)
            if known is None:
                break
            stop = min(known.end, end)
            found.append(BackingExtent(offset, stop - offset, known.zero))
            offset = stop
        return _merged(found)

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether all of the range is known to read as zeroes."""
        end = offset + length
        while offset < end:
            known = self._at(offset)
            if known is None or not known.zero:
                return False
            offset = known.end
        return True

    def _at(self, offset: int) -> BackingExtent | None:
        """The known extent that ``offset`` lies in."""
        region = self._regions.get(offset // REGION)
        if region is None:
            return None
        starts, extents = region
        index = bisect_right(starts, offset) - 1
        if index < 0 or extents[index].end <= offset:
            return None
        self._regions.move_to_end(offset // REGION)
        return extents[index]


def _merged(extents: Iterable[BackingExtent]) -> list[BackingExtent]:
    """The same extents with alike neighbours joined."""
    joined: list[BackingExtent] = []
    for extent in extents:
        if joined and joined[-1].end == extent.offset and joined[-1].zero == extent.zero:
            first = joined.pop().offset
            extent = BackingExtent(first, extent.end - first, extent.zero)
        joined.append(extent)
    return joined
