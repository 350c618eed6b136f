# SPDX-License-Identifier: Apache-2.0
"""Make an empty qcow2 image: header, refcount table and blocks, L1 table, in this order.

Images of ours have extended L2 entries (where the cluster size allows), so that a write
of 4 KiB needs nothing from the backing, and lazy refcounts, as this leaf works anyway.
"""

import os

from nbdstream.errors import UsageError
from nbdstream.extents import align_up
from nbdstream.leaf.base import BackingReference, write_exactly
from nbdstream.leaf.durability import Syncs
from nbdstream.leaf.qcow2.header import EXTENDED_L2, LAZY_REFCOUNTS, Header, feature_name_table
from nbdstream.leaf.qcow2.layout import (
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS,
    SECTOR,
    Geometry,
    store_words,
)
from nbdstream.leaf.qcow2.refcounts import pack_entries

DEFAULT_CLUSTER_SIZE = 128 << 10
REFCOUNT_ORDER = 4


def create(
    path: str,
    *,
    size: int,
    cluster_size: int | None,
    backing: BackingReference | None,
    extended_l2: bool | None = None,
) -> None:
    """Write a new image to ``path``, which must not exist, and sync it.

    ``size`` is rounded up to whole sectors, for QEMU's sake, which leaves out the rest.
    ``extended_l2`` is by default on where the cluster size allows. Raises UsageError,
    LeafUnsupportedError (the backing's name is too long), OSError; then the file may be left
    incomplete.
    """
    cluster_size = cluster_size or DEFAULT_CLUSTER_SIZE
    bits = cluster_size.bit_length() - 1
    if cluster_size != 1 << bits or not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        raise UsageError(f"cluster size {cluster_size} is not a power of 2 from 512 to 2M")
    if extended_l2 is None:
        extended_l2 = bits >= MIN_EXTENDED_CLUSTER_BITS
    if extended_l2 and bits < MIN_EXTENDED_CLUSTER_BITS:
        raise UsageError(f"extended L2 entries need clusters of 16K, not {cluster_size}")
    geometry = Geometry(align_up(size, SECTOR), bits, extended_l2, REFCOUNT_ORDER)
    if geometry.l1_entries * 8 > MAX_L1_BYTES:
        raise UsageError(f"a disk of {size} bytes needs larger clusters than {cluster_size}")
    table, blocks, l1 = _metadata_clusters(geometry)
    header = Header(
        version=3,
        cluster_bits=bits,
        size=geometry.size,
        l1_size=geometry.l1_entries,
        l1_table_offset=(1 + table + blocks) << bits if l1 else 0,
        refcount_table_offset=1 << bits,
        refcount_table_clusters=table,
        incompatible_features=EXTENDED_L2 if extended_l2 else 0,
        compatible_features=LAZY_REFCOUNTS,
        refcount_order=REFCOUNT_ORDER,
        extensions=(feature_name_table(),),
    )
    header = header.with_backing(backing).fitted()
    _write_image(path, header, table, blocks, 1 + table + blocks + l1)


def _metadata_clusters(geometry: Geometry) -> tuple[int, int, int]:
    """How many clusters the refcount table, its blocks and the L1 table take."""
    l1 = geometry.clusters(geometry.l1_entries * 8)
    table = blocks = 1
    while True:
        total = 1 + table + blocks + l1
        need = -(-total // geometry.refcount_block_entries)
        if need <= blocks:
            return table, blocks, l1
        blocks = need
        table = geometry.clusters(blocks * 8)


def _write_image(path: str, header: Header, table: int, blocks: int, used: int) -> None:
    bits = header.cluster_bits
    first_block = 1 + table
    pointers = store_words(first_block + i << bits for i in range(blocks))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(fd, used << bits)
        write_exactly(fd, memoryview(b"".join(header.encode())), 0)
        write_exactly(fd, memoryview(pointers), 1 << bits)
        ones = memoryview(pack_entries([1] * used, header.refcount_order))
        write_exactly(fd, ones, first_block << bits)
        Syncs(path).sync(fd)
    finally:
        os.close(fd)
