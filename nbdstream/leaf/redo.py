# SPDX-License-Identifier: Apache-2.0
"""The redo log: changes of a leaf's metadata that outlive the process, until a flush.

A flush brings metadata to the file; until then only memory has it (`nbdstream.leaf.base`). If
the process is killed, the data that a guest wrote is still in the page cache, and reaches the
file. What says where it lies would be lost, and with it writes that were acknowledged: a guest
that runs on would not be told. So each change is also recorded in a file in memory, a tmpfs,
that is mapped into the process: a few stores, no system call. That file lives exactly as long
as the page cache does. It outlives the process, and neither survives a power cut, so that the
order in which things reach the *disk* does not change.

The next open for writing completes what the killed process had begun: it syncs the data, and
writes the recorded changes to the file (`recover`). Each format applies its own records.

**Whose log it is.** The log is named by the image's device and inode, and belongs to one open of
it: a random *stamp* is in the log and in the image, at a place that any other program clears
which writes to the image (the self-clearing feature bits of qcow2 and QED, in a raw leaf the
header of its map). A log with another stamp is dropped.

**Its life.** Records are numbered. The log is a ring of `CAPACITY` records, and one 64-bit word
holds the numbers of its first record and of the one after its last. A flush that succeeds moves
the first to where the log ended when the flush took its snapshot. A clean close removes the log.
So does the first failed sync (invariant 12): what is not durable by then must not be exposed.

Where no log can be kept, the leaf works without one, and a warning says what that means.
"""

import contextlib
import errno
import logging
import mmap
import os
import secrets
import stat
import struct
from collections.abc import Callable, Iterator, MutableSequence
from pathlib import Path
from typing import NamedTuple

from nbdstream.errors import LeafError, LeafFormatError
from nbdstream.leaf.base import FlushNeeded, SyncError
from nbdstream.leaf.files import is_in_memory

log = logging.getLogger(__name__)

CAPACITY = 1 << 17  # records: 4 MiB. Where they are used up, a flush has to come first
CHUNK = 1 << 11  # records for which memory is taken at once: 64 KiB
STAMP_BITS = 32

_MAGIC = b"nbdsredo"
_VERSION = 1
# magic, version, size of a record, stamp
_HEADER = struct.Struct("<8sIIQ")
_STAMP = 16
_STATE = 64  # where the two numbers are
_FIRST = 4096  # where the records begin
_WORDS = 4  # of 64 bits in a record
_RECORD = 8 * _WORDS
_NUMBER = (1 << 32) - 1
# Where memory is that outlives a process: the first of these that has a tmpfs, and lets us.
_PARENTS = ("/run", "/run/nbdstream", "/run/user/{uid}", "/dev/shm")


TABLE = 1 << 63  # in the first number of a record: see `new_tables`


class Record(NamedTuple):
    """One change. What the numbers mean is the format's affair."""

    a: int
    b: int
    c: int
    d: int


