# SPDX-License-Identifier: Apache-2.0
"""Changes of tables as records of the redo log, and their recovery after a process was killed.

A record is (`TABLE` | L1 index, L1 entry), or (guest cluster, count, entry, bitmap): so many
guest clusters in a row have this L2 entry, each at one host cluster behind its predecessor's if
it has one. Refcounts are not recorded: the dirty bit is set, so they are counted.
"""

from array import array

from nbdstream.errors import LeafFormatError
from nbdstream.leaf.base import read_range
from nbdstream.leaf.durability import Syncs
from nbdstream.leaf.qcow2.header import Header
from nbdstream.leaf.qcow2.header_file import store_features
from nbdstream.leaf.qcow2.layout import OFFSET, Geometry, load_words
from nbdstream.leaf.qcow2.table_file import TableSnapshot, write_tables
from nbdstream.leaf.redo import TABLE, Record, RedoLog, new_tables


def log_entries(redo: RedoLog, geometry: Geometry, changed: list[tuple[int, int, int]]) -> None:
    """Record L2 entries that were changed: (guest cluster, entry, bitmap), in ascending order."""
    run = first = entry = bitmap = step = 0
    for cluster, word, other in changed:
        follows = word == entry + run * step and other == bitmap and cluster == first + run
        if run and follows:
            run += 1
            continue
        if run:
            redo.append(first, run, entry, bitmap)
        run, first, entry, bitmap = 1, cluster, word, other
        step = geometry.cluster_size if word & OFFSET else 0
    if run:
        redo.append(first, run, entry, bitmap)


def recover(fd: int, header: Header, records: list[Record], syncs: Syncs) -> Header:
    """Bring the changes to the file, durably, in the order of a flush (worker).

    Returns the header, which has the dirty bit. Raises LeafFormatError, before it has changed
    anything, if the changes do not fit; OSError.
    """
    snapshot = _snapshot(fd, header, records)
    header = header.marked(dirty=True)
    store_features(fd, header)
    syncs.sync(fd)
    write_tables(fd, snapshot, header.geometry, header.l1_table_offset, syncs)
    return header


def _snapshot(fd: int, header: Header, records: list[Record]) -> TableSnapshot:
    """What a flush would have written, had it come in time."""
    geometry = header.geometry
    l1 = load_words(read_range(fd, header.l1_table_offset, geometry.l1_entries * 8))
    pointers = new_tables(records, l1)
    entries: dict[int, array[int]] = {}
    for first, count, entry, bitmap in records:
        step = geometry.cluster_size if entry & OFFSET else 0
        for at in range(0 if first & TABLE else count):
            entries[first + at] = array("Q", (entry + at * step, bitmap)[: geometry.words])
    return TableSnapshot(
        new_tables=[pointer & OFFSET for pointer in pointers.values()],
        slices=[(_place(geometry, l1, cluster), words) for cluster, words in entries.items()],
        pointers=list(pointers.items()),
    )


def _place(geometry: Geometry, l1: "array[int]", cluster: int) -> int:
    """Where the L2 entry of a guest cluster lies in the file."""
    index, entry = divmod(cluster, 1 << geometry.table_bits - geometry.cluster_bits)
    if index >= len(l1) or not l1[index] & OFFSET:
        raise LeafFormatError(f"guest cluster {cluster} has no L2 table")
    return (l1[index] & OFFSET) + entry * 8 * geometry.words
