# SPDX-License-Identifier: Apache-2.0
"""Refcounts in the file: the refcount table, its blocks, entries of every width.

While an image is open for writing its dirty bit is set, which tells everyone to rebuild
the refcounts after a crash; so they need no order among themselves or with other tables,
and are written late, a run at a time. Only a refcount table that moves is made durable
before the header points to it.

A refcount that is too low is the one damage that would have us write over clusters in use. So
space that is free by the refcounts alone is used again only if they were compared with the
references (`nbdstream.leaf.qcow2.trust`). Otherwise new clusters come from the file's end, and
from what the guest's tables let go of.

The event loop's thread decides (`Refcounts.plan` takes the events that `Space` noted,
and allocates missing blocks); a worker writes (`RefcountPlan.apply`). If writing fails,
the refcounts in the file are unknown and the image stays dirty: rebuilding them is
certain, repeating half of the changes is not.

Specification: QEMU's docs/interop/qcow2, "Host cluster management".
"""

import logging
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from nbdstream.errors import LeafFormatError
from nbdstream.leaf.base import write_exactly
from nbdstream.leaf.durability import Syncs
from nbdstream.leaf.files import read_cached
from nbdstream.leaf.qcow2.header import REMEDY, Header
from nbdstream.leaf.qcow2.header_file import store_fields
from nbdstream.leaf.qcow2.layout import (
    MAX_REFCOUNT_TABLE_BYTES,
    OFFSET,
    Geometry,
    load_words,
    store_words,
)
from nbdstream.leaf.qcow2.space import DECREMENT, Metadata, RefcountEvent, Space

log = logging.getLogger(__name__)

# Events are kept in memory up to this number: most are joined to their predecessor, and
# a flush need not write refcounts.
LAZY_EVENTS = 1024
# How much of the refcount blocks an open looks at for free space.
SCAN_BYTES = 32 << 20
SCAN_RUNS = 1 << 14


@dataclass(frozen=True)
class Step:
    """Set ``count`` entries of the block at offset ``block`` from its entry ``first``.

    ``base`` is the number of the cluster that the block's entry 0 counts.
    """

    block: int
    base: int
    first: int
    count: int
    value: int


