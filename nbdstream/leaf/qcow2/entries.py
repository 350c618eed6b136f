# SPDX-License-Identifier: Apache-2.0
"""Whether the entries of L2 tables lead to where data may be.

The same check serves a whole slice, quickly, and a single entry of one that failed.
"""

import functools
import operator
from array import array
from collections.abc import Callable

from nbdstream.errors import LeafFormatError
from nbdstream.leaf.qcow2.layout import (
    COMPRESSED,
    COPIED,
    LOW_32,
    OFFSET,
    RESERVED_L1,
    RESERVED_L2,
    ZERO,
    Geometry,
    is_run,
)
from nbdstream.leaf.qcow2.space import Metadata


def wrong_pointer(entry: int, geometry: Geometry, metadata: Metadata, end: int) -> str:
    """What is wrong with an L1 entry, or "". The used part of the file ends at ``end``."""
    table = entry & OFFSET
    if entry & RESERVED_L1:
        return "has reserved bits set"
    if table % geometry.cluster_size:
        return "leads to a table that is not aligned"
    if not 0 < table < end:
        return "leads to a table that is not within the file"
    if metadata.within(table, geometry.cluster_size):
        return "leads to where another table is"
    return ""


class EntryCheck:
    """Checks entries of one image, against its metadata and its refcounts."""

    def __init__(
        self, geometry: Geometry, metadata: Metadata, refcount: Callable[[int], int] | None
    ) -> None:
        """``refcount`` as for `nbdstream.leaf.qcow2.tables.Tables`."""
        self._geometry = geometry
        self._metadata = metadata
        self._refcount = refcount
        self._reserved = RESERVED_L2 | (ZERO if geometry.extended else 0)

    def is_sound_run(self, entries: "array[int]", end: int) -> bool:
        """Whether the slice has data clusters in a row, nothing else, and no fault: what a
        guest or a stream that writes in sequence leaves behind, quickly recognised."""
        geometry = self._geometry
        firsts = entries[:: geometry.words]
        host = firsts[0] & OFFSET
        length = len(firsts) << geometry.cluster_bits
        return bool(
            host
            and firsts[0] == host | COPIED
            and not host % geometry.cluster_size
            and host + length <= end
            and is_run(firsts, geometry.cluster_size)
            and (geometry.words == 1 or set(entries[1::2]) == {geometry.full})
            and not self._metadata.within(host, length)
        )

    def check(self, entries: "array[int]", end: int) -> None:
        """Refuse entries whose data clusters are not where data may be: before ``end``.

        Raises LeafFormatError, which says what is wrong and not where, ColdMetadata, OSError.
        """
        words = self._geometry.words
        first_words = entries[::words]
        seen = functools.reduce(operator.or_, first_words)
        if words == 2:
            self._check_bitmaps(entries)
        if seen & COMPRESSED:
            self._check_compressed(first_words, end)
            first_words = array("Q", (e for e in first_words if not e & COMPRESSED))
            seen = functools.reduce(operator.or_, first_words, 0)
        if seen & self._reserved or COPIED in first_words:
            raise LeafFormatError("has reserved bits set")
        offsets = {entry & OFFSET for entry in first_words}
        offsets.discard(0)
        if not offsets:
            return
        if functools.reduce(operator.or_, offsets) & (self._geometry.cluster_size - 1):
            raise LeafFormatError("refers to a cluster that is not aligned")
        if max(offsets) >= end:
            raise LeafFormatError(f"refers to {max(offsets):#x}, beyond the file's end")
        overlap = self._metadata.overlap(offsets)
        if overlap is not None:
            raise LeafFormatError(f"has data at {overlap:#x}, where a table lies")
        if self._refcount is not None and _count(COPIED, first_words) != _count(
            OFFSET, first_words
        ):
            self._claim(entries)

    def _check_bitmaps(self, entries: "array[int]") -> None:
        for index in range(0, len(entries), 2):
            entry, bitmap = entries[index], entries[index + 1]
            if not bitmap:
                continue
            if entry & COMPRESSED:
                entries[index + 1] = 0  # "not used"; so that `locate` need not look twice
            elif bitmap & (bitmap >> 32):
                raise LeafFormatError("has subclusters that are both data and zero")
            elif bitmap & LOW_32 and not entry & OFFSET:
                raise LeafFormatError("has allocated subclusters in no cluster")

    def _check_compressed(self, entries: "array[int]", end: int) -> None:
        for entry in entries:
            if entry & COMPRESSED:
                offset, length = self._geometry.packed_range(entry & (COMPRESSED - 1))
                # The last sector may be cut short by the file's end.
                if (
                    offset < self._geometry.cluster_size
                    or offset >= end
                    or (offset + length - end >= self._geometry.cluster_size)
                ):
                    raise LeafFormatError(f"has compressed data at {offset:#x} (+{length})")

    def _claim(self, entries: "array[int]") -> None:
        """Make sure that what the slice refers to may be changed in place.

        Without internal snapshots (which are refused on write) all clusters have a
        refcount of one; entries that do not say so get the flag that does.
        """
        assert self._refcount is not None
        for index in range(0, len(entries), self._geometry.words):
            entry = entries[index]
            if entry and not entry & (COPIED | COMPRESSED) and entry & OFFSET:
                count = self._refcount(entry & OFFSET)
                if count != 1:
                    raise LeafFormatError(
                        f"refers to {entry & OFFSET:#x}, which has {count} references"
                    )
                entries[index] = entry | COPIED


def _count(bits: int, words: "array[int]") -> int:
    """How many words have any of these bits."""
    return len(list(filter(bits.__and__, words)))
