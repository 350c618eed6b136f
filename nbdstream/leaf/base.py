# SPDX-License-Identifier: Apache-2.0
"""What the disk asks of a leaf format: the one interface that raw, qcow2 and QED implement.

A format knows two things: where guest data lies in the file, and how allocation
becomes durable after the data it exposes. It knows nothing of NBD, of backings or
of streaming; no module outside ``nbdstream.leaf`` knows which format it holds.

**Threads.** Every method runs in one thread, the event loop's, and does no more than
look at memory and write to the page cache, *except* those marked "worker": these may
block (cold reads, syncs), run in a worker thread, and touch nothing that the others
change. A method that would have to read metadata which is neither in memory nor in
the page cache raises `ColdMetadata` before it has changed anything; the caller warms
the page cache in a worker and calls again. One that would have to grow the dirty
metadata past its bound raises `FlushNeeded`, likewise before any change.

**Because each call is atomic with respect to the event loop, "check what is
allocated, then store only the rest" needs no lock**: it is two calls without an
``await`` between them. Invariant 1 (a guest write wins) rests on that.

**Durability** is in two steps, so that the file can be synced outside of the loop:
``begin_flush`` (loop) takes a snapshot of the dirty metadata; the function that it
returns (worker) syncs the *data* written so far, then writes and syncs the snapshot;
``end_flush`` (loop) learns how that went. `flushing` puts the three together. Metadata
never goes to the file by another way while the leaf is open, so allocation is never
durable before its data (invariant 3). One flush runs at a time; the disk sees to that.

**The first failed sync is final** (invariant 12): see `nbdstream.leaf.durability`.

**Errors.** `Leaf.locate` never raises. Every other method raises nothing but

- `ColdMetadata` and `FlushNeeded`: signals; nothing has changed;
- ``OSError``: the system refused; `SyncError` among them;
- ``LeafError``: the image. ``LeafFormatError`` for damaged metadata: it names the entry, and
  is raised only where a range under that entry is touched. Ranges elsewhere go on working.
  `Leaf.extents` yields what lies before the damage before it raises.
"""

import abc
import enum
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

# What `Leaf.locate` answers when there is no single place in the file to read from.
ALL_ZERO = -1  # the whole range is allocated and reads as zeroes
SCATTERED = -2  # anything else: ask `Leaf.extents`


class State(enum.IntEnum):
    """What a leaf has of a range."""

    UNALLOCATED = 0  # nothing: the backing's content shows through
    ZERO = 1  # allocated, reads as zeroes, takes no space
    DATA = 2  # allocated, at `LeafExtent.host`
    COMPRESSED = 3  # allocated, to be unpacked; `LeafExtent.host` is the format's own descriptor


class LeafExtent(NamedTuple):
    """A guest range that is alike throughout: one state, contiguous in the file if DATA.

    A COMPRESSED extent never spans two clusters, though it may be a part of one.
    """

    offset: int
    length: int
    state: State
    host: int = -1

    @property
    def end(self) -> int:
        return self.offset + self.length


class ColdMetadata(Exception):  # noqa: N818 - a signal to the caller, not an error
    """Metadata has to be read from the disk first: call `warm` in a worker, then retry.

    What `warm` raises is the answer to the call: it is not repeated.
    """

    def __init__(self, fd: int, offset: int, length: int) -> None:
        super().__init__(f"metadata at {offset} (+{length}) is not in the page cache")
        self.fd = fd
        self.offset = offset
        self.length = length

    def warm(self) -> None:
        """Worker: bring the range into the page cache. Raises OSError."""
        os.pread(self.fd, self.length, self.offset)


class FlushNeeded(Exception):  # noqa: N818 - a signal to the caller, not an error
    """The dirty metadata has reached its bound: flush, then retry."""


class SyncError(OSError):
    """A sync failed. The kernel may have dropped what it could not write, and reports
    that only once: no later sync of this file proves anything."""


@dataclass(frozen=True)
class BackingReference:
    """What a leaf records of the backing that it belongs to (invariant 6).

    ``identity`` is the fingerprint of the backing's content (see
    ``nbdstream.backing.identity``); empty where the image was made by another tool
    and none has been recorded yet. ``size`` is the backing's size in bytes, or 0 where
    the format does not record it. ``format`` is QEMU's name for the backing's format
    as seen through the URI: "raw" for every NBD export; empty where the image leaves it
    to be probed.
    """

    uri: str
    format: str = "raw"
    size: int = 0
    identity: str = ""


