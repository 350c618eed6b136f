# SPDX-License-Identifier: Apache-2.0
"""Check an image as ``qemu-img check`` does, and repair what can be repaired for certain.

Refcounts are compared with the references that the tables hold: less than that is an
error (the next allocation would overwrite data), more is a leak. Both are repaired by
writing what was counted; refcount blocks that cannot be used are replaced. The copied
flags of L1 and L2 entries follow the refcounts. Entries of the active tables that refer to
where nothing can be are made zero (`damage`): what they meant is lost.

A repair runs with the dirty bit set (the caller clears it), so it may be cut off at any
point and is then simply done again.
"""

import os
from dataclasses import replace
from functools import lru_cache

from nbdstream.errors import LeafFormatError
from nbdstream.leaf.base import CheckResult, write_exactly
from nbdstream.leaf.durability import Syncs
from nbdstream.leaf.qcow2.damage import Damage, describe, find_damage, mend
from nbdstream.leaf.qcow2.header import REMEDY, Header
from nbdstream.leaf.qcow2.header_file import store_features
from nbdstream.leaf.qcow2.layout import (
    COMPRESSED,
    COPIED,
    OFFSET,
    store_words,
)
from nbdstream.leaf.qcow2.refcounts import (
    Refcounts,
    load_table,
    saturated_entries,
    unpack_entries,
)
from nbdstream.leaf.qcow2.references import MANY, Run, Walk
from nbdstream.leaf.qcow2.space import RefcountEvent, Space
from nbdstream.leaf.qcow2.table_file import fixed_metadata


def check_image(
    fd: int, header: Header, syncs: Syncs, *, repair: bool, strict: bool = False
) -> tuple[CheckResult, Header]:
    """Check, and with ``repair`` repair, an image that is not used meanwhile (may block).

    With ``strict``, damage that no repair can undo is raised as LeafFormatError before
    anything is written. Returns the header as well, since a repair may move the refcount
    table. Raises LeafFormatError where the image cannot even be walked through, OSError.
    """
    check = _Check(fd, header, syncs)
    if strict and check.structural_errors:
        raise LeafFormatError(f"the image is damaged: {check.walk.messages[0]}; {REMEDY}")
    damaged: list[Damage] = []
    if repair:
        damaged = check.find_damage()
        if damaged:
            check = _Check(fd, mend(fd, check.header, syncs, damaged), syncs)
        check.forget_bad_blocks()
    check.compare()
    if repair:
        check.repair()
    check.check_copied(repair=repair)
    result = check.result()
    if not repair and result.errors:
        damaged = check.find_damage()
    elif damaged:
        mended = CheckResult(len(damaged), repaired=len(damaged))
        result = mended.plus(result)
    if repair and check.header.corrupt and _ended_clean(fd, check.header, syncs):
        # Repaired refcounts and tables are durable: only then does the mark go.
        check.header = check.header.marked(dirty=True, corrupt=False)
        store_features(fd, check.header)
        syncs.sync(fd)
    lines = (*describe(damaged, check.header, repair=repair), *result.messages)
    return replace(result, messages=lines), check.header


def _ended_clean(fd: int, header: Header, syncs: Syncs) -> bool:
    left, _ = check_image(fd, header, syncs, repair=False)
    return not left.errors


def refcounts_are_too_low(fd: int, header: Header, syncs: Syncs) -> bool | None:
    """Whether a cluster in use has fewer references than it should, or a refcount block is where
    other things are; None: that cannot be told, for the tables are damaged (may block)."""
    check = _Check(fd, header, syncs)
    if check.structural_errors:
        return None
    check.compare()
    return bool(check.bad_blocks or check.too_low)


