# SPDX-License-Identifier: Apache-2.0
"""Which host clusters are free, and which hold metadata.

New space comes from the file's end, where a guest that writes in sequence gets its
clusters in sequence, or from free runs that are long enough for the whole request.

A cluster that the guest's tables let go of is *not* free yet: the tables in the file
still point to it, so that whatever is stored there next would show up in its former
place after a crash. It is free once a flush has made the letting go durable
(`take_dropped` at the flush's begin, `release` at its end).

Every change of a refcount becomes a `RefcountEvent`, in order; `refcounts` brings them to
the file. All of this belongs to the event loop's thread.
"""

import errno
import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from nbdstream.errors import LeafFormatError
from nbdstream.extents import align_up
from nbdstream.leaf.qcow2.header import REMEDY
from nbdstream.leaf.qcow2.layout import Geometry

# The file is made longer in steps, so that most flushes need not sync its size.
GROWTH = 16 << 20
# Free runs beyond this number are forgotten until the next open.
MAX_RUNS = 1 << 16
# What a request may look at before it takes the file's end.
MAX_LOOK = 8
# How much the guest's tables may let go of before a flush.
MAX_DROPPED = 1 << 16

# The value of an event that takes one off, whatever the refcount is.
DECREMENT = -1


class RefcountEvent(NamedTuple):
    """The refcounts of a run of clusters become ``value``, or one less (`DECREMENT`)."""

    first: int
    clusters: int
    value: int


class Dropped(NamedTuple):
    """A run of bytes that no table in memory refers to any more."""

    offset: int
    length: int
    compressed: bool


