# SPDX-License-Identifier: Apache-2.0
"""One writer per image: the byte-range locks that QEMU takes on its images (invariant 8).

QEMU says what it does to an image, and what it tolerates from others, with one locked
byte for each *permission* (``block/file-posix.c``, ``raw_apply_lock_bytes``):

- byte 100 + n: "I use permission n";
- byte 200 + n: "no other process may use permission n".

Every lock is a *shared* open-file-description lock, so several processes can hold the
same byte. First the own bytes are locked, then the opposite bytes of everybody else are
tested with an exclusive probe that is never acquired; two processes that race may
both give up, but never both go on. A lock lives as long as the open file description,
so closing the descriptor is all the unlocking there is, and a crash leaves nothing.

We take what QEMU takes for an image in use: a writable one is read, written and resized,
and no other process may write or resize it; a read-only one is read, on the same terms.
"""

import enum
import fcntl
import os
import stat
import struct

from nbdstream.errors import LeafInUseError, LeafUnsupportedError

_USES = 100  # first byte of "I use this permission"
_DENIES = 200  # first byte of "no other process may use it"

# struct flock of the 64-bit Linux ABI: l_type, l_whence, l_start, l_len, l_pid
FLOCK = struct.Struct("hhqqi4x")


class Permission(enum.IntEnum):
    """QEMU's permissions (include/block/block-common.h), by bit number."""

    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3


_READER = (Permission.CONSISTENT_READ,)
_WRITER = (Permission.CONSISTENT_READ, Permission.WRITE, Permission.RESIZE)
_DENIED = (Permission.WRITE, Permission.RESIZE)


def open_locked(path: str, *, read_only: bool) -> int:
    """Open an image file and lock it as QEMU does; the caller closes the descriptor.

    Raises:
        LeafInUseError: another process uses the image in a way that excludes us.
        LeafUnsupportedError: not a regular file.
        OSError: it cannot be opened or locked.
    """
    # O_NONBLOCK only matters for what is refused next: a FIFO would wait for a peer.
    flags = os.O_RDONLY if read_only else os.O_RDWR
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _require_regular(fd, path)
        _lock(fd, path, _READER if read_only else _WRITER)
    except BaseException:
        os.close(fd)
        raise
    return fd


def stop_writing(fd: int) -> None:
    """Tell other processes that an image which was opened for writing is only read from now on.
    Raises OSError."""
    for permission in _DENIED:
        request = FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, _USES + permission, 1, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)


def is_open_elsewhere(path: str) -> bool:
    """Whether a process that locks as QEMU does has the image open. This takes no lock.
    Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        probe = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _USES, 2 * (_DENIES - _USES), 0)
        return bool(FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, probe))[0] != fcntl.F_UNLCK)
    finally:
        os.close(fd)


def _require_regular(fd: int, path: str) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise LeafUnsupportedError(f"{path} is not a regular file: leaf images are files")


def _lock(fd: int, path: str, uses: tuple[Permission, ...]) -> None:
    for permission in uses:
        _take(fd, _USES + permission)
    for permission in _DENIED:
        _take(fd, _DENIES + permission)
    for permission in uses:
        if _held_by_others(fd, _DENIES + permission):
            raise LeafInUseError(
                f"{path} is in use: another process does not allow others to"
                f" {_verb(permission)} it; stop that process first"
            )
    for permission in _DENIED:
        if _held_by_others(fd, _USES + permission):
            raise LeafInUseError(
                f"{path} is in use: another process may {_verb(permission)} it;"
                " stop that process first"
            )


def _verb(permission: Permission) -> str:
    return "read" if permission is Permission.CONSISTENT_READ else permission.name.lower()


def _take(fd: int, byte: int) -> None:
    # No process holds these bytes exclusively except for a passing probe's sake, and probes
    # (F_OFD_GETLK) acquire nothing: a refusal here is a real error.
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))


def _held_by_others(fd: int, byte: int) -> bool:
    probe = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, probe)
    return bool(FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
