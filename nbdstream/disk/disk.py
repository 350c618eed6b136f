# SPDX-License-Identifier: Apache-2.0
"""The streamed disk: what a guest sees of a leaf and its backing together.

It decides, for each request, what is local, what has to be fetched first, and what
becomes of the rest. docs/concurrency.md walks through the races; in short:

- Only the event loop changes the leaf, by plain calls; whatever looks at the leaf and
  acts on what it saw does both without an await in between (`Atomically` repeats
  such a step as a whole when the leaf first needs something done). Hence a guest
  write wins over any fetch (invariant 1), without locks.
- After each await, what was known of the leaf is looked up again.
- Writes and zeroes of whole blocks need nothing from the backing (invariant 9). A
  write that covers a part of a block first has that block made DATA; then it is an
  overwrite in place.
"""

import errno
import os
from collections.abc import Callable
from functools import partial
from time import perf_counter

import trio

from nbdstream.backing.base import Backing, Priority
from nbdstream.disk.atomic import Atomically
from nbdstream.disk.beneath import Beneath
from nbdstream.disk.changes import Changer, DetectZeroes
from nbdstream.disk.fetch import Fetch, Fetcher
from nbdstream.disk.flush import Flusher
from nbdstream.disk.gate import Gate, GateState
from nbdstream.disk.lookup import Lookup
from nbdstream.disk.populate import LOOK_PIECE, Populator, Unit, first_gap
from nbdstream.disk.readahead import Readahead
from nbdstream.disk.reads import COPY_PIECE, Reader
from nbdstream.disk.status import block_status
from nbdstream.disk.writeback import SLOW, Writeback
from nbdstream.export import Hit, StatusExtent
from nbdstream.health import Health
from nbdstream.leaf.base import (
    ALL_ZERO,
    SCATTERED,
    BackingReference,
    ColdMetadata,
    FlushNeeded,
    Leaf,
    LeafExtent,
)
from nbdstream.leaf.files import hot_read_flags
from nbdstream.tasks import surely

# In the hot path globals are faster than attributes of enums.
_MISS, _DONE, _ZERO = Hit.MISS, Hit.DONE, Hit.ZERO


