# SPDX-License-Identifier: Apache-2.0
"""Ranges of a disk and what is known of them.

An extent is half-open: it covers the bytes ``offset`` to ``offset + length - 1``.
Lists of extents are sorted, do not overlap and, where a function says that they
*tile* a range, leave no gap in it.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class BackingExtent(NamedTuple):
    """What the backing reports of a range of itself (NBD block status, base:allocation).

    ``zero``: the range reads as zeroes, so it never needs to be transferred.
    """

    offset: int
    length: int
    zero: bool

    @property
    def end(self) -> int:
        return self.offset + self.length


def align_down(value: int, alignment: int) -> int:
    """The largest multiple of ``alignment`` that is not above ``value``."""
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of ``alignment`` that is not below ``value``."""
    return value + -value % alignment


def clip(extents: Iterable[BackingExtent], offset: int, length: int) -> Iterator[BackingExtent]:
    """The parts of ``extents`` that lie within ``offset``, ``length``."""
    end = offset + length
    for extent in extents:
        first = max(extent.offset, offset)
        last = min(extent.end, end)
        if first < last:
            yield BackingExtent(first, last - first, extent.zero)


def pieces(offset: int, length: int, most: int, alignment: int = 1) -> Iterator[tuple[int, int]]:
    """Cut a range into (offset, length) pieces of at most ``most`` bytes, or one unit of
    ``alignment`` bytes if that is more; each but the last ends at a multiple of it."""
    end = offset + length
    step = max(most, alignment)
    while offset < end:
        stop = min(align_down(offset + step, alignment), end)
        yield offset, stop - offset
        offset = stop
