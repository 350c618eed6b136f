# SPDX-License-Identifier: Apache-2.0
"""Entries of the active L1 and L2 tables that a repair has to give up.

An entry is damaged if it leads to where no table or no data can be: it is judged by the same
rules as when the image is served (`entries`). What it led to is lost, so a repair makes
it zero, and the guest range under it has no local data any more.

Refcount blocks are metadata only if the refcounts say that they are in use. Otherwise a
damaged refcount table would have a repair give up sound guest data.
"""

from array import array
from collections.abc import Iterator
from typing import NamedTuple

from nbdstream.errors import LeafFormatError
from nbdstream.extents import align_up
from nbdstream.leaf.base import write_exactly
from nbdstream.leaf.durability import Syncs
from nbdstream.leaf.qcow2.entries import EntryCheck, wrong_pointer
from nbdstream.leaf.qcow2.header import Header
from nbdstream.leaf.qcow2.header_file import store_fields
from nbdstream.leaf.qcow2.layout import COMPRESSED, OFFSET, Geometry, store_words
from nbdstream.leaf.qcow2.refcounts import saturated_entries, sound_block
from nbdstream.leaf.qcow2.references import Walk
from nbdstream.leaf.qcow2.space import Metadata

# Guest ranges that the messages of one check name.
MAX_RANGES = 100


class Damage(NamedTuple):
    """A damaged entry: where it is in the file, the words to replace it with, the guest range
    under it, and what is wrong. ``lost``: that range loses its local data."""

    place: int
    new: "array[int]"
    start: int
    length: int
    what: str
    lost: bool = True


def find_damage(walk: Walk, header: Header, file_size: int, table: "array[int]") -> list[Damage]:
    """All damaged entries. ``table`` is the refcount table. Raises OSError."""
    geometry = header.geometry
    end = align_up(file_size, geometry.cluster_size)
    metadata = Metadata(geometry)
    known = {0}
    for offset, length in (
        (header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits),
        (header.l1_table_offset, header.l1_size * 8),
    ):
        known.update(range(offset, offset + length, geometry.cluster_size))
    metadata.add_all(known)
    l1 = walk.read_words(header.l1_table_offset, header.l1_size * 8)
    found = []
    tables: dict[int, int] = {}
    for index, entry in enumerate(l1):
        what = wrong_pointer(entry, geometry, metadata, end) if entry else ""
        if what:
            place = header.l1_table_offset + 8 * index
            start = index << geometry.table_bits
            text = f"L1 entry {index}, {entry:#x}, {what}"
            found.append(Damage(place, array("Q", [0]), start, 1 << geometry.table_bits, text))
        elif entry:
            tables.setdefault(entry & OFFSET, index)
    blocks = _blocks_in_use(walk, geometry, table, end)
    metadata.add_all((blocks | tables.keys()) - known)
    entries = EntryCheck(geometry, metadata, None)
    for offset, index in tables.items():
        words = walk.read_words(offset, geometry.cluster_size)
        found += _in_table(geometry, entries, words, offset, index << geometry.table_bits, end)
    return found


def _blocks_in_use(walk: Walk, geometry: Geometry, table: "array[int]", end: int) -> set[int]:
    """The refcount blocks that have a refcount of one themselves."""
    used = set()
    for entry in table:
        if not entry or not sound_block(entry, geometry, end):
            continue
        per_block = geometry.refcount_block_entries
        index, position = divmod(entry >> geometry.cluster_bits, per_block)
        block = table[index] if index < len(table) else 0
        if block and sound_block(block, geometry, end):
            data = store_words(walk.read_words(block, geometry.cluster_size))
            if saturated_entries(data, geometry.refcount_order)[position] == 1:
                used.add(entry)
    return used


def _in_table(
    geometry: Geometry,
    entries: EntryCheck,
    words: "array[int]",
    table: int,
    guest: int,
    end: int,
) -> Iterator[Damage]:
    """The damaged entries of one L2 table, which counts from the offset ``guest``."""
    step = geometry.slice_entries * geometry.words
    for first in range(0, len(words), step):
        part = words[first : first + step]
        if not any(part) or entries.is_sound_run(part, end):
            continue
        for at in range(0, len(part), geometry.words):
            entry = part[at : at + geometry.words]
            if not any(entry):
                continue
            place = table + 8 * (first + at)
            start = guest + ((first + at) // geometry.words << geometry.cluster_bits)
            try:
                entries.check(entry[:], end)
            except LeafFormatError as error:
                text = f"the L2 entry at {place:#x}, {entry[0]:#x}, {error}"
                empty = array("Q", bytes(8 * geometry.words))
                yield Damage(place, empty, start, geometry.cluster_size, text)
                continue
            sound = geometry.compressed(entry) if entry[0] & COMPRESSED else entry
            if sound != entry:
                text = "flags of a compressed cluster"
                yield Damage(place, sound, start, geometry.cluster_size, text, lost=False)


def mend(fd: int, header: Header, syncs: Syncs, damaged: list[Damage]) -> Header:
    """Replace damaged entries, durably, under the dirty bit. Raises OSError.

    Returns the header. The refcounts are still to be counted.
    """
    if header.version >= 3 and not header.dirty:
        header = header.marked(dirty=True)
        store_fields(fd, header)
        syncs.sync(fd)
    for one in damaged:
        write_exactly(fd, memoryview(store_words(one.new)), one.place)
    syncs.sync(fd)
    return header


def describe(damaged: list[Damage], header: Header, *, repair: bool) -> list[str]:
    """A line for each guest range that lost its local data, or would lose it to a repair."""
    below = "the backing's content shows" if header.backing is not None else "it reads as zeroes"
    done = "lost its local data" if repair else "will lose its local data to --repair"
    ranges: list[tuple[int, int, str]] = []
    for one in sorted((one for one in damaged if one.lost), key=lambda one: one.start):
        stop = min(one.start + one.length, header.size)
        if stop <= one.start:
            continue
        if ranges and ranges[-1][1] >= one.start:
            ranges[-1] = (ranges[-1][0], stop, ranges[-1][2])
        else:
            ranges.append((one.start, stop, one.what))
    lines = [
        f"guest range {start:#x} to {stop:#x} {done}, {below}: {what}"
        for start, stop, what in ranges[:MAX_RANGES]
    ]
    if len(ranges) > MAX_RANGES:
        lines.append(f"{len(ranges) - MAX_RANGES} more guest ranges {done.replace('its', 'their')}")
    return lines