class StreamedDisk:
    """Implements `nbdstream.export.Export` over a leaf and a backing.

    Attributes:
        copy_on_read: whether what a guest reads is kept; may be set at any time.
        thin: nothing is copied into the leaf but what a guest's writes need.
        reads_ahead: whether more is fetched than guests ask for; likewise.
        detect_zeroes: what becomes of guest writes of zeroes.
        backing: None once everything is local, or if there never was one.
        gate: whether guests may change the disk now.
        health: what has failed for good.
        writeback: pushes written data out of the page cache.
        completed: set when everything is local and the backing is not needed any more.
        on_read: called with the offset and length of all that guests read, hits included,
            and of what has to be fetched for a write; from any thread.
    """

    def __init__(
        self,
        leaf: Leaf,
        backing: Backing | None,
        nursery: trio.Nursery,
        *,
        copy_on_read: bool,
        thin: bool,
        detect_zeroes: DetectZeroes,
        health: Health,
        writeback: Writeback,
    ) -> None:
        self.backing = backing
        self.name = ""
        self.description = ""
        self.size = leaf.size
        self.read_only = leaf.read_only
        self.preferred_block_size = max(leaf.block_size, 4096)
        self.copy_on_read = copy_on_read
        self.thin = thin
        self.reads_ahead = True
        self.demand_misses = 0
        self.demand_bytes = 0
        self.copy_on_write = 0
        self.detect_zeroes = detect_zeroes
        self._looks_for_zeroes = detect_zeroes is not DetectZeroes.OFF
        self.on_read: Callable[[int, int], None] | None = None
        self.gate = Gate()
        self.health = health
        self.completed = trio.Event()
        self.writeback = writeback
        self._nursery = nursery
        self._earlier: dict[str, int] = {}
        self._attach(leaf)

    def _attach(self, leaf: Leaf) -> None:
        """Put the parts together that work on this leaf."""
        self.leaf = leaf
        self._locate: Callable[[int, int], int] = leaf.locate
        self._hot = hot_read_flags(leaf.fd)
        self._flusher = Flusher(leaf)
        self._lookup = Lookup(leaf, self.backing)
        self._atomically = Atomically(self.flush, self.gate)
        self._reader = Reader(leaf, self._lookup, self._atomically, self._demand, self._hot)
        changes = Changer(
            leaf,
            self._lookup,
            self._atomically,
            gate=self.gate,
            writeback=self.writeback,
            detect_zeroes=self.detect_zeroes,
            read=self._reader.read,
            fetch=self._fetch_for_write,
            flush=self.flush,
        )
        self.write, self.zero, self.trim = changes.write, changes.zero, changes.trim
        self._fetcher: Fetcher | None = None
        self._populator: Populator | None = None
        self._readahead: Readahead | None = None
        self._beneath: Beneath | None = None
        if self.backing is not None:
            self._attach_backing(leaf, self.backing)

    def _attach_backing(self, leaf: Leaf, backing: Backing) -> None:
        backing.set_unit_least(leaf.cluster_size)
        report, stored = self.health.report, self.writeback.stored
        fetcher = Fetcher(leaf, backing, self._nursery, self._atomically, report, stored)
        self._fetcher = fetcher
        if backing.local is not None:
            self._beneath = Beneath(
                leaf, backing, backing.local, fetcher, self._hot, lambda: self._keeps
            )
        if not leaf.read_only:
            store = not self.thin
            self._populator = Populator(
                leaf, backing, self._lookup, fetcher, self._atomically, self.writeback, store=store
            )
        if not leaf.read_only and backing.local is None:  # else the store reads ahead
            self._readahead = Readahead(
                leaf, backing, fetcher, self._nursery, self.leaf_extents, report
            )

    @property
    def _keeps(self) -> bool:
        """Whether what guests read is put into the leaf."""
        return self.copy_on_read and not (self.thin or self.read_only or self.gate.standing_by)

    # -- the hot path ----------------------------------------------------------------

    def read_nowait(self, view: memoryview, offset: int) -> Hit:
        """Answer a read from the page cache, or not at all."""
        on_read = self.on_read
        if on_read is not None:
            on_read(offset, len(view))
        host = self._locate(offset, len(view))
        if host >= 0:
            try:
                done = os.preadv(self.leaf.fd, (view,), host, self._hot)
            except OSError:
                return _MISS  # not in the page cache (EAGAIN), or the slow path's to report
            return _DONE if done == len(view) else _MISS
        if host == ALL_ZERO:
            return _ZERO
        return _MISS if self._beneath is None else self._beneath.read_nowait(view, offset)

    def read_from_any_thread(self, view: memoryview, offset: int) -> Hit:
        """`read_nowait` for threads other than the event loop's.

        The lookup only reads what the loop changes in single steps. That it gives the same
        place before and after the read proves that the space was not given back in
        between: before space is used again there is a flush.
        """
        host = self._locate(offset, len(view))
        if host == SCATTERED:
            return Hit.MISS
        hit = self.read_nowait(view, offset)
        return hit if host == self._locate(offset, len(view)) else Hit.MISS

    def write_nowait(self, view: memoryview, offset: int) -> Hit:
        """Write to the page cache if neither the backing nor metadata is in the way."""
        length = len(view)
        began = perf_counter()
        if (
            length > COPY_PIECE
            or self._looks_for_zeroes
            or self.gate.reason
            or began < self.writeback.congested_until
        ):
            return _MISS
        host = self._locate(offset, length)
        if host >= 0:
            hit = _DONE if os.pwrite(self.leaf.fd, view, host) == length else _MISS
        else:
            hit = self._allocate_nowait(view, offset)
        if perf_counter() - began > SLOW:
            self.writeback.held_up()
        return hit

    def _allocate_nowait(self, view: memoryview, offset: int) -> Hit:
        try:
            if self._lookup.obstacle(offset, len(view)) is not None:
                return Hit.MISS
            self.leaf.write(offset, view)
        except (ColdMetadata, FlushNeeded):
            return Hit.MISS
        return Hit.DONE

    # -- what takes longer -----------------------------------------------------------

    async def read(self, view: memoryview, offset: int) -> list[tuple[int, int]]:
        """See `Export.read`. Raises OSError, BackingError, LeafError."""
        if self.on_read is not None:
            self.on_read(offset, len(view))
        if self._beneath is not None and (brought := await self._beneath.read(view, offset)):
            self.demand_misses += 1
            self.demand_bytes += brought
            return []
        return await self._reader.read(view, offset)

    def _demand(self, missing: list[LeafExtent]) -> list[Fetch]:
        """Fetch what a guest waits for."""
        self.demand_misses += 1
        readahead = self._readahead if self._keeps and self.reads_ahead else None
        fetches: list[Fetch] = []
        for extent in missing:
            self.demand_bytes += extent.length
            wanted = readahead.widened(extent) if readahead is not None else extent
            fetches += self._start_fetch(wanted, Priority.DEMAND, store=self._keeps)
        if readahead is not None:
            readahead.missed(fetches)
        return fetches

    def _fetch_for_write(self, extent: LeafExtent) -> list[Fetch]:
        """Fetch what a guest's write covers only in part."""
        self.copy_on_write += 1
        if self.on_read is not None:
            self.on_read(extent.offset, extent.length)
        return self._start_fetch(extent, Priority.DEMAND, store=True)

    def _start_fetch(self, extent: LeafExtent, priority: Priority, *, store: bool) -> list[Fetch]:
        if self._fetcher is None or self.backing is None:
            raise OSError(errno.EIO, "unallocated data, but no backing to fetch it from")
        store = store and not self.read_only
        return self._fetcher.start(extent.offset, extent.length, priority, store=store)

    async def flush(self) -> None:
        """See `Export.flush`. Raises OSError."""
        # A leaf that was let go of was flushed, and nothing was completed since.
        if not self.read_only and not self.gate.let_go:
            await self._flusher.flush()

    async def let_go(self, reason: str) -> None:
        """Make everything durable, then close the leaf and unlock it: from now on flushes
        succeed, and nothing else does. No request and no job is under way.

        Raises:
            OSError, LeafError: the leaf could not be left clean; it is closed all the same.
        """
        self.gate.close(GateState.LET_GO, reason)
        self._locate = lambda _offset, _length: SCATTERED
        try:
            await self._flusher.flush_then(lambda: None)
        finally:
            await surely(self.leaf.close)

    def take_back(self, leaf: Leaf) -> None:
        """Go on with the image that was let go of, opened again; the disk closes it at its end."""
        self._earlier = self._counted()
        self._attach(leaf)
        self.gate.open()

    # -- whose copy counts (migration) -------------------------------------------------

    async def freeze(self, reason: str, *, hold: float = 0.0) -> None:
        """Refuse all changes by guests from now on (EPERM), and make durable those that
        were completed. Raises OSError; it is frozen all the same.

        Each change waits for ``hold`` seconds before: opening the gate by then lets it happen.
        """
        self.gate.close(GateState.FROZEN, reason, hold=hold)
        await self.flush()

    def stand_by(self) -> None:
        """The backing may still be written: keep nothing of it, rely on nothing that it told
        before, and let no guest write here."""
        reason = "standing by: the disk is still in use elsewhere"
        self.gate.close(GateState.STANDING_BY, reason)
        self._lookup.trusting = False

    def activate(self) -> None:
        """The backing does not change any more: from now on this is the disk."""
        assert self.backing is not None and self._fetcher is not None
        self.backing.forget()
        self._fetcher.disown()
        self._lookup.trusting = True
        self.gate.open()

    async def record_backing(self, backing: BackingReference) -> None:
        """Have the leaf know, durably, what it belongs to. Raises LeafError, OSError."""
        await self._flusher.flush_then(partial(self.leaf.record_backing, backing))

    # -- making it local -------------------------------------------------------------

    async def cache(self, offset: int, length: int) -> None:
        """See `Export.cache`: a read-only leaf keeps nothing. Raises OSError, BackingError,
        LeafError."""
        if self._populator is not None:
            await self.populate(offset, length, Priority.PREFETCH)

    async def bring(self, offset: int, length: int) -> None:
        """Make a range allocated that a guest waits for; see `Populator.bring`."""
        await self._population().bring(offset, length, self._demand)

    async def populate(self, offset: int, length: int, priority: Priority) -> int:
        """Make everything in a range allocated; see `Populator.populate`."""
        return await self._population().populate(offset, length, priority)

    async def next_unit(self, offset: int, end: int, priority: Priority) -> Unit | None:
        """Begin to make the next piece of a range allocated; see `Populator.next_unit`."""
        return await self._population().next_unit(offset, end, priority)

    async def fill_zero(self, offset: int, length: int) -> None:
        """Mark as zero what is a hole in the backing; see `Populator.fill_zero`."""
        await self._population().fill_zero(offset, length)

    def _population(self) -> Populator:
        if self.gate.standing_by:
            self.gate.check()
        if self._populator is None:
            raise OSError(errno.EROFS, "a read-only leaf keeps nothing")
        return self._populator

    async def next_unallocated(self, offset: int) -> LeafExtent | None:
        """The first unallocated extent at or after ``offset``; see `first_gap`."""
        return await first_gap(self._atomically, self._lookup, offset, self.size)

    async def complete(self, *, keep_backing: bool) -> None:
        """Everything is allocated: make that durable and let go of the backing.

        Raises OSError, LeafError; ValueError if something is still unallocated.
        """
        if await self.next_unallocated(0) is not None:
            raise ValueError("the leaf still has unallocated clusters")
        if keep_backing or self.leaf.backing is None:
            await self.flush()
        else:
            await self._flusher.flush_then(self.leaf.drop_backing)
        self.backing = self._beneath = None
        self.completed.set()

    # -- looking at it ---------------------------------------------------------------

    async def block_status(self, offset: int, length: int, limit: int) -> list[StatusExtent]:
        """See `Export.block_status`. Raises BackingError."""
        length = min(length, LOOK_PIECE)
        backing = self.backing
        extents = await self._atomically(self._lookup.some_extents, offset, length, limit)
        return await block_status(extents, backing, limit)

    async def leaf_extents(self, offset: int, length: int, limit: int) -> list[LeafExtent]:
        """At least one and at most ``limit`` of the leaf's extents from ``offset`` on; may
        cover less than asked. Never asks the backing, so its loss is no obstacle."""
        return await self._atomically(
            self._lookup.some_extents, offset, min(length, LOOK_PIECE), limit
        )

    def statistics(self) -> dict[str, int]:
        """Counters since the disk was opened, in bytes where the name says so."""
        return {
            "demand_misses": self.demand_misses,
            "demand_bytes": self.demand_bytes,
            "copy_on_write": self.copy_on_write,
            "fetches_in_flight": self._fetcher.in_flight if self._fetcher else 0,
            **self._counted(),
        }

    def _counted(self) -> dict[str, int]:
        """What the parts have counted that work on this leaf, and those before a take-back."""
        fetcher = self._fetcher
        counts = {
            "flushes": self._flusher.flushes,
            "fetched_bytes": fetcher.fetched_bytes if fetcher else 0,
            "stored_bytes": fetcher.stored_bytes if fetcher else 0,
            "zero_bytes": fetcher.zero_bytes if fetcher else 0,
            "store_failures": fetcher.store_failures if fetcher else 0,
            "readahead_bytes": self._readahead.bytes if self._readahead else 0,
        }
        return {name: count + self._earlier.get(name, 0) for name, count in counts.items()}
