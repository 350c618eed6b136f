# SPDX-License-Identifier: Apache-2.0
"""Locks on files of a store: held by a process, gone with it, and visible without being taken.

They are exclusive open-file-description locks on the first byte of a file (fcntl(2)). The
kernel drops them when the process ends, however it ends, so a lock proves that its holder
lives. `is_held` only looks: unlike an attempt to take the lock, it disturbs no other process.
"""

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Self

from nbdstream.errors import StoreError
from nbdstream.leaf.locking import FLOCK

# Seconds between two attempts to take a lock that another process holds.
RETRY = 0.02
_LOCK = (os.SEEK_SET, 0, 1, 0)


class FileLock:
    """A lock that this process holds; as a context manager it is released at the end."""

    def __init__(self, fd: int) -> None:
        """Take the lock on an open, writable file, whose descriptor is ours from now on.

        Raises BlockingIOError if another process holds it; the descriptor is closed then.
        """
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_WRLCK, *_LOCK))
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise BlockingIOError(errno.EAGAIN, "locked by another process") from error
            raise
        self._fd = fd

    def release(self) -> None:
        """Let others have it. Does nothing the second time."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def acquire(path: Path, *, timeout: float) -> FileLock:
    """Take the lock on a file, which is created if its directory exists (worker: may wait).

    A file that was removed or replaced while this waited is not the one that others lock: then
    it is opened once more.

    Raises:
        StoreError: another process holds it for longer than ``timeout`` seconds.
        FileNotFoundError: the directory does not exist.
        OSError: it cannot be opened or locked.
    """
    deadline = time.monotonic() + timeout
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        identity = os.fstat(fd).st_ino
        try:
            lock = FileLock(fd)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StoreError(f"{path}: another process holds this lock; try later") from None
            time.sleep(RETRY)
            continue
        if _inode(path) == identity:
            return lock
        lock.release()


def is_held(path: Path) -> bool:
    """Whether a process holds the lock on a file; False if there is no file. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, *_LOCK))
    finally:
        os.close(fd)
    return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return -1
