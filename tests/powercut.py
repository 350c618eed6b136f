# SPDX-License-Identifier: Apache-2.0
"""Power cuts: record what reaches the kernel, rebuild what the disk may have kept of it.

`recording` wraps the system calls that change files or sync them, for the files of one
directory. What the journal then holds is replayed up to any point, the *cut*; of what
came after a file's last sync, any part may have survived:

- any subset of the changes, in any order, each torn at 512 bytes;
- file sizes likewise: a truncation is a change as any other;
- names (link, rename, unlink) likewise, until the directory is synced.

That is more than a real file system loses, so what passes here does not rest on how one
orders its writeback.

A sync can be made to fail (`Journal.fail_sync`), as the kernel fails it: any part of what
was to be written reaches the disk, the rest is dropped, and the pages count as clean. So
the next sync succeeds, and makes durable only what was written since.
"""

import contextlib
import errno
import os
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from nbdstream.leaf import files

SECTOR = 512
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10
_KEEP_SIZE = 0x01


@dataclass(frozen=True)
class Write:
    """Bytes at an offset of a file; zeroed ranges are writes too."""

    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Truncate:
    inode: int
    size: int


@dataclass(frozen=True)
class Name:
    """A name of the directory now stands for this file; None: for none."""

    name: str
    inode: int | None


@dataclass(frozen=True)
class Sync:
    """All changes to the file before this are durable; inode 0: those to names."""

    inode: int


@dataclass(frozen=True)
class FailedSync:
    """A sync of the file failed: what it did not write is lost; inode 0: the directory."""

    inode: int


Change = Write | Truncate | Name
Operation = Change | Sync | FailedSync


@dataclass
class Journal:
    """What happened to the files of a directory since the recording began.

    ``interrupt``, if set, is called before each operation takes place: what it does
    happens in between, as the event loop's calls do while a worker is under way. Where
    there is little ``room``, writes come out short, then fail with ENOSPC. ``fail_sync``
    is how many syncs succeed before one fails, with EIO; those after it succeed.
    """

    directory: Path
    contents: dict[int, bytes] = field(default_factory=dict)  # at the beginning, durable
    names: dict[str, int] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    interrupt: Callable[[], None] | None = None
    room: int | None = None  # bytes that can still be written; None: a disk without end
    fail_sync: int | None = None

    def sync(self, inode: int) -> None:
        """A sync of a file, or of the directory (0). Raises OSError if this one is to fail."""
        if self.fail_sync is not None:
            self.fail_sync -= 1
            if self.fail_sync < 0:
                self.fail_sync = None
                self.add(FailedSync(inode))
                raise OSError(errno.EIO, "injected")
        self.add(Sync(inode))

    def add(self, operation: Operation) -> None:
        self.operations.append(operation)

    def take_room(self, wanted: int) -> int:
        """How many bytes a write may write. Raises OSError when the disk is full."""
        if self.room is None:
            return wanted
        if self.room == 0:
            raise OSError(errno.ENOSPC, "the recorded disk is full")
        granted = min(wanted, self.room)
        self.room -= granted
        return granted

    def before(self) -> None:
        """Let what is to happen in between happen; it is not interrupted itself."""
        interrupt, self.interrupt = self.interrupt, None
        if interrupt is not None:
            interrupt()
            self.interrupt = interrupt