@dataclass(frozen=True)
class CheckResult:
    """What `check` found, counted as ``qemu-img check`` counts.

    ``errors``: damage to metadata; ``leaks``: space that nothing refers to (harmless).
    ``repaired`` counts those of both that were repaired. ``messages`` has a line for each
    kind of finding.
    """

    errors: int = 0
    leaks: int = 0
    repaired: int = 0
    messages: tuple[str, ...] = ()

    def plus(self, later: "CheckResult") -> "CheckResult":
        """This result and that of a later check, of what this one left."""
        return CheckResult(
            self.errors + later.errors,
            self.leaks + later.leaks,
            self.repaired + later.repaired,
            self.messages + later.messages,
        )

    def then(self, later: "CheckResult") -> "CheckResult":
        """The result of two repairs in a row. What the first could not repair, the second finds
        again: it counts once."""
        if not self.messages:
            return later
        return self.plus(later) if later.repaired else self


class Leaf(abc.ABC):
    """An open local image.

    Attributes:
        path: the image's file name.
        format: "raw", "qcow2" or "qed", QEMU's names.
        size: the virtual disk's size in bytes; need not be a multiple of anything.
        block_size: bytes; the smallest unit that is allocated by itself. Writes of
            whole blocks never need the backing (invariant 9).
        cluster_size: bytes; the unit in which the backing is fetched; a multiple of
            ``block_size``.
        fd: the file descriptor that `locate` and DATA extents speak of.
        backing: what the leaf says of its backing; None for a plain local disk, and
            after `drop_backing`.
        read_only: opened without the right to change anything.
        may_compress: whether extents may be COMPRESSED.
        whole_clusters: other programs that take the image over need clusters that are
            allocated as a whole.

    The last block of a disk whose size is not a multiple of ``block_size`` is allocated
    as a whole: "aligned" below always allows a range that ends at ``size``.
    """

    path: str
    format: str
    size: int
    block_size: int
    cluster_size: int
    fd: int
    backing: BackingReference | None
    read_only: bool
    may_compress: bool = True
    whole_clusters: bool = False

    # -- where things are ------------------------------------------------------------

    @abc.abstractmethod
    def locate(self, offset: int, length: int) -> int:
        """Where in ``fd`` the whole range lies, contiguously: the hot path's one question.

        Returns the host offset, or `ALL_ZERO`, or `SCATTERED` (also whenever finding
        out would take more than a look at memory). Never raises for a range within
        the disk.
        """

    @abc.abstractmethod
    def extents(self, offset: int, length: int) -> Iterator[LeafExtent]:
        """The extents that tile the range; neighbours may be alike.

        Lazy: a caller may stop early, and must not change the leaf or await while it
        iterates. Costs what it yields, not what it skips: a huge range without
        anything allocated is one or few extents. With no backing, nothing is ever
        UNALLOCATED: what the format has not allocated reads as zeroes and is ZERO.

        Raises ColdMetadata, OSError, LeafFormatError (damage under the range), the last two
        only when the iteration comes to what is unreadable or damaged.
        """

    def read(self, extent: LeafExtent, view: memoryview) -> None:
        """Worker: fill ``view`` (as long as the extent) with the data of a DATA or
        COMPRESSED extent.

        Uses nothing but ``fd`` and the extent itself. What it read counts only if
        `extents` still reports the same extent afterwards: space may have been freed
        and used for something else meanwhile. Raises OSError.
        """
        read_exactly(self.fd, view, extent.host)

    # -- changes ---------------------------------------------------------------------

    @abc.abstractmethod
    def write(self, offset: int, view: memoryview) -> None:
        """Store data and mark it allocated.

        Each block must either be covered whole or be DATA already; a cluster that is
        COMPRESSED must be covered whole. If it raises, nothing new is marked
        allocated, and DATA that was covered may hold old or new bytes (as for any
        failed write).

        Raises ColdMetadata, FlushNeeded, OSError (ENOSPC, EIO …), LeafFormatError (damage
        under the range).
        """

    @abc.abstractmethod
    def zero(self, offset: int, length: int, *, unmap: bool, as_backing: bool = False) -> None:
        """Make whole blocks read as zeroes, allocated as far as the backing is concerned.

        ``unmap`` lets the format give the space back; without it the space is kept or
        reserved where the format can (NBD_CMD_FLAG_NO_HOLE). ``as_backing``: the backing
        reads as zeroes there, too. The caller bounds the length (tens of MiB).

        Raises ColdMetadata, FlushNeeded, OSError, LeafFormatError (damage under the range).
        """

    # -- durability ------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def dirty(self) -> bool:
        """Whether there is metadata that only memory has."""

    @abc.abstractmethod
    def begin_flush(self) -> Callable[[], None]:
        """Take a snapshot of the dirty metadata; return the blocking rest of the flush.

        The returned function is run in a worker exactly once. It makes durable all
        data that was written before this call, and then the snapshot. It raises
        SyncError if a sync failed, else OSError (no space for metadata): such a flush
        can be tried again. Raises SyncError where an earlier sync failed.
        """

    @abc.abstractmethod
    def end_flush(self, *, ok: bool) -> None:
        """Learn how the flush went; on failure what was in the snapshot is dirty again.

        With ``ok`` False it also ends a `begin_flush` that raised, however far that came.
        """

    @abc.abstractmethod
    def drop_backing(self) -> None:
        """Worker: record durably that the leaf needs no backing any more.

        The caller has made everything allocated and has flushed, and no flush is under
        way. This cannot be undone, so it looks in the file whether all is allocated there.
        A crash before the end leaves the backing recorded.

        Raises LeafError (something is not allocated in the file), OSError.
        """

    @abc.abstractmethod
    def record_backing(self, backing: BackingReference) -> None:
        """Worker: record durably another reference (a new URI, an identity so far unknown).

        No flush is under way. A crash leaves the old or the new one. Raises LeafError if
        the leaf has no backing, or the reference does not fit in; OSError.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Worker: leave the file clean, release the lock, close it.

        The caller has flushed; whatever is not is made durable here too. Safe to call
        twice. Also closes (without writing) when the leaf is read-only.

        After a failed sync it writes nothing and syncs nothing, and raises SyncError.
        Raises OSError; the files are closed even then.
        """

    # -- looking at it ---------------------------------------------------------------

    @abc.abstractmethod
    def check(self, *, repair: bool) -> CheckResult:
        """Worker: check the image's metadata as ``qemu-img check`` does, the disk being idle."""

    def describe(self) -> dict[str, object]:
        """Format-specific facts for ``nbdstream info``, by QEMU's names where it has them."""
        return {}


