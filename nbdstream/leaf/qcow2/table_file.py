# SPDX-License-Identifier: Apache-2.0
"""The L1 table and L2 tables in the file: loaded at the open, written by a flush."""

from array import array
from dataclasses import dataclass, field

from nbdstream.errors import LeafFormatError
from nbdstream.leaf.base import read_range, write_exactly
from nbdstream.leaf.durability import Syncs
from nbdstream.leaf.files import zero_range
from nbdstream.leaf.qcow2.entries import wrong_pointer
from nbdstream.leaf.qcow2.header import REMEDY, Header
from nbdstream.leaf.qcow2.layout import OFFSET, Geometry, joined_runs, load_words, store_words
from nbdstream.leaf.qcow2.space import Metadata

# Damaged L1 entries, and slices with damaged entries, that are lived with.
MAX_DAMAGED = 1024


@dataclass
class TableSnapshot:
    """What a flush writes: copies, which no other code touches.

    ``damage`` is what to mark the image as corrupt for, if not ""; ``pins`` are damaged entries
    to write back: (offset in the file, content). ``new_tables`` are the places of
    tables to make; ``slices`` and ``pointers`` (L1 entries) are (offset in the file, content)
    and (index, content).
    """

    new_tables: list[int] = field(default_factory=list)
    slices: list[tuple[int, "array[int]"]] = field(default_factory=list)
    pointers: list[tuple[int, int]] = field(default_factory=list)
    damage: str = ""
    pins: list[tuple[int, int]] = field(default_factory=list)


def fixed_metadata(header: Header) -> Metadata:
    """The metadata that the header itself names: header, refcount table, L1 table."""
    metadata = Metadata(header.geometry)
    metadata.add(0, header.cluster_size)
    metadata.add(
        header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits
    )
    if header.l1_size:
        metadata.add(header.l1_table_offset, header.l1_size * 8)
    return metadata


def load_l1(
    fd: int, geometry: Geometry, offset: int, metadata: Metadata, end: int
) -> tuple["array[int]", dict[int, str]]:
    """Read the L1 table as far as the disk needs it, and note its tables (may block).

    Returns the table, and what is wrong with its damaged entries, by index: those that lead
    to where no table can be or another structure is, and ("") to the same place as others.
    Raises LeafFormatError if there are many of them, OSError.
    """
    l1 = load_words(read_range(fd, offset, geometry.l1_entries * 8))
    owners: dict[int, int] = {}
    damaged: dict[int, str] = {}
    for index, entry in enumerate(l1):
        if not entry:
            continue
        table = entry & OFFSET
        wrong = wrong_pointer(entry, geometry, metadata, end)
        if wrong:
            damaged[index] = wrong
        elif owners.setdefault(table, index) != index:
            damaged[index] = damaged[owners[table]] = ""
        if len(damaged) > MAX_DAMAGED:
            raise LeafFormatError(
                f"the L1 table has many entries like {entry:#x}, which is no L2 table; {REMEDY}"
            )
    metadata.add_all(owners)
    return l1, damaged


def write_tables(
    fd: int, snapshot: TableSnapshot, geometry: Geometry, l1_offset: int, syncs: Syncs
) -> None:
    """Worker: write a snapshot and make it durable. Raises OSError.

    New tables come first and are synced before the L1 entries that make them visible:
    otherwise a crash could leave an entry that points to whatever was there before.
    """
    for offset in snapshot.new_tables:
        # A hole where that can be: most of a new table is empty for long.
        zero_range(fd, offset, geometry.cluster_size, unmap=True)
    for offset, data in joined_runs(
        (offset, store_words(entries)) for offset, entries in sorted(snapshot.slices)
    ):
        write_exactly(fd, memoryview(data), offset)
    if snapshot.pointers:
        syncs.sync(fd)
        for offset, data in joined_runs(
            (l1_offset + 8 * index, store_words([entry]))
            for index, entry in sorted(snapshot.pointers)
        ):
            write_exactly(fd, memoryview(data), offset)
    syncs.sync(fd)
