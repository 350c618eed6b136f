# SPDX-License-Identifier: Apache-2.0
"""The raw leaf: guest offset = file offset, with an allocation map while it has a backing.

``disk.raw`` holds the data; ``disk.raw.map`` (see `nbdstream.leaf.raw.map`) says which
blocks of it count. Without a map everything counts: a plain disk.

Crash order (invariants 2 and 3). Three things reach the disk: data, bits, and the names
of the two files.

- *Data before bits.* A flush syncs the data file, and only then writes the bits that
  were set before it began. Without that barrier a crash could leave a bit whose block
  holds what the file system found there. A crash between the two loses bits only: these
  blocks are unallocated again, whatever their bytes, and are fetched or written again.
- *Bits before the flush returns*, hence the second sync. A flush without new bits needs
  just the first.
- Data written over allocated blocks, and zeroes punched into them, are under the bits'
  protection already: the first sync makes them durable.
- *An unmarked block may hold anything* (a write that a crash kept from being flushed), so
  zeroing one always goes to the file, though it may look like a hole.
- *The map goes last.* When nothing is unallocated any more it is unlinked, by the name that
  it has then (`nbdstream.leaf.raw.names`), and the directory synced. Before that the leaf has
  map and backing; after it, neither is needed.
"""

import os
from collections.abc import Callable, Iterator

from nbdstream.errors import LeafFormatError, UsageError
from nbdstream.leaf import MAP_SUFFIX, files, marks, redo
from nbdstream.leaf.base import (
    SCATTERED,
    BackingReference,
    CheckResult,
    LeafExtent,
    State,
    write_exactly,
)
from nbdstream.leaf.durability import DurableLeaf, Syncs
from nbdstream.leaf.locking import open_locked
from nbdstream.leaf.pages import write_pages
from nbdstream.leaf.probe import map_path
from nbdstream.leaf.raw import names
from nbdstream.leaf.raw.map import (
    BLOCK_SIZE,
    AllocationMap,
    MapHeader,
    create_map,
    is_cluster_size,
)
from nbdstream.units import format_count

DEFAULT_CLUSTER_SIZE = 65536