@dataclass
class RefcountPlan:
    """Changes for a worker to write, in this order. No other code touches the blocks.

    Attributes:
        moved_table: the whole table, if it was moved to ``table_offset``.
        new_blocks: (table index, offset) of blocks to make.
        freed: out: offsets of clusters whose refcount a decrement brought to 0.
    """

    geometry: Geometry
    table_offset: int
    moved_table: "array[int] | None" = None
    new_blocks: list[tuple[int, int]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)

    def apply(self, fd: int, header: Header, syncs: Syncs) -> Header:
        """Worker: write it all; return the header, changed if the table moved. Raises OSError."""
        empty = memoryview(bytes(self.geometry.cluster_size))
        for index, offset in self.new_blocks:
            write_exactly(fd, empty, offset)
            if self.moved_table is None:
                pointer = memoryview(store_words([offset]))
                write_exactly(fd, pointer, self.table_offset + 8 * index)
        for step in self.steps:
            self._apply_step(fd, step)
        if self.moved_table is None:
            return header
        write_exactly(fd, memoryview(store_words(self.moved_table)), self.table_offset)
        syncs.sync(fd)
        header = replace(
            header,
            refcount_table_offset=self.table_offset,
            refcount_table_clusters=self.geometry.clusters(8 * len(self.moved_table)),
        )
        store_fields(fd, header)
        syncs.sync(fd)
        return header

    def _apply_step(self, fd: int, step: Step) -> None:
        geometry = self.geometry
        bits = geometry.refcount_bits
        # The bytes that hold these entries; narrow ones share theirs with others.
        start = step.first * bits // 8
        stop = -(-(step.first + step.count) * bits // 8)
        if step.value != DECREMENT and bits >= 8:
            data = step.value.to_bytes(bits // 8, "big") * step.count
        else:
            data = os.pread(fd, stop - start, step.block + start).ljust(stop - start, b"\0")
            values = unpack_entries(data, geometry.refcount_order)
            skip = step.first - start * 8 // bits
            for index in range(skip, skip + step.count):
                values[index] = self._new_value(step, index - skip, values[index])
            data = pack_entries(values, geometry.refcount_order)
        write_exactly(fd, memoryview(data), step.block + start)

    def _new_value(self, step: Step, index: int, old: int) -> int:
        if step.value != DECREMENT:
            return step.value
        if old == 1:
            self.freed.append((step.base + step.first + index) << self.geometry.cluster_bits)
        return max(0, old - 1)


class Refcounts:
    """The refcount table of an image open for writing. Belongs to the event loop."""

    def __init__(
        self,
        fd: int,
        geometry: Geometry,
        header: Header,
        space: Space,
        metadata: Metadata,
        *,
        trusted: bool,
    ) -> None:
        """``trusted``: whether a refcount of 0 in the file means that nothing is there.

        Raises LeafFormatError if the table is not sound, OSError. May block.
        """
        self._fd = fd
        self._geometry = geometry
        self._space = space
        self._metadata = metadata
        self._table_offset = header.refcount_table_offset
        self.table = load_table(fd, header)
        add_blocks(metadata, self.table, geometry, space.end)
        self._plans: list[RefcountPlan] = []
        self.lost = False
        self.trusted = trusted

    # -- looking -----------------------------------------------------------------------

    def get(self, offset: int) -> int:
        """The refcount in the file of the cluster at an offset. Raises ColdMetadata."""
        index, entry = divmod(
            offset >> self._geometry.cluster_bits, self._geometry.refcount_block_entries
        )
        if index >= len(self.table) or not self.table[index]:
            return 0
        bits = self._geometry.refcount_bits
        width = max(1, bits // 8)
        at = self.table[index] + entry * bits // 8
        values = unpack_entries(read_cached(self._fd, at, width), self._geometry.refcount_order)
        return values[entry % len(values)]

    # -- changing ----------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether the file lacks anything."""
        return bool(self._space.events or self._plans)

    def take_plans(self, *, everything: bool) -> list[RefcountPlan]:
        """What a worker has to write now: nothing, unless there is much or it is asked for.

        `applied` or `postponed` must follow.
        """
        if self.lost:
            self._space.events.clear()
        elif len(self._space.events) >= LAZY_EVENTS or (everything and self._space.events):
            try:
                self._plans.append(self._plan())
            except OSError as error:  # the file cannot grow
                log.warning("refcounts cannot be written, the image stays dirty: %s", error)
                self.lost = True
            except BaseException:
                self.lost = True  # some events may be in no plan
                raise
        plans, self._plans = self._plans, []
        return plans

    def postponed(self, plans: list[RefcountPlan]) -> None:
        """The worker did not get as far as these."""
        self._plans[:0] = plans

    def applied(self, plans: list[RefcountPlan], *, ok: bool) -> None:
        """The worker wrote these, or failed half-way (then the image has to stay dirty)."""
        self.lost = self.lost or not ok
        if ok and self.trusted:
            for plan in plans:
                for offset in plan.freed:
                    self._space.add_free(offset, 1)

    def _plan(self) -> RefcountPlan:
        plan = RefcountPlan(self._geometry, self._table_offset)
        events = self._space.events
        while events:
            batch = events[:]
            events.clear()
            for event in batch:  # missing blocks are allocated: that adds to the events
                self._plan_event(plan, event)
        if plan.moved_table is not None:
            plan.moved_table = self.table[:]
        return plan

    def _plan_event(self, plan: RefcountPlan, event: RefcountEvent) -> None:
        per_block = self._geometry.refcount_block_entries
        first, end = event.first, event.first + event.clusters
        while first < end:
            index, entry = divmod(first, per_block)
            count = min(end - first, per_block - entry)
            block = self.table[index] if index < len(self.table) else 0
            if not block and event.value > 0:
                block = self._add_block(plan, index)
            if block:
                plan.steps.append(Step(block, first - entry, entry, count, event.value))
            first += count

    def _add_block(self, plan: RefcountPlan, index: int) -> int:
        if index >= len(self.table):
            self._move_table(plan, index + 1)
        block = self._space.allocate_table(1)
        self._space.use(block, 1)
        self._metadata.add(block, self._geometry.cluster_size)
        self.table[index] = block
        plan.new_blocks.append((index, block))
        return block

    def _move_table(self, plan: RefcountPlan, entries: int) -> None:
        """Make room for more entries: the table has to be contiguous, so it moves.

        It may have been moved in this plan before; what an older plan wrote into the
        former place does not matter, since the table is written as a whole.
        """
        geometry = self._geometry
        old_clusters = geometry.clusters(8 * len(self.table))
        # Half as much again, so that it seldom happens.
        wanted = 8 * max(entries + 1, len(self.table) * 3 // 2)
        clusters = geometry.clusters(min(wanted, MAX_REFCOUNT_TABLE_BYTES))
        place = self._space.allocate_table(clusters)
        self._space.use(place, clusters)
        self._metadata.remove(self._table_offset, old_clusters << geometry.cluster_bits)
        self._metadata.add(place, clusters << geometry.cluster_bits)
        # Free in the tables; for use only once the header points elsewhere: next time.
        first = self._table_offset >> geometry.cluster_bits
        self._space.events.append(RefcountEvent(first, old_clusters, 0))
        self.table.frombytes(bytes((clusters << geometry.cluster_bits) - 8 * len(self.table)))
        self._table_offset = plan.table_offset = place
        plan.moved_table = self.table


# -- entries ---------------------------------------------------------------------------


def load_table(fd: int, header: Header) -> "array[int]":
    """The refcount table as it is in the file (may block). Raises OSError."""
    size = header.refcount_table_clusters << header.cluster_bits
    return load_words(os.pread(fd, size, header.refcount_table_offset).ljust(size, b"\0"))


def sound_block(entry: int, geometry: Geometry, end: int) -> bool:
    """Whether a refcount table entry can be the place of a refcount block."""
    return not entry & ~OFFSET and entry % geometry.cluster_size == 0 and 0 < entry < end


def add_blocks(metadata: Metadata, table: "array[int]", geometry: Geometry, end: int) -> None:
    """Note the refcount blocks. Raises LeafFormatError if one is where none can be."""
    for index, entry in enumerate(table):
        if entry and not sound_block(entry, geometry, end):
            raise LeafFormatError(f"entry {index} of the refcount table is {entry:#x}; {REMEDY}")
    metadata.add_all(filter(None, table))


def free_runs(
    fd: int, geometry: Geometry, table: "array[int]", end: int
) -> Iterator[tuple[int, int]]:
    """Runs (offset, clusters) with refcount 0 before ``end`` (may block).

    It reads a bounded part of the blocks: space that it does not come to is found
    another time.
    """
    per_block = geometry.refcount_block_entries
    clusters = end >> geometry.cluster_bits
    runs = 0
    for index in range(min(len(table), SCAN_BYTES >> geometry.cluster_bits)):
        first = index * per_block
        count = min(per_block, clusters - first)
        if count <= 0 or runs >= SCAN_RUNS:
            return
        if not table[index]:
            yield first << geometry.cluster_bits, count
            continue
        block = os.pread(fd, geometry.cluster_size, table[index])
        for match in re.finditer(b"\0+", saturated_entries(block, geometry.refcount_order)[:count]):
            runs += 1
            yield (first + match.start()) << geometry.cluster_bits, len(match.group())


def unpack_entries(data: bytes, order: int) -> list[int]:
    """All entries in these bytes; the width is 2^order bits. Narrow entries start at the
    least significant bit of each byte."""
    if order >= 3:
        width = 1 << (order - 3)
        return [int.from_bytes(data[i : i + width], "big") for i in range(0, len(data), width)]
    bits = 1 << order
    mask = (1 << bits) - 1
    return [byte >> shift & mask for byte in data for shift in range(0, 8, bits)]


def pack_entries(values: list[int], order: int) -> bytes:
    """The reverse of `unpack_entries`."""
    if order >= 3:
        width = 1 << (order - 3)
        return b"".join(value.to_bytes(width, "big") for value in values)
    bits = 1 << order
    per_byte = 8 // bits
    return bytes(
        sum(value << bits * i for i, value in enumerate(values[at : at + per_byte]))
        for at in range(0, len(values), per_byte)
    )


def saturated_entries(block: bytes, order: int) -> bytes:
    """The refcounts of a whole block, a byte each; 255 stands for that or more."""
    if order < 3:
        expand = [bytes(unpack_entries(bytes([byte]), order)) for byte in range(256)]
        return b"".join(map(expand.__getitem__, block))
    width = 1 << (order - 3)
    lanes = [block[lane::width] for lane in range(width)]
    if any(any(lane) for lane in lanes[:-1]):
        return bytes(min(value, 255) for value in unpack_entries(block, order))
    return lanes[-1]
