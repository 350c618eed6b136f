# SPDX-License-Identifier: Apache-2.0
"""The sizes of a qcow2 image, and the bits of its L1 and L2 entries.

`Geometry` answers every question of the form "how many, how large"; `Cluster` is one
decoded L2 entry, alike for standard and extended entries: a *block* is the smallest
unit that is allocated by itself, a whole cluster without extended L2 entries (then the
masks below have one bit), a subcluster with them (32 bits).

The tables are kept in memory as arrays of 64-bit words in the host's byte order;
`load_words` and `store_words` convert. Specification: "Cluster mapping" and "Extended
L2 Entries" in QEMU's docs/interop/qcow2.
"""

import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

SECTOR = 512  # what a disk writes whole or not at all

COPIED = 1 << 63  # L1, L2: the refcount is exactly one, so it may be changed in place
COMPRESSED = 1 << 62  # L2
ZERO = 1  # L2, standard entries: reads as zeroes
OFFSET = 0x00FF_FFFF_FFFF_FE00  # L1, L2, refcount table: bits 9-55
RESERVED_L1 = 0x7F00_0000_0000_01FF
RESERVED_L2 = 0x3F00_0000_0000_01FE  # bit 0 is reserved only with extended entries
LOW_32 = 0xFFFF_FFFF

# QEMU's limits, which keep hostile images from asking for much memory.
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MIN_EXTENDED_CLUSTER_BITS = 14

# L2 tables are read, cached and written in slices of at most this size.
SLICE_BYTES = 4096
# Table content that is written at once.
MAX_RUN = 1 << 20


class Cluster(NamedTuple):
    """What an L2 entry says of one guest cluster.

    ``host`` is the host cluster's offset or 0; ``data`` and ``zero`` have a bit for each
    block; ``packed`` is the compressed cluster's descriptor (bits 0-61), or -1.
    """

    host: int
    data: int
    zero: int
    packed: int = -1


@dataclass(frozen=True)
class Geometry:
    """The sizes that follow from a header. All in bytes unless named otherwise."""

    size: int
    cluster_bits: int
    extended: bool
    refcount_order: int

    @cached_property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @cached_property
    def words(self) -> int:
        """64-bit words in an L2 entry."""
        return 2 if self.extended else 1

    @cached_property
    def blocks(self) -> int:
        """Blocks in a cluster."""
        return 32 if self.extended else 1

    @cached_property
    def block_size(self) -> int:
        return self.cluster_size // self.blocks

    @cached_property
    def full(self) -> int:
        """The mask of all blocks of a cluster."""
        return (1 << self.blocks) - 1

    @cached_property
    def table_bits(self) -> int:
        """Bits of a guest offset that one L2 table resolves."""
        return self.cluster_bits + self.cluster_bits - (4 if self.extended else 3)

    @cached_property
    def slice_bytes(self) -> int:
        return min(SLICE_BYTES, self.cluster_size)

    @cached_property
    def slice_entries(self) -> int:
        """L2 entries in a slice."""
        return self.slice_bytes // (8 * self.words)

    @cached_property
    def slice_bits(self) -> int:
        """Bits of a guest offset that one slice resolves."""
        return self.cluster_bits + self.slice_entries.bit_length() - 1

    @cached_property
    def l1_entries(self) -> int:
        """L1 entries that the disk's size needs."""
        return -(-self.size >> self.table_bits)

    @cached_property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @cached_property
    def refcount_block_entries(self) -> int:
        return self.cluster_size * 8 >> self.refcount_order

    @cached_property
    def file_limit(self) -> int:
        """No host cluster may end beyond it: offsets have 56 bits, and the refcount
        table is limited."""
        clusters = MAX_REFCOUNT_TABLE_BYTES // 8 * self.refcount_block_entries
        return min(1 << 56, clusters << self.cluster_bits)

    def clusters(self, length: int) -> int:
        """How many clusters hold ``length`` bytes."""
        return -(-length >> self.cluster_bits)

    def decode(self, entry: int, bitmap: int) -> Cluster:
        """What an L2 entry means; ``bitmap`` is its second word, 0 in standard entries."""
        if entry & COMPRESSED:
            return Cluster(0, 0, 0, entry & (COMPRESSED - 1))
        host = entry & OFFSET
        if self.extended:
            return Cluster(host, bitmap & LOW_32, bitmap >> 32)
        if entry & ZERO:
            return Cluster(host, 0, 1)
        return Cluster(host, 1 if host else 0, 0)

    def encode(self, cluster: Cluster) -> tuple[int, int]:
        """The two words of an L2 entry for a cluster that is not compressed."""
        entry = cluster.host | COPIED if cluster.host else 0
        if self.extended:
            return entry, cluster.zero << 32 | cluster.data
        return entry | cluster.zero, 0

    def compressed(self, entry: "array[int]") -> "array[int]":
        """The entry of a compressed cluster as it has to be: without the copied flag, and with
        no subclusters ("Extended L2 Entries": the bitmap is not used)."""
        return array("Q", (entry[0] & ~COPIED, 0)[: self.words])

    def packed_range(self, packed: int) -> tuple[int, int]:
        """Offset and length in the file of a compressed cluster's data.

        The length is what the descriptor promises at most: it counts whole sectors, from
        the one that holds the offset ("Compressed Clusters Descriptor").
        """
        x = 62 - (self.cluster_bits - 8)
        offset = packed & ((1 << x) - 1)
        sectors = (packed >> x) + 1
        return offset, sectors * SECTOR - offset % SECTOR


def load_words(data: bytes) -> "array[int]":
    """A table as it is in the file (big endian) as an array of integers."""
    words = array("Q", data)
    if sys.byteorder == "little":
        words.byteswap()
    return words


def store_words(words: Iterable[int]) -> bytes:
    """The reverse of `load_words`; leaves its argument alone."""
    out = array("Q", words)
    if sys.byteorder == "little":
        out.byteswap()
    return out.tobytes()


def is_run(words: "array[int]", step: int) -> bool:
    """Whether each word is ``step`` above its predecessor. Quick for many."""
    first, count = words[0], len(words)
    if not step:
        return words.count(first) == count
    return words == array("Q", range(first, first + count * step, step))


def joined_runs(pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Join sorted pieces of a file (offset, content) that touch, up to a limit."""
    start, parts, end = 0, [b""], 0
    for offset, data in pieces:
        if offset != end or end - start >= MAX_RUN:
            if end > start:
                yield start, b"".join(parts)
            start, parts = offset, []
        parts.append(data)
        end = offset + len(data)
    if end > start:
        yield start, b"".join(parts)
