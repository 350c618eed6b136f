# SPDX-License-Identifier: Apache-2.0
"""The qcow2 leaf: open, locate, flush, close.

**Crash order.** A flush (`begin_flush` and the worker function that it returns) goes:

1. The dirty bit is set in the header (once per open), with the data of the guest's writes
   still in the page cache. Then both are *synced*: data, so that no table can show a
   cluster before its content is there (invariant 3); the dirty bit, because from here on
   clusters are in use that the refcounts in the file do not know, and after a crash
   the next writer has to count them again before it allocates.
   Where damage was met, the corrupt bit and `Tables`' pins go along: they are durable before
   the file can grow.
2. New L2 tables and changed slices of old ones are written. If there are new tables, they
   are *synced* before step 3: an L1 entry must not point to what was there before.
3. The L1 entries of new tables are written, and all is *synced*. Now the flush is durable
   (invariant 2), and what the tables let go of is free to be used again; before, the
   tables in the file still led there, and a crash would have shown one cluster's new
   bytes in the place of another.
4. Now and then, refcounts (unordered: the dirty bit stands).

An entry of 8 or 16 bytes lies within one sector, so that it is torn by no power cut. A
close flushes, writes the remaining refcounts, *syncs*, and clears the dirty bit, last.

**Open** for writing checks all that can be checked without reading the L2 tables before
it writes anything; rebuilds the refcounts if the image was not closed; upgrades version
2 (which has no dirty bit) to 3; drops persistent dirty bitmaps, which our writes would
not be recorded in; and clears the bits that stand for whatever else we would not maintain.
"""

import logging
from collections.abc import Callable, Iterator

from nbdstream.leaf import files
from nbdstream.leaf.base import (
    ALL_ZERO,
    SCATTERED,
    BackingReference,
    CheckResult,
    LeafExtent,
    State,
    SyncError,
    flushing,
    read_exactly,
    write_exactly,
)
from nbdstream.leaf.durability import DurableLeaf, Syncs
from nbdstream.leaf.qcow2.changes import Changes
from nbdstream.leaf.qcow2.check import check_image
from nbdstream.leaf.qcow2.compressed import unpack
from nbdstream.leaf.qcow2.gaps import first_unallocated
from nbdstream.leaf.qcow2.header import LAZY_REFCOUNTS, Header
from nbdstream.leaf.qcow2.header_file import install, reread_header, store_features
from nbdstream.leaf.qcow2.layout import COMPRESSED, OFFSET, ZERO, store_words
from nbdstream.leaf.qcow2.refcounts import RefcountPlan, Refcounts, free_runs
from nbdstream.leaf.qcow2.slices import slice_extents
from nbdstream.leaf.qcow2.space import Dropped, Space
from nbdstream.leaf.qcow2.table_file import TableSnapshot, fixed_metadata, load_l1, write_tables
from nbdstream.leaf.qcow2.tables import DAMAGED, Tables
from nbdstream.leaf.redo import RedoLog, start

log = logging.getLogger(__name__)

FLAGGED = COMPRESSED | ZERO
DAMAGED_PLACE = DAMAGED & ~COMPRESSED  # what an extent of a damaged entry has for a place