class Metadata:
    """The host clusters that hold tables: nothing else may refer to them."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._offsets = array("Q")

    def add(self, offset: int, length: int) -> None:
        """Add a table to come, or one that was made. O(number of tables) at worst."""
        size = self._geometry.cluster_size
        for at in range(offset, offset + length, size):
            if not self._offsets or at > self._offsets[-1]:
                self._offsets.append(at)
            else:
                self._offsets.insert(bisect_left(self._offsets, at), at)

    def add_all(self, offsets: Iterable[int]) -> None:
        """Add one-cluster tables. Raises LeafFormatError if a cluster is used twice."""
        self._offsets = array("Q", sorted([*self._offsets, *offsets]))
        previous = -1
        for offset in self._offsets:
            if offset == previous:
                raise LeafFormatError(f"two tables share the cluster at {offset:#x}")
            previous = offset

    def remove(self, offset: int, length: int) -> None:
        """Forget a table that is used no more."""
        for at in range(offset, offset + length, self._geometry.cluster_size):
            del self._offsets[bisect_left(self._offsets, at)]

    def overlap(self, offsets: set[int]) -> int | None:
        """One of these cluster offsets that holds a table, if any does."""
        if not offsets:
            return None
        low = bisect_left(self._offsets, min(offsets))
        high = bisect_right(self._offsets, max(offsets))
        if high - low <= len(offsets):
            return next((at for at in self._offsets[low:high] if at in offsets), None)
        return next((at for at in offsets if self._holds(at)), None)

    def within(self, offset: int, length: int) -> bool:
        """Whether a range of the file has any of them."""
        index = bisect_left(self._offsets, offset)
        return index < len(self._offsets) and self._offsets[index] < offset + length

    def _holds(self, offset: int) -> bool:
        index = bisect_left(self._offsets, offset)
        return index < len(self._offsets) and self._offsets[index] == offset


class Space:
    """The allocator.

    Attributes:
        end: where the file's used part ends; always on a cluster boundary.
        events: refcount changes that are not in the file yet, in order.
    """

    def __init__(self, fd: int, geometry: Geometry, metadata: Metadata) -> None:
        """``metadata``: where nothing may be allocated, whatever the refcounts say."""
        self._fd = fd
        self._geometry = geometry
        self._metadata = metadata
        self._file_size = os.fstat(fd).st_size
        self.end = align_up(self._file_size, geometry.cluster_size)
        self.events: list[RefcountEvent] = []
        self._free: list[tuple[int, int]] = []
        self._dropped: list[Dropped] = []

    # -- taking ------------------------------------------------------------------------

    def allocate(self, clusters: int) -> int:
        """Reserve a contiguous run; return its offset. `use` or `give_back` must follow.

        Raises OSError if the file cannot grow.
        """
        offset = self._take_free(clusters)
        if offset is None:
            offset = self.end
            self._grow(offset + (clusters << self._geometry.cluster_bits))
        if self._metadata.within(offset, clusters << self._geometry.cluster_bits):
            raise LeafFormatError(f"a table near {offset:#x} is marked as free space; {REMEDY}")
        return offset

    def _take_free(self, clusters: int) -> int | None:
        """The offset of a free run, cut to this length, if one is found quickly."""
        for index in range(len(self._free) - 1, max(-1, len(self._free) - 1 - MAX_LOOK), -1):
            offset, count = self._free[index]
            if count >= clusters:
                rest = count - clusters
                if rest:
                    self._free[index] = (offset + (clusters << self._geometry.cluster_bits), rest)
                else:
                    self._free[index] = self._free[-1]
                    self._free.pop()
                return offset
        return None

    def allocate_table(self, clusters: int) -> int:
        """Reserve a run for metadata, as `allocate`, but always at the file's end: where
        refcounts are damaged, free space may have guest data, which a table in memory
        leads writes to. Raises OSError.
        """
        offset = self.end
        self._grow(offset + (clusters << self._geometry.cluster_bits))
        return offset

    def _grow(self, end: int) -> None:
        if end > self._geometry.file_limit:
            raise OSError(errno.EFBIG, "the image cannot grow further with its cluster size")
        if end > self._file_size:
            size = min(align_up(end, GROWTH), self._geometry.file_limit)
            os.ftruncate(self._fd, size)
            self._file_size = size
        self.end = end

    def use(self, offset: int, clusters: int) -> None:
        """What was allocated is referred to from now on: its refcounts are 1."""
        self._note(offset >> self._geometry.cluster_bits, clusters, 1)

    def give_back(self, offset: int, clusters: int) -> None:
        """What was allocated was not used after all."""
        if offset + (clusters << self._geometry.cluster_bits) == self.end:
            self.end = offset
        else:
            self.add_free(offset, clusters)

    def trim_file(self) -> None:
        """Cut off what the file was grown by ahead of need. Raises OSError."""
        if self._file_size > self.end:
            os.ftruncate(self._fd, self.end)
            self._file_size = self.end

    # -- giving back -------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether a flush has to come before anything else is dropped."""
        return len(self._dropped) >= MAX_DROPPED

    def drop(self, offset: int, length: int, *, compressed: bool = False) -> None:
        """The tables in memory refer to this no more (those in the file still do)."""
        if self._dropped and not compressed:
            last = self._dropped[-1]
            if not last.compressed and last.offset + last.length == offset:
                self._dropped[-1] = last._replace(length=last.length + length)
                return
        self._dropped.append(Dropped(offset, length, compressed))

    def take_dropped(self) -> list[Dropped]:
        """What the flush that begins now makes free."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def keep_dropped(self, dropped: list[Dropped]) -> None:
        """That flush failed: its successor has to do it."""
        self._dropped[:0] = dropped

    def release(self, dropped: list[Dropped]) -> None:
        """That flush is durable: the space is free.

        Clusters of compressed data may be shared; whether they are free is seen when
        the refcounts are written (`refcounts.RefcountPlan.freed`).
        """
        bits = self._geometry.cluster_bits
        for offset, length, compressed in dropped:
            first = offset >> bits
            if compressed:
                last = (offset + length - 1) >> bits
                self._note(first, last - first + 1, DECREMENT)
            else:
                self._note(first, length >> bits, 0)
                self.add_free(offset, length >> bits)

    def add_free(self, offset: int, clusters: int) -> None:
        """A run is free, in the file's tables as well."""
        if self._free:
            start, count = self._free[-1]
            if start + (count << self._geometry.cluster_bits) == offset:
                self._free[-1] = (start, count + clusters)
                return
        if len(self._free) < MAX_RUNS:
            self._free.append((offset, clusters))

    def _note(self, first: int, count: int, value: int) -> None:
        if self.events and value != DECREMENT:
            last = self.events[-1]
            if last.value == value and last.first + last.clusters == first:
                self.events[-1] = RefcountEvent(last.first, last.clusters + count, value)
                return
        self.events.append(RefcountEvent(first, count, value))
