# SPDX-License-Identifier: Apache-2.0
"""QED leaves, from the specification: docs/interop/qed_spec.rst in QEMU's sources.

Crash order (invariants 2 and 3). A flush has up to four steps, each of them synced
before the next begins:

1. *Data.* A cluster is written in full, at the end of the file, before any table names it.
   Without that barrier an entry could outlive the data it points to.
2. *Pages of L2 tables.* Entries do not tear (8 bytes, aligned), and each is true by
   itself: a page of which a crash leaves some old and some new sectors shows some
   clusters as they were before.
3. *The L1 table*, if there are new L2 tables: an L1 entry may only name a table that is
   all there. (Rare: once in 2 GiB of disk with the default sizes.)

What a crash leaves besides is clusters that no table names. Nothing wrong follows from
them, but qemu-img counts them as leaks, so before the first allocation `NEED_CHECK` is set
and synced: asking for a flush (`FlushNeeded`) brings that about in a worker. A clean close
cuts off what is unused behind the last cluster, syncs, and only then clears the bit. An
image that is opened for writing with the bit set is checked and repaired first
(`nbdstream.leaf.qed.check`), as the specification demands.

Clusters never change hands (see `nbdstream.leaf.qed.tables`). Zeroing a data cluster punches
a hole in place. Zeroing an unallocated one marks it as a zero cluster only where the backing has
zeroes, too: QEMU's driver fills up a zero cluster of which it writes a part with what the backing
has there. Elsewhere it gets a data cluster that is a hole.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

from nbdstream.errors import LeafFormatError, LeafUnsupportedError
from nbdstream.extents import align_down
from nbdstream.leaf import files, redo
from nbdstream.leaf.base import (
    BackingReference,
    CheckResult,
    FlushNeeded,
    LeafExtent,
    State,
    write_exactly,
)
from nbdstream.leaf.durability import DurableLeaf, Syncs, reread
from nbdstream.leaf.locking import open_locked
from nbdstream.leaf.pages import write_pages
from nbdstream.leaf.qed.check import check_image, first_unallocated, pin_beyond_end
from nbdstream.leaf.qed.header import (
    NEED_CHECK,
    install_backing,
    read_backing,
    read_header,
    without_backing,
)
from nbdstream.leaf.qed.redo import recover
from nbdstream.leaf.qed.tables import UNALLOCATED, ZERO, Tables

log = logging.getLogger(__name__)


class QedLeaf(DurableLeaf):
    """An open QED image; see the module's docstring for what is durable when."""

    format = "qed"
    may_compress = False

    def __init__(self, path: str, *, read_only: bool, repair: bool) -> None:
        """Open an image (may block); one that was not closed clean is repaired first,
        unless it is opened read-only. What no crash leaves is repaired only with ``repair``.
        What that found is in the result of the first `check` with ``repair``.

        Raises LeafInUseError, LeafFormatError, LeafUnsupportedError, OSError.
        """
        self.path = path
        self.read_only = read_only
        self.fd = open_locked(path, read_only=read_only)
        self._syncs = Syncs(path)
        self._redo = redo.RedoLog()
        try:
            self._open(repair=repair)
        except LeafFormatError as error:
            os.close(self.fd)
            raise LeafFormatError(f"{path}: {error}") from None
        except LeafUnsupportedError as error:
            os.close(self.fd)
            raise LeafUnsupportedError(f"{path}: {error}") from None
        except BaseException:
            os.close(self.fd)
            raise
        self.size = self._header.image_size
        self.cluster_size = self.block_size = self._header.cluster_size

    def _open(self, *, repair: bool) -> None:
        self._mended = CheckResult()
        self._header = read_header(self.fd)
        self.backing = read_backing(self.fd, self._header)
        if not self.read_only:
            redo.recover(self.fd, self.path, self._header.stamp, self._recover)
        # "May be opened safely after clearing the unknown bits"; none but the stamp is known.
        if self._header.autoclear_features and not self.read_only:
            self._header = replace(self._header, autoclear_features=0)
            self._header.write(self.fd)
            self._syncs.sync(self.fd)
        self._marked = bool(self._header.features & NEED_CHECK)  # durably so
        self._mark_wanted = False
        self._marking = False
        if self._marked and not self.read_only:
            self._syncs.sync(self.fd)
            reread(self.fd)
            self._repair(asked=repair)
        self._load()
        if not self.read_only:
            self._redo = redo.start(self.fd, self.path, self._set_stamp)
            self._syncs.guard(self._redo)
            self._tables.log_to(self._redo)

    def _recover(self, records: list[redo.Record]) -> None:
        self._syncs.sync(self.fd)
        recover(self.fd, self._header, records, self._syncs)

    def _set_stamp(self, stamp: int) -> None:
        """Write a stamp, or 0, to the header, not synced. Raises OSError."""
        self._header = self._header.stamped(stamp)
        self._header.write(self.fd)

    def _load(self) -> None:
        end = align_down(os.fstat(self.fd).st_size, self._header.cluster_size)
        self._tables = tables = Tables(self.fd, self._header, end)
        if not self.read_only and pin_beyond_end(
            self.fd, self._header, filter(None, tables.l1), self._syncs
        ):
            self._tables = Tables(self.fd, self._header, end)
        self._tables.log_to(self._redo)

    def _repair(self, *, asked: bool) -> None:
        fd, header, syncs = self.fd, self._header, self._syncs
        result = check_image(fd, header, syncs, repair=True, strict=not asked)
        if result.errors and check_image(self.fd, self._header, self._syncs, repair=False).errors:
            raise LeafFormatError(f"is damaged beyond repair: {'; '.join(result.messages)}")
        found = "; ".join(result.messages) or "nothing was amiss"
        log.warning("%s was not closed clean: checked it, %s", self.path, found)
        if asked:
            self._mended = result

    # -- where things are ------------------------------------------------------------

    def locate(self, offset: int, length: int) -> int:
        """See `Leaf.locate`; answers from the pages of tables that are in memory."""
        return self._tables.locate(offset, length)

    def extents(self, offset: int, length: int) -> Iterator[LeafExtent]:
        """See `Leaf.extents`. Whole clusters that are holes in the file are ZERO."""
        bits = self._tables.cluster_bits
        end = offset + length
        hole = State.UNALLOCATED if self.backing is not None else State.ZERO
        for cluster, count, entry in self._tables.runs(offset >> bits, ((end - 1) >> bits) + 1):
            start = max(cluster << bits, offset)
            size = min((cluster + count) << bits, end) - start
            if entry > ZERO:
                host = entry + start - (cluster << bits)
                yield from files.stored_extents(self.fd, start, size, host, self.cluster_size)
            else:
                yield LeafExtent(start, size, State.ZERO if entry == ZERO else hole)

    # -- changes ---------------------------------------------------------------------

    def write(self, offset: int, view: memoryview) -> None:
        """See `Leaf.write`. New clusters come from the file's end."""
        tables = self._tables
        host = tables.locate(offset, len(view))
        if host >= 0:
            write_exactly(self.fd, view, host)
            return
        bits = tables.cluster_bits
        end = offset + len(view)
        first, stop = offset >> bits, ((end - 1) >> bits) + 1
        runs = list(tables.runs(first, stop))
        self._prepare(runs)
        # The first run that is new may add a table; so claims come after all preparation.
        claims = [
            tables.claim(cluster, count) if entry <= ZERO else None
            for cluster, count, entry in runs
        ]
        self._redo.reserve(len(runs))
        fresh = tables.end
        for cluster, count, entry in runs:
            start = max(cluster << bits, offset)
            part = view[start - offset : min((cluster + count) << bits, end) - offset]
            if entry > ZERO:
                write_exactly(self.fd, part, entry + start - (cluster << bits))
            else:
                write_exactly(self.fd, part, fresh)
                fresh += count << bits
        if end == self.size and runs[-1][2] <= ZERO and end % self.cluster_size:
            # The disk ends within its last cluster, but the file must hold it whole, and
            # nothing that a failed write left there.
            os.ftruncate(self.fd, fresh - self.cluster_size + end % self.cluster_size)
            os.ftruncate(self.fd, fresh)
        for (cluster, count, _), claim in zip(runs, claims, strict=True):
            if claim is not None:
                tables.store(claim, cluster, tables.end)
                tables.end += count << bits

    def zero(self, offset: int, length: int, *, unmap: bool, as_backing: bool = False) -> None:
        """See `Leaf.zero`. A data cluster stays where it is, and is zeroed or punched."""
        tables = self._tables
        bits = tables.cluster_bits
        end = offset + length
        runs = list(tables.runs(offset >> bits, ((end - 1) >> bits) + 1))
        # Without a backing, what is unallocated reads as zeroes already.
        marks = [run for run in runs if run[2] == UNALLOCATED and self.backing is not None]
        self._prepare(marks)
        claims = [(cluster, tables.claim(cluster, count)) for cluster, count, _ in marks]
        self._redo.reserve(len(claims))
        for cluster, count, entry in runs:
            if entry > ZERO:
                start = max(cluster << bits, offset)
                size = min((cluster + count) << bits, end) - start
                host = entry + start - (cluster << bits)
                files.zero_range(self.fd, host, size, unmap=unmap)
        if as_backing:
            for cluster, claim in claims:
                tables.store(claim, cluster, ZERO)
            return
        counts = [count for _, count, _ in marks]
        self._add_holes(sum(counts) << bits, unmap=unmap)
        for (cluster, claim), count in zip(claims, counts, strict=True):
            tables.store(claim, cluster, tables.end)
            tables.end += count << bits

    def _add_holes(self, length: int, *, unmap: bool) -> None:
        """Have zeroes at the end of the clusters in use, whatever a failed write left there."""
        if length:
            end = self._tables.end
            os.ftruncate(self.fd, end)
            os.ftruncate(self.fd, end + length)
            if not unmap:
                files.zero_range(self.fd, end, length, unmap=False)

    def _prepare(self, runs: list[tuple[int, int, int]]) -> None:
        """Have NEED_CHECK set, and an L2 table, for every run whose entries will change.

        Raises FlushNeeded, OSError.
        """
        changing = [(cluster, count) for cluster, count, entry in runs if entry <= ZERO]
        if changing and not self._marked:
            self._mark_wanted = True
            raise FlushNeeded
        entries = self._header.table_entries
        for cluster, count in changing:
            for index in range(cluster // entries, (cluster + count - 1) // entries + 1):
                if self._tables.l1[index] == UNALLOCATED:
                    self._tables.add_table(index * entries)

    # -- durability ------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """See `Leaf.dirty`: entries that the file lacks, or `NEED_CHECK` that is wanted."""
        tables = self._tables
        return tables.cache.dirty or bool(tables.dirty_l1) or self._mark_wanted

    def _begin_flush(self) -> Callable[[], None]:
        l2_pages, l1_pages = self._tables.begin_flush()
        marking = self._marking = self._mark_wanted
        syncs = self._syncs

        def flush() -> None:
            if marking:
                self._header.with_mark(True).write(self.fd)
            syncs.sync(self.fd)
            for pages in (l2_pages, l1_pages):
                if pages:
                    write_pages(self.fd, pages.items())
                    syncs.sync(self.fd)

        return flush

    def _end_flush(self, *, ok: bool) -> None:
        # Only if it was this flush that did it: it may have been asked for in the meantime.
        if ok and self._marking:
            self._header = self._header.with_mark(True)
            self._marked = True
            self._mark_wanted = False
        self._marking = False
        self._tables.end_flush(ok=ok)

    def _first_unallocated(self) -> int | None:
        return first_unallocated(self.fd, self._header, self._tables)

    def _drop_backing(self) -> None:
        header = without_backing(self._header)
        header.write(self.fd)  # within one sector: it happens, or it does not
        self._syncs.sync(self.fd)
        self._header = header

    def _record_backing(self, backing: BackingReference) -> None:
        self._header = install_backing(self.fd, self._header, backing, self._syncs)

    def _leave_clean(self) -> None:
        self._settle()
        self._set_stamp(0)
        if not self._marked:
            return
        if os.fstat(self.fd).st_size != self._tables.end:
            os.ftruncate(self.fd, self._tables.end)
            self._syncs.sync(self.fd)  # while the bit is set: what is cut off was a leak
        self._header.with_mark(False).write(self.fd)
        self._syncs.sync(self.fd)

    def _files(self) -> list[int]:
        return [self.fd]

    # -- looking at it ---------------------------------------------------------------

    def _check(self, *, repair: bool) -> CheckResult:
        result = check_image(self.fd, self._header, self._syncs, repair=repair)
        if repair and result.repaired:
            self._load()
        if repair:
            result, self._mended = self._mended.then(result), CheckResult()
        return result

    def describe(self) -> dict[str, object]:
        """See `Leaf.describe`: the size of the tables in clusters, and `NEED_CHECK`."""
        return {
            "table-size": self._header.table_size,
            "need-check": bool(self._header.features & NEED_CHECK),
        }


def open_image(path: str, *, read_only: bool, repair: bool = False) -> QedLeaf:
    """See `nbdstream.leaf.open_leaf`."""
    return QedLeaf(path, read_only=read_only, repair=repair)
