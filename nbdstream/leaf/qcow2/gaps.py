# SPDX-License-Identifier: Apache-2.0
"""What the tables in the file lack: whether the image could do without its backing.

Damaged entries count as what is lacking. They have no readable data, and a repair
makes them unallocated: with the backing, its content shows there; without it, zeroes would.
"""

from array import array

from nbdstream.leaf.base import read_range
from nbdstream.leaf.qcow2.header import Header
from nbdstream.leaf.qcow2.layout import COMPRESSED, LOW_32, OFFSET, Geometry, load_words
from nbdstream.leaf.qcow2.tables import Tables


def first_unallocated(fd: int, header: Header, tables: Tables) -> int | None:
    """The lowest guest offset that no sound entry in the file has allocated; None: there is none.

    Reads all tables (may block). ``tables`` are those of the open leaf. Raises OSError.
    """
    geometry = header.geometry
    bits = geometry.cluster_bits
    clusters = geometry.clusters(geometry.size)
    per_table = 1 << (geometry.table_bits - bits)
    l1 = load_words(read_range(fd, header.l1_table_offset, geometry.l1_entries * 8))
    for number, pointer in enumerate(l1):
        first = number * per_table
        if not pointer & OFFSET or tables.damaged_table(number):
            return first << bits
        words = load_words(read_range(fd, pointer & OFFSET, geometry.cluster_size))
        words = words[: min(per_table, clusters - first) * geometry.words]
        step = geometry.slice_entries * geometry.words
        for at in range(0, len(words), step):
            part = words[at : at + step]
            start = (first + at // geometry.words) << bits
            last = at + step >= len(words) and first + per_table >= clusters
            gap = _first_gap(geometry, part, last)
            damaged = tables.first_damaged(start >> geometry.slice_bits, part)
            found = [where for where in (gap, damaged) if where is not None]
            if found:
                return start + min(found)
    return None


def _first_gap(geometry: Geometry, words: "array[int]", last: bool) -> int | None:
    """The guest offset, from the range's start, of the first block that these entries lack;
    ``last``: they are the disk's last ones, of which the end may be missing."""
    if not geometry.extended:
        return words.index(0) << geometry.cluster_bits if 0 in words else None
    tail = geometry.clusters(geometry.size) - 1
    blocks = -(-(geometry.size - (tail << geometry.cluster_bits)) // geometry.block_size)
    whole = {bitmap for bitmap in set(words[1::2]) if (bitmap | bitmap >> 32) & LOW_32 == LOW_32}
    for index, bitmap in enumerate(words[1::2]):
        if bitmap in whole or words[2 * index] & COMPRESSED:
            continue
        have = (bitmap | bitmap >> 32) & LOW_32
        if last and 2 * index + 2 == len(words):
            have |= LOW_32 << blocks & LOW_32
        if have != LOW_32:
            block = (~have & (have + 1)).bit_length() - 1
            return (index << geometry.cluster_bits) + block * geometry.block_size
    return None