class RedoLog:
    """The redo log of one open leaf, or the lack of one. Belongs to the event loop's thread."""

    def __init__(
        self, path: Path | None = None, mapped: mmap.mmap | None = None, fd: int = -1
    ) -> None:
        """Take over a new log file and its mapping; without them there is no log."""
        self._path = path
        self._mapped = mapped
        self._fd = fd
        self._words = memoryview(mapped).cast("Q") if mapped is not None else None
        self._room = CHUNK
        self._first = 0
        self._next = 0
        self._covered = 0  # what the flush under way makes durable

    def reserve(self, count: int) -> None:
        """Make sure that ``count`` records can be appended.

        Raises FlushNeeded if there is no room for them before the next flush.
        """
        if self._next + count <= self._room or self._words is None:
            return
        if self._next - self._first + count > CAPACITY or not self._grow(self._next + count):
            if self._next == self._first:
                self._give_up(f"no memory for {count} records")
                return
            raise FlushNeeded

    def append(self, a: int, b: int, c: int = 0, d: int = 0) -> None:
        """Record a change, for which `reserve` has made room."""
        words = self._words
        if words is None:
            return
        number = self._next
        at = _FIRST // 8 + number % CAPACITY * _WORDS
        words[at] = a
        words[at + 1] = b
        words[at + 2] = c
        words[at + 3] = d
        self._next = number = number + 1
        # One store: a process that is killed here has appended the record, or has not.
        words[_STATE // 8] = self._first << 32 | number

    def begin_flush(self) -> None:
        """A flush takes its snapshot, which has all that was recorded so far."""
        self._covered = self._next

    def end_flush(self, *, ok: bool) -> None:
        """The flush that began last has succeeded or failed."""
        if not ok or self._words is None:
            return
        self._first = self._covered
        if self._first == self._next:
            self._first = self._next = 0  # where there is memory already
        elif self._next > _NUMBER - CAPACITY:
            rounds = self._first // CAPACITY * CAPACITY
            self._first -= rounds
            self._next -= rounds
        self._words[_STATE // 8] = self._first << 32 | self._next

    def discard(self) -> None:
        """Remove the log: nothing is recovered from it. From any thread; safe to repeat."""
        words = self._words
        if self._path is None or words is None:
            return
        words[_STAMP // 8] = 0
        with contextlib.suppress(OSError):
            self._path.unlink()

    def close(self) -> None:
        """Let go of the log's memory; what was not discarded is there for the next open."""
        if self._mapped is not None and self._words is not None:
            self._words.release()
            self._mapped.close()
            os.close(self._fd)
        self._words = None

    def _grow(self, needed: int) -> bool:
        """Whether there is memory for the records below this number. A page that is touched
        without would kill the process."""
        wanted = min(-(-needed // CHUNK) * CHUNK, CAPACITY)
        if wanted > self._room:
            try:
                os.posix_fallocate(self._fd, 0, _FIRST + wanted * _RECORD)
            except OSError:
                return False
            self._room = wanted
        return True

    def _give_up(self, why: str) -> None:
        log.warning("%s: %s", self._path, _lacking(why))
        self.discard()
        self.close()


def new_tables(records: list[Record], l1: MutableSequence[int]) -> dict[int, int]:
    """For formats with two levels of tables: bring the records (`TABLE` | index, L1 entry) to
    an L1 table in memory, and return these entries by index.

    Raises LeafFormatError if the table is too short.
    """
    found = {first & ~TABLE: entry for first, entry, _, _ in records if first & TABLE}
    for index, entry in found.items():
        if index >= len(l1):
            raise LeafFormatError(f"no entry {index} in the L1 table")
        l1[index] = entry
    return found


def start(fd: int, path: str, set_stamp: Callable[[int], None]) -> RedoLog:
    """Begin the log of an image that was opened for writing (may block).

    ``set_stamp`` writes the stamp, `STAMP_BITS` wide and not 0, to the image; it need not sync.
    What prevents the log is a warning, not an error.
    """
    stamp = secrets.randbelow((1 << STAMP_BITS) - 1) + 1
    made = None
    try:
        made = _create(fd, stamp)
        set_stamp(stamp)
    except (OSError, LeafError) as error:
        if made is not None:
            made.discard()
            made.close()
        log.warning("%s: %s", path, _lacking(getattr(error, "strerror", None) or str(error)))
        return RedoLog()
    return made


def recover(fd: int, path: str, stamp: int, apply: Callable[[list[Record]], None]) -> None:
    """Complete what a killed process had begun with an image, and forget it (may block).

    ``fd``: the image, open and locked for writing. ``stamp``: what it is stamped with, or 0.
    ``apply`` is given the records, in order, if there are any. It makes the data and the
    changes durable, and can be repeated. Raises what ``apply`` raises but LeafFormatError.
    """
    for place in _places():
        name = place / _name(fd)
        try:
            content = name.read_bytes()
        except OSError:
            continue
        records = _parse(content, stamp)
        if records:
            log.warning(
                "%s: its server was killed: %d changes are recovered from its redo log",
                path,
                len(records),
            )
            try:
                apply(records)
            except LeafFormatError as error:
                log.warning("%s: its redo log does not fit, reset the guest: %s", path, error)
            except SyncError:
                name.unlink(missing_ok=True)  # the data may be lost, so it must not be exposed
                raise
        name.unlink(missing_ok=True)


def _lacking(why: str) -> str:
    return (
        f"no redo log ({why}): if this server is killed, reset the guest, which could miss"
        " what it wrote since its last flush"
    )


def _parse(content: bytes, stamp: int) -> list[Record]:
    """The records of a log, none where it belongs to another state of the image."""
    if not stamp or len(content) < _FIRST or not content.startswith(_header(stamp)):
        return []
    state = int.from_bytes(content[_STATE : _STATE + 8], "little")
    first, after = state >> 32, state & _NUMBER
    found = []
    for number in range(first, after):
        at = _FIRST + number % CAPACITY * _RECORD
        found.append(Record(*struct.unpack_from(f"<{_WORDS}Q", content, at)))
    return found


def _header(stamp: int) -> bytes:
    return _HEADER.pack(_MAGIC, _VERSION, _RECORD, stamp)


def _name(fd: int) -> str:
    status = os.fstat(fd)
    return f"{status.st_dev:x}-{status.st_ino}"


def _places() -> Iterator[Path]:
    """Directories in memory that no other user can write to, made where they are missing."""
    uid = os.geteuid()
    for parent in _PARENTS:
        place = Path(parent.format(uid=uid)) / f"nbdstream-redo-{uid}"
        try:
            if not _in_memory(place.parent):
                continue
            place.mkdir(mode=0o700, exist_ok=True)
            status = place.lstat()
        except OSError:
            continue
        if stat.S_ISDIR(status.st_mode) and status.st_uid == uid and not status.st_mode & 0o077:
            yield place


def _in_memory(directory: Path) -> bool:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return is_in_memory(fd)
    finally:
        os.close(fd)


def _create(fd: int, stamp: int) -> RedoLog:
    """A new, empty log for an image. Raises OSError."""
    for place in _places():
        path = place / _name(fd)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        new = os.open(path, flags, 0o600)
        try:
            os.ftruncate(new, _FIRST + CAPACITY * _RECORD)
            os.posix_fallocate(new, 0, _FIRST + CHUNK * _RECORD)
            os.pwrite(new, _header(stamp), 0)
            return RedoLog(path, mmap.mmap(new, 0), new)
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(new)
            raise
    raise OSError(errno.ENOENT, "no directory in memory that only this user can write to")