class RawLeaf(DurableLeaf):
    """A raw image; see the module's docstring for what is durable when.

    Attributes:
        on_allocated: called with the offset and length of what was not allocated before a
            write or zero, and is in the file now, whether or not that is durable.
    """

    format = "raw"
    may_compress = False
    block_size = BLOCK_SIZE

    def __init__(self, path: str, *, read_only: bool) -> None:
        """Open a raw image, and the map beside it if there is one (may block).

        Raises LeafInUseError, LeafFormatError, LeafUnsupportedError, OSError.
        """
        self.path = path
        self.read_only = read_only
        self._map_path = map_path(path)
        self.fd = open_locked(path, read_only=read_only)
        self._syncs = Syncs(path)
        self.on_allocated: Callable[[int, int], None] = _nothing
        self._map: AllocationMap | None = None
        self._redo = redo.RedoLog()
        try:
            self.size = os.fstat(self.fd).st_size
            self._open_map()
            if not read_only:
                self._begin_redo()
        except BaseException:
            for fd in self._files():
                os.close(fd)
            raise
        header = self._map.header if self._map else None
        self.cluster_size = header.cluster_size if header else DEFAULT_CLUSTER_SIZE
        self.backing = header.backing if header else None

    def _open_map(self) -> None:
        try:
            allocation = AllocationMap(self._map_path, read_only=self.read_only)
        except FileNotFoundError:
            if marks.needs_map(self.fd):
                raise LeafFormatError(
                    f"{self.path} is not complete, and what tells its data from the rest,"
                    f" {self._map_path}, is missing: put that file back"
                ) from None
            return
        if allocation.header.size != self.size:
            allocation.close()
            raise LeafFormatError(
                f"{self.path} is {self.size} bytes long, but its map belongs to a disk of"
                f" {allocation.header.size} bytes"
            )
        self._map = allocation
        if not self.read_only:
            marks.mark_map(self.fd)

    def _begin_redo(self) -> None:
        """Complete what a killed process had begun, and record what this one changes."""
        allocation = self._map
        stamp = allocation.stamp() if allocation is not None else 0
        redo.recover(self.fd, self.path, stamp, self._recover)
        if allocation is not None:
            self._redo = redo.start(self.fd, self.path, allocation.set_stamp)
            self._syncs.guard(self._redo)
            allocation.log_to(self._redo)

    def _recover(self, records: list[redo.Record]) -> None:
        assert self._map is not None
        self._syncs.sync(self.fd)
        self._map.recover(records, self._syncs)

    def on_failed_sync(self, call: Callable[[], None]) -> None:
        """Have it called, in a worker, when a sync fails: what the page cache has may differ from
        what is on the disk from then on."""
        self._syncs.on_failure = call

    # -- where things are ------------------------------------------------------------

    def locate(self, offset: int, length: int) -> int:
        """See `Leaf.locate`: the guest offset itself, where the map in memory allows it."""
        allocation = self._map
        if allocation is None or allocation.allocated(offset, length):
            return offset
        return SCATTERED

    def extents(self, offset: int, length: int) -> Iterator[LeafExtent]:
        """See `Leaf.extents`. Whole blocks that are holes in the file are ZERO."""
        if self._map is None:
            yield from files.stored_extents(self.fd, offset, length, offset, BLOCK_SIZE)
            return
        for start, stop, allocated in self._map.runs(offset, length):
            if allocated:
                yield from files.stored_extents(self.fd, start, stop - start, start, BLOCK_SIZE)
            else:
                yield LeafExtent(start, stop - start, State.UNALLOCATED)

    # -- changes ---------------------------------------------------------------------

    def write(self, offset: int, view: memoryview) -> None:
        """See `Leaf.write`."""
        allocation = self._map
        if allocation is None or allocation.allocated(offset, len(view)):
            write_exactly(self.fd, view, offset)
            return
        claims = allocation.claim(offset, len(view))
        write_exactly(self.fd, view, offset)
        allocation.mark(claims)
        self.on_allocated(offset, len(view))

    def zero(self, offset: int, length: int, *, unmap: bool, as_backing: bool = False) -> None:
        """See `Leaf.zero`. With ``unmap`` a hole is punched."""
        allocation = self._map
        claims = None
        if allocation is not None and not allocation.allocated(offset, length):
            claims = allocation.claim(offset, length)
        files.zero_range(self.fd, offset, length, unmap=unmap)
        if allocation is not None and claims is not None:
            allocation.mark(claims)
            self.on_allocated(offset, length)

    # -- durability ------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """See `Leaf.dirty`: bits of the map that the file lacks."""
        return self._map is not None and self._map.cache.dirty

    def _begin_flush(self) -> Callable[[], None]:
        allocation, syncs = self._map, self._syncs
        snapshot = allocation.cache.begin_flush() if allocation else {}

        def flush() -> None:
            syncs.sync(self.fd)
            if allocation is not None and snapshot:
                write_pages(allocation.fd, snapshot.items())
                syncs.sync(allocation.fd)

        return flush

    def _end_flush(self, *, ok: bool) -> None:
        if self._map is not None:
            self._map.cache.end_flush(ok=ok)

    def _first_unallocated(self) -> int | None:
        return self._map.first_unallocated() if self._map is not None else None

    def _drop_backing(self) -> None:
        allocation = self._map
        assert allocation is not None
        # First the mark: an image that has it, and no map, is refused.
        marks.unmark_map(self.fd)
        self._syncs.sync_attributes(self.fd)
        names.remove(allocation.fd, self._map_path, self._syncs)
        self._map = None
        allocation.close()
        self._redo.discard()

    def _record_backing(self, backing: BackingReference) -> None:
        assert self._map is not None
        self._map.write_header(backing, self._syncs)

    def _files(self) -> list[int]:
        return [self.fd] if self._map is None else [self._map.fd, self.fd]

    # -- looking at it ---------------------------------------------------------------

    def _check(self, *, repair: bool) -> CheckResult:
        """Leaks are blocks that are stored but do not count, left by a crash; a repair punches
        them out. What could be an error is found when the leaf is opened."""
        leaks = 0
        for extent in self.extents(0, self.size):
            if extent.state is not State.UNALLOCATED:
                continue
            for stored in files.stored_extents(
                self.fd, extent.offset, extent.length, extent.offset, BLOCK_SIZE
            ):
                if stored.state is State.DATA:
                    leaks += -(-stored.length // BLOCK_SIZE)
                    if repair:
                        files.zero_range(self.fd, stored.offset, stored.length, unmap=True)
        messages = (f"{format_count(leaks, 'block')} stored but not allocated",) if leaks else ()
        return CheckResult(leaks=leaks, repaired=leaks if repair else 0, messages=messages)

    def describe(self) -> dict[str, object]:
        """See `Leaf.describe`: the name of the map, if there is one."""
        return {"map": self._map_path} if self._map is not None else {}


def _nothing(_offset: int, _length: int) -> None:
    """`RawLeaf.on_allocated` of a leaf that no other process reads."""


def open_image(path: str, *, read_only: bool, repair: bool = False) -> RawLeaf:
    """See `nbdstream.leaf.open_leaf`; ``repair`` makes no difference."""
    return RawLeaf(path, read_only=read_only)


def create(
    path: str, *, size: int, cluster_size: int | None, backing: BackingReference | None
) -> None:
    """Make a new sparse raw image, with a map beside it if it has a backing, both durably.

    Raises UsageError, LeafError, OSError (a file is there already; a full disk).
    """
    if cluster_size is None:
        cluster_size = DEFAULT_CLUSTER_SIZE
    if not is_cluster_size(cluster_size):
        raise UsageError(
            f"cluster size {cluster_size}: a raw leaf needs a power of two from 4k to 64M"
        )
    if backing is not None:
        create_map(path + MAP_SUFFIX, MapHeader(size, cluster_size, backing))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(fd, size)
        Syncs(path).sync(fd)
    finally:
        os.close(fd)