class Qcow2Leaf(DurableLeaf):
    """An open qcow2 image; see the module's docstring for what is durable when."""

    format = "qcow2"

    def __init__(
        self,
        path: str,
        fd: int,
        header: Header,
        syncs: Syncs,
        *,
        read_only: bool,
        mended: CheckResult,
        trusted: bool,
    ) -> None:
        """Take over ``fd``; ``mended`` is what a repair found before, ``trusted`` as for
        `Refcounts`. Raises LeafFormatError, OSError; then ``fd`` stays open."""
        self.path = path
        self.fd = fd
        self.read_only = read_only
        self.backing = header.backing
        self._header = header
        self._syncs = syncs
        self._mended = mended
        self._trusted = trusted
        self._in_flush: tuple[list[Dropped], list[RefcountPlan]] = ([], [])
        self._refcounts_ok = True
        self._redo = RedoLog()
        self._settling = False  # whether the next flush is to bring all refcounts to the file
        self._load()

    def _load(self) -> None:
        """Read the tables of the first level, and find free space (may block)."""
        header, fd = self._header, self.fd
        self._geometry = geometry = header.geometry
        self.size = geometry.size
        self.cluster_size = geometry.cluster_size
        self.block_size = geometry.block_size
        self.whole_clusters = self.block_size < self.cluster_size
        metadata = fixed_metadata(header)
        self._space = space = Space(fd, geometry, metadata)
        l1, damaged = load_l1(fd, geometry, header.l1_table_offset, metadata, space.end)
        self._refcounts: Refcounts | None = None
        if not self.read_only:
            refcounts = Refcounts(fd, geometry, header, space, metadata, trusted=self._trusted)
            self._refcounts = refcounts
            if refcounts.trusted:
                for offset, clusters in free_runs(fd, geometry, refcounts.table, space.end):
                    space.add_free(offset, clusters)
        self._tables = Tables(
            fd,
            geometry,
            l1,
            metadata,
            lambda: space.end,
            self._refcounts.get if self._refcounts is not None else None,
            damaged,
            header.l1_table_offset,
        )
        self._changes = Changes(fd, geometry, self._tables, space)
        self._changes.log_to(self._redo)
        # What `locate` needs, within reach.
        self._slice = self._tables.young.get
        self._slice_bits = geometry.slice_bits
        self._slice_mask = geometry.slice_entries - 1
        self._cluster_bits = geometry.cluster_bits
        self._cluster_mask = geometry.cluster_size - 1
        self._block_bits = geometry.block_size.bit_length() - 1
        self._extended = geometry.extended

    # -- where things are --------------------------------------------------------------

    def locate(self, offset: int, length: int) -> int:
        """See `Leaf.locate`; answers from slices that were asked for recently."""
        entries = self._slice(offset >> self._slice_bits)
        if entries is None:
            return SCATTERED
        index = (offset >> self._cluster_bits) & self._slice_mask
        inside = offset & self._cluster_mask
        last = inside + length - 1
        if last > self._cluster_mask:
            return self._locate_long(offset, length)
        if self._extended:
            entry = entries[2 * index]
            bitmap = entries[2 * index + 1]
            mask = (2 << (last >> self._block_bits)) - (1 << (inside >> self._block_bits))
            if bitmap & mask == mask:
                return (entry & OFFSET) + inside
            if (bitmap >> 32) & mask == mask:
                return ALL_ZERO
            if self.backing is None and not bitmap & mask and not entry & COMPRESSED:
                return ALL_ZERO
            return SCATTERED
        entry = entries[index]
        if not entry & FLAGGED:
            if entry:
                return (entry & OFFSET) + inside
            return ALL_ZERO if self.backing is None else SCATTERED
        return SCATTERED if entry & COMPRESSED else ALL_ZERO

    def _locate_long(self, offset: int, length: int) -> int:
        """`locate` for a range of several clusters: the same for each, and in a row."""
        end = offset + length
        stop = (offset | self._cluster_mask) + 1
        host = self.locate(offset, stop - offset)
        while stop < end and host != SCATTERED:
            start, stop = stop, min(end, stop + self._cluster_mask + 1)
            expected = host + start - offset if host >= 0 else host
            if self.locate(start, stop - start) != expected:
                return SCATTERED
        return host

    def extents(self, offset: int, length: int) -> Iterator[LeafExtent]:
        """See `Leaf.extents`. Raises LeafFormatError at a damaged entry of an L1 or L2 table."""
        end = offset + length
        hole = State.ZERO if self.backing is None else State.UNALLOCATED
        while offset < end:
            entries = self._tables.load(offset)
            if entries is None:
                stop = min(end, self._tables.next_table(offset))
                yield LeafExtent(offset, stop - offset, hole)
            else:
                stop = min(end, ((offset >> self._slice_bits) + 1) << self._slice_bits)
                for extent in slice_extents(self._geometry, entries, offset, stop, hole):
                    if extent.host == DAMAGED_PLACE:
                        raise self._tables.damage(extent.offset)
                    yield extent
            offset = stop

    def read(self, extent: LeafExtent, view: memoryview) -> None:
        """See `Leaf.read`. Raises OSError, EIO if compressed data is damaged."""
        if extent.state is State.COMPRESSED:
            content = unpack(self.fd, self._geometry, extent.host, self._header.compression)
            inside = extent.offset & self._cluster_mask
            view[:] = content[inside : inside + extent.length]
        else:
            read_exactly(self.fd, view, extent.host)

    # -- changes -----------------------------------------------------------------------

    def write(self, offset: int, view: memoryview) -> None:
        """See `Leaf.write`. Raises LeafFormatError where an L2 table is damaged."""
        host = self.locate(offset, len(view))
        if host >= 0:
            write_exactly(self.fd, view, host)
        else:
            self._changes.write(offset, view)

    def zero(self, offset: int, length: int, *, unmap: bool, as_backing: bool = False) -> None:
        """See `Leaf.zero`. Raises LeafFormatError where an L2 table is damaged.

        With ``unmap`` whole clusters are freed; without it space is kept and reserved.
        """
        self._changes.zero(offset, length, unmap=unmap, backing=self.backing is not None)

    # -- durability --------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """See `Leaf.dirty`."""
        return self._tables.dirty

    def _begin_flush(self) -> Callable[[], None]:
        """See `Leaf.begin_flush`, and the module's docstring for the order of things."""
        assert self._refcounts is not None, "the image is read-only"
        self._refcounts_ok = True
        # In this order each is undone by `end_flush`, wherever memory runs out.
        # Refcounts may make the file grow: not before damage is recorded.
        plans = []
        if not self._tables.alarmed:
            plans = self._refcounts.take_plans(everything=self._settling)
        self._in_flush = [], plans
        dropped = self._space.take_dropped()
        self._in_flush = dropped, plans
        tables = self._tables.begin_flush() if self._tables.dirty else None

        def finish() -> None:
            if tables is None and not plans:
                self._syncs.sync(self.fd)
            else:
                self._write_metadata(tables or TableSnapshot(), plans)
            self._punch(dropped)

        return finish

    def _write_metadata(self, tables: TableSnapshot, plans: list[RefcountPlan]) -> None:
        """Worker: the flush proper."""
        header = self._header.marked(dirty=True, corrupt=bool(tables.damage) or None)
        if header != self._header:
            store_features(self.fd, header)
        for place, entry in tables.pins:
            write_exactly(self.fd, memoryview(store_words([entry])), place)
        self._syncs.sync(self.fd)
        self._header = header
        if tables.damage:
            log.error("%s is marked corrupt from now on: %s", self.path, tables.damage)
        write_tables(self.fd, tables, self._geometry, header.l1_table_offset, self._syncs)
        self._write_refcounts(plans)

    def _punch(self, dropped: list[Dropped]) -> None:
        """Worker: give the space of what was let go of back to the file system, now that no
        table in the file refers to it. It is not used before `end_flush`."""
        for offset, length, compressed in dropped:
            if not compressed:
                files.punch_hole(self.fd, offset, length)

    def _write_refcounts(self, plans: list[RefcountPlan]) -> None:
        """Worker: a failure costs no data, only a rebuild at the next open; unless it is a
        sync that fails."""
        try:
            for plan in plans:
                self._header = plan.apply(self.fd, self._header, self._syncs)
        except SyncError:
            raise
        except OSError as error:
            log.warning("%s: the refcounts could not be written: %s", self.path, error)
            self._refcounts_ok = False

    def _end_flush(self, *, ok: bool) -> None:
        assert self._refcounts is not None
        (dropped, plans), self._in_flush = self._in_flush, ([], [])
        self._tables.end_flush(ok=ok)
        if ok:
            self._space.release(dropped)
            self._refcounts.applied(plans, ok=self._refcounts_ok)
        else:
            self._space.keep_dropped(dropped)
            self._refcounts.postponed(plans)

    def _settle(self) -> None:
        """Worker: bring everything to the file, refcounts too. Raises OSError."""
        assert self._refcounts is not None
        self._settling = True
        try:
            while True:
                with flushing(self) as finish:
                    finish()
                # What became free at the end of one flush is written by the next.
                if not self._tables.dirty and not self._refcounts.pending:
                    return
        finally:
            self._settling = False

    def begin_redo(self) -> None:
        """Record all changes from now on, in a log that outlives this process (may block)."""
        self._redo = start(self.fd, self.path, self._set_stamp)
        self._syncs.guard(self._redo)
        self._changes.log_to(self._redo)

    def _set_stamp(self, stamp: int) -> None:
        """Write a stamp, or 0, to the header, not synced. Raises OSError."""
        self._header = self._header.stamped(stamp)
        store_features(self.fd, self._header)

    def replace_header(self, header: Header) -> None:
        """Worker: install another header, durably. Raises LeafUnsupportedError, OSError."""
        if header == self._header:
            return
        try:
            self._header = install(self.fd, self._header, header, self._syncs)
        except OSError:
            # How far it came, the file says. A refcount table that moves rewrites all fields.
            self._header = reread_header(self.fd)
            raise

    def _first_unallocated(self) -> int | None:
        return first_unallocated(self.fd, self._header, self._tables)

    def _drop_backing(self) -> None:
        self.replace_header(self._header.with_backing(None))

    def _record_backing(self, backing: BackingReference) -> None:
        self.replace_header(self._header.with_backing(backing))

    def _leave_clean(self) -> None:
        assert self._refcounts is not None
        self._settle()
        self._space.trim_file()
        dirty = self._header.dirty
        if dirty and not self._refcounts.lost:
            self._syncs.sync(self.fd)
            self._header = self._header.marked(dirty=False)
        self._set_stamp(0)
        if dirty:
            self._syncs.sync(self.fd)

    def _files(self) -> list[int]:
        return [self.fd]

    # -- looking at it -----------------------------------------------------------------

    def _check(self, *, repair: bool) -> CheckResult:
        result, self._header = check_image(self.fd, self._header, self._syncs, repair=repair)
        if result.repaired:
            self._load()
        if repair:
            result, self._mended = self._mended.then(result), CheckResult()
        return result

    def describe(self) -> dict[str, object]:
        """See `Leaf.describe`."""
        header = self._header
        return {
            "cluster-size": header.cluster_size,
            "compat": "0.10" if header.version == 2 else "1.1",
            "compression-type": header.compression,
            "lazy-refcounts": bool(header.compatible_features & LAZY_REFCOUNTS),
            "refcount-bits": 1 << header.refcount_order,
            "corrupt": header.corrupt,
            "extended-l2": header.extended,
        }
