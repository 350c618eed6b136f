# SPDX-License-Identifier: Apache-2.0
"""Recovers the changes to tables that a killed process left in its redo log.

A record is (`TABLE` | L1 index, table's offset), or (cluster, count, entry of the first): what
`Tables.add_table` and `Tables.store` have done in memory. Here the same is done in the file, in
the order of a flush (`nbdstream.leaf.qed.leaf`).
"""

import os
import struct
from array import array

from nbdstream.errors import LeafFormatError
from nbdstream.leaf.base import write_exactly
from nbdstream.leaf.durability import Syncs
from nbdstream.leaf.files import zero_range
from nbdstream.leaf.qed.header import Header
from nbdstream.leaf.qed.tables import ZERO, load_entries
from nbdstream.leaf.redo import TABLE, Record, new_tables


def recover(fd: int, header: Header, records: list[Record], syncs: Syncs) -> None:
    """Bring the changes to the file, durably; the data is synced already (worker).

    Raises LeafFormatError, before it has changed anything, if they do not fit; OSError.
    """
    l1 = load_entries(os.pread(fd, header.table_bytes, header.l1_table_offset))
    pointers = new_tables(records, l1)
    entries: dict[int, int] = {}
    for first, count, entry, _ in records:
        step = header.cluster_size if entry > ZERO else 0
        if not first & TABLE:
            entries.update((first + at, entry + at * step) for at in range(count))
    places = {_place(header, l1, cluster): entry for cluster, entry in entries.items()}
    for table in pointers.values():
        zero_range(fd, table, header.table_bytes, unmap=True)
    _write(fd, places)
    syncs.sync(fd)
    if pointers:
        _write(fd, {header.l1_table_offset + 8 * at: start for at, start in pointers.items()})
        syncs.sync(fd)


def _place(header: Header, l1: "array[int]", cluster: int) -> int:
    """Where a cluster's entry lies in the file."""
    index, entry = divmod(cluster, header.table_entries)
    if index >= len(l1) or not l1[index]:
        raise LeafFormatError(f"cluster {cluster} has no table")
    return l1[index] + 8 * entry


def _write(fd: int, entries: dict[int, int]) -> None:
    for place, entry in entries.items():
        write_exactly(fd, memoryview(struct.pack("<Q", entry)), place)
