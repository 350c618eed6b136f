# SPDX-License-Identifier: Apache-2.0
"""What reaches the kernel: the changes and syncs of one directory's files, in order.

`recording` wraps the system calls that change files or sync them. `tests.powercut` replays
the journal up to any point.

A sync can be made to fail (`Journal.fail_sync`), as the kernel fails it: any part of what
was to be written reaches the disk, the rest is dropped, and the pages count as clean. So
the next sync succeeds, and makes durable only what was written since.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from nbdstream.leaf import files

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
