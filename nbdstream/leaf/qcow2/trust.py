# SPDX-License-Identifier: Apache-2.0
"""Whether the refcounts of an image that was closed cleanly can be relied on.

Refcounts repeat what the tables say. Where they are damaged, nothing is lost: they are counted
again, as after a crash. What must not happen is that a cluster in use is taken for free, and
written over. So before anything is allocated where the refcounts are 0, they are compared with
the references, if the tables are small enough to be read at an open; otherwise that space
stays unused (`nbdstream.leaf.qcow2.refcounts`).
"""

import os
from enum import Enum

from nbdstream.errors import LeafFormatError
from nbdstream.extents import align_up
from nbdstream.leaf.durability import Syncs
from nbdstream.leaf.qcow2.check import refcounts_are_too_low
from nbdstream.leaf.qcow2.header import Header
from nbdstream.leaf.qcow2.refcounts import add_blocks, free_runs, load_table
from nbdstream.leaf.qcow2.table_file import fixed_metadata, load_l1

# L2 tables, in bytes, that an open reads to find out.
MAX_TABLES = 8 << 20


class Trust(Enum):
    """What may be done by the refcounts in the file."""

    WRONG = "they have to be counted"
    UNKNOWN = "what is free by them alone stays unused"
    RIGHT = "what is free by them is free"


def look_at_refcounts(fd: int, header: Header, syncs: Syncs) -> tuple[Trust, str]:
    """How far the refcounts can be trusted, and why not (may block).

    Raises:
        LeafFormatError: the L1 table is damaged beyond use.
        OSError: the file cannot be read.
    """
    geometry = header.geometry
    end = align_up(os.fstat(fd).st_size, geometry.cluster_size)
    table = load_table(fd, header)
    metadata = fixed_metadata(header)
    l1, _ = load_l1(fd, geometry, header.l1_table_offset, metadata, end)
    try:
        add_blocks(metadata, table, geometry, end)
    except LeafFormatError as error:
        return Trust.WRONG, str(error)
    if next(free_runs(fd, geometry, table, end), None) is None:
        return Trust.UNKNOWN, "there is no free space"
    if sum(map(bool, l1)) << geometry.cluster_bits > MAX_TABLES:
        return Trust.UNKNOWN, "the tables are large"
    too_low = refcounts_are_too_low(fd, header, syncs)
    if too_low is None:
        return Trust.UNKNOWN, "the tables are damaged"
    return (Trust.WRONG, "clusters in use are free by them") if too_low else (Trust.RIGHT, "")