@contextlib.contextmanager
def recording(directory: Path) -> Iterator[Journal]:
    """Record what this process does to the files of a directory."""
    journal = Journal(directory)
    for path in directory.iterdir():
        if path.is_file():
            inode = path.stat().st_ino
            journal.names[path.name] = inode
            journal.contents[inode] = path.read_bytes()
    device = directory.stat().st_dev
    home = directory.stat().st_ino

    def watched(fd: int) -> int | None:
        """The inode of a file that matters, 0 for the directory itself."""
        status = os.fstat(fd)
        if status.st_dev != device:
            return None
        if stat.S_ISDIR(status.st_mode):
            return 0 if status.st_ino == home else None
        return status.st_ino if stat.S_ISREG(status.st_mode) else None

    real = {name: getattr(os, name) for name in _WRAPPED}
    real_fallocate = files.fallocate

    def pwrite(fd: int, data: Any, offset: int) -> int:
        inode = watched(fd)
        if inode is None:
            return int(real["pwrite"](fd, data, offset))
        journal.before()
        content = bytes(data)
        content = content[: journal.take_room(len(content))]
        count = int(real["pwrite"](fd, content, offset))
        journal.add(Write(inode, offset, content[:count]))
        return count

    def pwritev(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        assert flags == 0, "the recorder knows no flags of pwritev"
        return pwrite(fd, b"".join(map(bytes, buffers)), offset)

    def ftruncate(fd: int, size: int) -> None:
        inode = watched(fd)
        if inode is not None:
            journal.before()
        real["ftruncate"](fd, size)
        if inode is not None:
            journal.add(Truncate(inode, size))

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        inode = watched(fd)
        if inode is not None:
            journal.before()
        real_fallocate(fd, mode, offset, length)
        if inode is not None:
            assert mode & _KEEP_SIZE and mode & (_PUNCH_HOLE | _ZERO_RANGE), hex(mode)
            end = min(offset + length, os.fstat(fd).st_size)
            if end > offset:
                journal.add(Write(inode, offset, bytes(end - offset)))

    def syncer(name: str) -> Callable[[int], None]:
        def sync(fd: int) -> None:
            inode = watched(fd)
            if inode is not None:
                journal.before()
            real[name](fd)
            if inode is not None:
                journal.sync(inode)

        return sync

    def unlink(path: Any, **more: Any) -> None:
        real["unlink"](path, **more)
        within = watched(more["dir_fd"]) == 0 if more else Path(path).parent == directory
        if within:
            journal.add(Name(Path(path).name, None))

    def link(source: Any, target: Any) -> None:
        real["link"](source, target)
        journal.add(Name(Path(target).name, Path(target).stat().st_ino))

    def replace(source: Any, target: Any) -> None:
        real["replace"](source, target)
        assert Path(target).parent == directory
        journal.add(Name(Path(target).name, Path(target).stat().st_ino))
        if Path(source).parent == directory:
            journal.add(Name(Path(source).name, None))

    def write(fd: int, data: Any) -> int:
        assert watched(fd) is None, "os.write is not recorded: use pwrite"
        return int(real["write"](fd, data))

    wrappers: dict[str, Any] = {
        "pwrite": pwrite,
        "pwritev": pwritev,
        "ftruncate": ftruncate,
        "fsync": syncer("fsync"),
        "fdatasync": syncer("fdatasync"),
        "unlink": unlink,
        "link": link,
        "replace": replace,
        "rename": replace,
        "write": write,
    }
    with contextlib.ExitStack() as stack:
        for name in _WRAPPED:
            stack.enter_context(mock.patch.object(os, name, wrappers[name]))
        stack.enter_context(mock.patch.object(files, "fallocate", fallocate))
        yield journal


_WRAPPED = (
    "pwrite",
    "pwritev",
    "ftruncate",
    "fsync",
    "fdatasync",
    "unlink",
    "link",
    "replace",
    "rename",
    "write",
)

# -- what may be left ------------------------------------------------------------------------


@dataclass
class _File:
    """A file at a cut: what is durable of it, and what may be."""

    durable: bytearray
    pending: list[Write | Truncate] = field(default_factory=list)

    def drop(self, rng: random.Random | None) -> None:
        """A sync fails: a part of what is pending becomes durable, and the rest is lost but
        for the length that it gave the file."""
        share = rng.choice((0, 0, 0.3, 0.7, 1)) if rng is not None else 0
        for change in [piece for whole in self.pending for piece in _torn(whole)]:
            if isinstance(change, Truncate) or (rng is not None and rng.random() < share):
                _apply(self.durable, change)
            else:
                end = change.offset + len(change.data)
                self.durable.extend(bytes(max(0, end - len(self.durable))))
        self.pending = []


class Disk:
    """What the disk holds of a journal, from cut to cut."""

    def __init__(self, journal: Journal, rng: random.Random | None = None) -> None:
        """``rng`` decides what failed syncs drop; without it, they drop everything."""
        self._rng = rng
        self._files = {inode: _File(bytearray(data)) for inode, data in journal.contents.items()}
        self._names: dict[str, int] = dict(journal.names)
        self._pending_names: list[Name] = []

    def advance(self, operation: Operation) -> None:
        """The next operation of the journal takes place before the power goes."""
        if isinstance(operation, Name):
            self._pending_names.append(operation)
            return
        if isinstance(operation, Sync | FailedSync) and operation.inode == 0:
            if isinstance(operation, Sync):
                _apply_names(self._names, self._pending_names)
                self._pending_names = []
            return  # names are no pages: a failure drops none of them
        target = self._files.setdefault(operation.inode, _File(bytearray()))
        if isinstance(operation, FailedSync):
            target.drop(self._rng)
        elif isinstance(operation, Sync):
            for change in target.pending:
                _apply(target.durable, change)
            target.pending = []
        else:
            target.pending.append(operation)

    def durable(self) -> dict[str, bytearray]:
        """The directory if nothing survived but what was synced, by file name."""
        return {
            name: bytearray(self._files[inode].durable)
            for name, inode in self._names.items()
            if inode in self._files
        }

    def survivors(self, rng: random.Random) -> dict[str, bytearray]:
        """One of the many states that the directory may be in, by file name."""
        keep = rng.choice(_STRATEGIES)
        names = dict(self._names)
        _apply_names(names, keep(list(self._pending_names), rng))
        return {
            name: self._left_of(self._files[inode], keep, rng)
            for name, inode in names.items()
            if inode in self._files
        }

    def _left_of(self, file: _File, keep: "Strategy", rng: random.Random) -> bytearray:
        content = bytearray(file.durable)
        pending: list[Any] = list(file.pending)
        if pending and keep is _keep_some and rng.random() < 0.5:
            pending = [piece for change in pending for piece in _torn(change)]
        for change in keep(pending, rng):
            _apply(content, change)
        return content


Strategy = Callable[[list[Any], random.Random], list[Any]]


def _keep_all(changes: list[Any], rng: random.Random) -> list[Any]:
    return changes


def _keep_none(changes: list[Any], rng: random.Random) -> list[Any]:
    return []


def _keep_some(changes: list[Any], rng: random.Random) -> list[Any]:
    share = rng.random()
    kept = [change for change in changes if rng.random() < share]
    rng.shuffle(kept)
    return kept


def _keep_one(changes: list[Any], rng: random.Random) -> list[Any]:
    return [rng.choice(changes)] if changes else []


def _lose_one(changes: list[Any], rng: random.Random) -> list[Any]:
    lost = rng.randrange(len(changes)) if changes else 0
    return changes[:lost] + changes[lost + 1 :]


def _keep_newest(changes: list[Any], rng: random.Random) -> list[Any]:
    return changes[rng.randrange(len(changes)) :] if changes else []


_STRATEGIES: tuple[Strategy, ...] = (
    _keep_all,
    _keep_none,
    _keep_some,
    _keep_some,
    _keep_some,
    _keep_one,
    _lose_one,
    _keep_newest,
)


def _torn(change: Write | Truncate) -> Iterator[Write | Truncate]:
    """A change in the pieces in which a disk may lose it."""
    if isinstance(change, Truncate):
        yield change
        return
    start = 0
    while start < len(change.data):
        stop = start + SECTOR - (change.offset + start) % SECTOR
        yield Write(change.inode, change.offset + start, change.data[start:stop])
        start = stop


def _apply(content: bytearray, change: Write | Truncate) -> None:
    if isinstance(change, Truncate):
        del content[change.size :]
        content.extend(bytes(change.size - len(content)))
        return
    if len(content) < change.offset:
        content.extend(bytes(change.offset - len(content)))
    content[change.offset : change.offset + len(change.data)] = change.data


def _apply_names(names: dict[str, int], changes: list[Name]) -> None:
    for change in changes:
        if change.inode is None:
            names.pop(change.name, None)
        else:
            names[change.name] = change.inode