@contextmanager
def flushing(leaf: Leaf) -> Iterator[Callable[[], None]]:
    """One flush: begins it, gives its blocking rest to be run, and ends it either way.

    Whatever the body or `Leaf.begin_flush` raises, the snapshot is dirty again then.
    """
    try:
        yield leaf.begin_flush()
    except BaseException:
        leaf.end_flush(ok=False)
        raise
    leaf.end_flush(ok=True)


def joined(extents: Iterable[LeafExtent]) -> Iterator[LeafExtent]:
    """Join neighbours that are alike: the longest extents that tile the same range."""
    pending: LeafExtent | None = None
    for extent in extents:
        if pending is not None and _continues(pending, extent):
            pending = pending._replace(length=pending.length + extent.length)
        else:
            if pending is not None:
                yield pending
            pending = extent
    if pending is not None:
        yield pending


def _continues(first: LeafExtent, second: LeafExtent) -> bool:
    if first.state is not second.state or first.end != second.offset:
        return False
    if first.state is State.DATA:
        return first.host + first.length == second.host
    return first.state is not State.COMPRESSED


def read_exactly(fd: int, view: memoryview, offset: int) -> None:
    """Fill ``view`` from a file; what lies past its end reads as zeroes (may block).
    Raises OSError."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            view[done:] = bytes(len(view) - done)
            return
        done += count


def read_range(fd: int, offset: int, length: int) -> bytes:
    """A range of a file; what lies past its end reads as zeroes (may block). Raises OSError."""
    data = bytearray(length)
    read_exactly(fd, memoryview(data), offset)
    return bytes(data)


def write_exactly(fd: int, view: memoryview, offset: int) -> None:
    """Write the whole of ``view`` to a file at ``offset`` (may block). Raises OSError."""
    done = os.pwrite(fd, view, offset)
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