class _Check:
    """One check: the walk, the comparison, the repair."""

    def __init__(self, fd: int, header: Header, syncs: Syncs) -> None:
        self.header = header
        self._syncs = syncs
        self._fd = fd
        self._geometry = header.geometry
        self.walk = Walk(fd, header)
        self.walk.run()
        self._table = load_table(fd, header)
        self.structural_errors = self.walk.errors
        self._bad = self.walk.run_refcount_blocks(self._table)
        self.bad_blocks = self.walk.errors - self.structural_errors
        self._clusters = max(
            self.walk.references.clusters, self._geometry.clusters(os.fstat(fd).st_size)
        )
        self.too_low = self._too_high = self._copied = self._repaired = 0
        self._events: list[RefcountEvent] = []
        self._stored = lru_cache(16)(self._read_block)

    def find_damage(self) -> list[Damage]:
        """See `damage.find_damage`. Raises OSError."""
        size = os.fstat(self._fd).st_size
        return find_damage(self.walk, self.header, size, self._table)

    def result(self) -> CheckResult:
        messages = list(self.walk.messages)
        for count, text in (
            (self.too_low, "cluster with a refcount below its references"),
            (self._copied, "entry whose copied flag contradicts the refcount"),
            (self._too_high, "leaked cluster"),
        ):
            if count:
                messages.append(f"{text} ({count}x)")
        return CheckResult(
            errors=self.walk.errors + self.too_low + self._copied,
            leaks=self._too_high,
            repaired=self._repaired,
            messages=tuple(messages),
        )

    # -- refcounts -----------------------------------------------------------------------

    def _read_block(self, index: int) -> bytes:
        """The stored refcounts of one block, a byte each, `MANY` for that or more."""
        entries = self._geometry.refcount_block_entries
        # An entry with reserved bits (counted by the walk) is the place of nothing.
        if index >= len(self._table) or not self._table[index] or self._table[index] & ~OFFSET:
            return bytes(entries)
        data = os.pread(self._fd, self._geometry.cluster_size, self._table[index])
        return saturated_entries(
            data.ljust(self._geometry.cluster_size, b"\0"), self._geometry.refcount_order
        )

    def _exact(self, index: int, entry: int) -> int:
        """One stored refcount, however large."""
        bits = self._geometry.refcount_bits
        at = self._table[index] + entry * bits // 8
        data = os.pread(self._fd, bits // 8, at)
        return unpack_entries(data, self._geometry.refcount_order)[0]

    def compare(self) -> None:
        """Find all refcounts that differ from the references."""
        per_block = self._geometry.refcount_block_entries
        used = {index for index, block in enumerate(self._table) if block}
        # Where neither side has anything there is nothing to compare, however huge.
        for index in sorted(used | self.walk.references.windows(per_block)):
            first = index * per_block
            count = min(per_block, self._clusters - first)
            if count <= 0:
                break
            stored = self._stored(index)[:count]
            counted = self.walk.references.window(first, count)
            if stored == counted and MANY not in counted:
                continue
            for entry, (was, should) in enumerate(zip(stored, counted, strict=True)):
                if was == MANY or should == MANY:
                    was = self._exact(index, entry) if was == MANY else was
                    should = self.walk.references.get(first + entry)
                if was != should:
                    self._differs(first + entry, was, should)

    def _differs(self, cluster: int, was: int, should: int) -> None:
        if was < should:
            self.too_low += 1
        else:
            self._too_high += 1
        if self._events:
            last = self._events[-1]
            if last.value == should and last.first + last.clusters == cluster:
                self._events[-1] = last._replace(clusters=last.clusters + 1)
                return
        self._events.append(RefcountEvent(cluster, 1, should))

    def forget_bad_blocks(self) -> None:
        """Before `compare`: do without the refcount blocks that cannot be used."""
        for index, counted in self._bad:
            if counted:
                self.walk.references.add(self._table[index] >> self._geometry.cluster_bits, 1, -1)
            self._table[index] = 0

    def repair(self) -> None:
        """Write what was counted. Raises LeafFormatError, OSError."""
        highest = max((event.value for event in self._events), default=0)
        if highest >= 1 << self._geometry.refcount_bits:
            raise LeafFormatError(f"a cluster with {highest} references does not fit a refcount")
        if not self._events and not self._bad:
            return
        if self.header.version >= 3 and not self.header.dirty:
            self.header = self.header.marked(dirty=True)
            store_features(self._fd, self.header)
            self._syncs.sync(self._fd)
        for index, _ in self._bad:
            write_exactly(
                self._fd, memoryview(bytes(8)), self.header.refcount_table_offset + 8 * index
            )
        metadata = fixed_metadata(self.header)
        space = Space(self._fd, self._geometry, metadata)
        refcounts = Refcounts(self._fd, self._geometry, self.header, space, metadata, trusted=False)
        space.events += self._events
        for plan in refcounts.take_plans(everything=True):
            self.header = plan.apply(self._fd, self.header, self._syncs)
        if refcounts.lost:
            raise LeafFormatError("there is no room for the refcounts of this image")
        space.trim_file()
        self._syncs.sync(self._fd)
        self._repaired += self.too_low + self._too_high + self.bad_blocks
        self._table = load_table(self._fd, self.header)
        self._stored.cache_clear()

    # -- copied flags ----------------------------------------------------------------------

    def check_copied(self, *, repair: bool) -> None:
        """Compare the flags in the active tables with the stored refcounts."""
        header = self.header
        l1 = self.walk.read_words(header.l1_table_offset, header.l1_size * 8)
        for index, entry in enumerate(l1):
            table = entry & OFFSET
            if not table or table % self._geometry.cluster_size:
                continue
            if self._wrong(entry):
                self._fix(header.l1_table_offset + 8 * index, entry, repair=repair)
            for run in self.walk.l2_runs(table):
                if not run.entry & COMPRESSED and run.entry & OFFSET:
                    self._check_copied_run(run, repair=repair)
        if repair:
            self._syncs.sync(self._fd)

    def _check_copied_run(self, run: Run, *, repair: bool) -> None:
        cluster = (run.entry & OFFSET) >> self._geometry.cluster_bits
        index, position = divmod(cluster, self._geometry.refcount_block_entries)
        counts = self._stored(index)[position : position + run.length]
        if run.entry & COPIED and counts == b"\1" * run.length:
            return
        for number in range(run.length):
            entry = run.entry + (number << self._geometry.cluster_bits)
            if self._wrong(entry):
                self._fix(run.place + 8 * self._geometry.words * number, entry, repair=repair)

    def _wrong(self, entry: int) -> bool:
        cluster = (entry & OFFSET) >> self._geometry.cluster_bits
        index, position = divmod(cluster, self._geometry.refcount_block_entries)
        return (self._stored(index)[position] == 1) != bool(entry & COPIED)

    def _fix(self, place: int, entry: int, *, repair: bool) -> None:
        self._copied += 1
        if repair:
            write_exactly(self._fd, memoryview(store_words([entry ^ COPIED])), place)
            self._repaired += 1
