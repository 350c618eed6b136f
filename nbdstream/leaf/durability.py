# SPDX-License-Identifier: Apache-2.0
"""The first failed sync is final (invariant 12): the rule, and the leaf that keeps it.

When a sync fails, the kernel may have dropped the pages that it could not write, and it
reports that once for each descriptor: the next sync of the same file succeeds, and proves
nothing. So metadata that is written after a failed sync could expose data that is not
there. A leaf of which one sync has failed therefore

- refuses every later flush, and every change to what it records of its backing;
- is closed without writing or syncing anything. Its dirty mark (qcow2's dirty bit, QED's
  `NEED_CHECK`) stays, so that the next open looks at what is there, and repairs it;
- goes on serving reads, and takes writes, which no flush will ever acknowledge;
- loses its redo log at once, so that the next open starts from what is durable.

All syncs of a leaf, of each of its files and directories, go through its one `Syncs`,
which remembers the failure even where a caller were to swallow the error.

What the page cache has may differ from what the disk has from then on. Closing gives the
pages back to the kernel, and so does an open for writing that finds a dirty mark
(`reread`), so that what is read next comes from the disk.
"""

import abc
import logging
import os
from collections.abc import Callable

from nbdstream.errors import LeafError, UsageError
from nbdstream.leaf.base import BackingReference, CheckResult, Leaf, SyncError, flushing
from nbdstream.leaf.redo import RedoLog

log = logging.getLogger(__name__)


class Syncs:
    """Makes durable what was written to the files of one leaf, until that fails once.

    Attributes:
        failure: the first failure, which is final.
        on_failure: called then, in the worker.
    """

    def __init__(self, path: str) -> None:
        self.failure: SyncError | None = None
        self.on_failure: Callable[[], None] | None = None
        self._path = path
        self._redo = RedoLog()

    def guard(self, redo: RedoLog) -> None:
        """Have the leaf's redo log discarded as soon as a sync fails."""
        self._redo = redo

    def sync(self, fd: int) -> None:
        """Worker: make durable what was written to a file. Raises SyncError."""
        self._run(os.fdatasync, fd)

    def sync_attributes(self, fd: int) -> None:
        """Worker: make durable a file's extended attributes, with its data. Raises SyncError."""
        self._run(os.fsync, fd)

    def sync_names(self, directory: int) -> None:
        """Worker: make durable the names in a directory. Raises SyncError."""
        self._run(os.fsync, directory)

    def _run(self, call: Callable[[int], None], fd: int) -> None:
        self.require()
        try:
            call(fd)
        except OSError as error:
            self.failure = SyncError(error.errno, f"sync failed: {error.strerror}")
            self._redo.discard()
            log.critical(
                "%s: a sync failed, nothing becomes durable from now on: %s",
                self._path,
                error.strerror,
            )
            if self.on_failure is not None:
                self.on_failure()
            raise self.failure from error

    def require(self) -> None:
        """Raises SyncError if a sync has failed."""
        if self.failure is not None:
            raise SyncError(
                self.failure.errno,
                f"an earlier sync failed ({self.failure.strerror}): start again to see what"
                " is durable",
            )


def reread(fd: int) -> None:
    """Let the page cache forget what is on the disk as well, so that it is read from there.

    What is still to be written stays. Best effort: not every file system can.
    """
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        pass


class DurableLeaf(Leaf):
    """What the three formats have in common of becoming durable, and of coming to an end.

    A format has the hooks below; each may rely on it that no sync has failed so far.
    """

    _syncs: Syncs
    _redo: RedoLog

    # -- hooks -----------------------------------------------------------------------

    @abc.abstractmethod
    def _begin_flush(self) -> Callable[[], None]:
        """See `Leaf.begin_flush`."""

    @abc.abstractmethod
    def _end_flush(self, *, ok: bool) -> None:
        """See `Leaf.end_flush`."""

    @abc.abstractmethod
    def _first_unallocated(self) -> int | None:
        """Worker: the lowest guest offset that the *file* has not allocated; None: it has all.

        Raises LeafError, OSError.
        """

    @abc.abstractmethod
    def _drop_backing(self) -> None:
        """Worker: see `Leaf.drop_backing`. Raises LeafError, OSError."""

    @abc.abstractmethod
    def _record_backing(self, backing: BackingReference) -> None:
        """Worker: see `Leaf.record_backing`. Raises LeafError, OSError."""

    @abc.abstractmethod
    def _check(self, *, repair: bool) -> CheckResult:
        """Worker: see `Leaf.check`."""

    @abc.abstractmethod
    def _files(self) -> list[int]:
        """The descriptors to close."""

    def _settle(self) -> None:
        """Worker: bring all metadata to the file, durably. Raises OSError."""
        with flushing(self) as finish:
            finish()

    def _leave_clean(self) -> None:
        """Worker: settle, and mark the image as closed. Raises OSError."""
        self._settle()

    # -- the interface -----------------------------------------------------------------

    def begin_flush(self) -> Callable[[], None]:
        """See `Leaf.begin_flush`."""
        self._syncs.require()
        self._redo.begin_flush()
        return self._begin_flush()

    def end_flush(self, *, ok: bool) -> None:
        """See `Leaf.end_flush`."""
        self._end_flush(ok=ok)
        self._redo.end_flush(ok=ok)

    def drop_backing(self) -> None:
        """See `Leaf.drop_backing`."""
        self._syncs.require()
        if self.backing is None:
            return
        missing = self._first_unallocated()
        if missing is not None:
            raise LeafError(f"{self.path} still needs its backing: nothing at {missing} yet")
        self._drop_backing()
        self.backing = None

    def record_backing(self, backing: BackingReference) -> None:
        """See `Leaf.record_backing`."""
        self._syncs.require()
        if self.backing is None:
            raise LeafError(f"{self.path} has no backing, so none can be recorded")
        self._record_backing(backing)
        self.backing = backing

    def check(self, *, repair: bool) -> CheckResult:
        """See `Leaf.check`."""
        if repair and self.read_only:
            raise UsageError(f"{self.path} is open read-only: it cannot be repaired")
        if not self.read_only:
            self._settle()
        return self._check(repair=repair)

    def close(self) -> None:
        """See `Leaf.close`."""
        if self.fd < 0:
            return
        try:
            if not self.read_only:
                self._syncs.require()
                self._leave_clean()
                self._redo.discard()
        finally:
            self._redo.close()
            for fd in self._files():
                if self._syncs.failure is not None:
                    reread(fd)
                os.close(fd)
            self.fd = -1
