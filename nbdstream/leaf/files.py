# SPDX-License-Identifier: Apache-2.0
"""System calls on image files that every format needs and Python's ``os`` lacks or bends.

Nothing here knows a format. Everything is a thin cover over one system call, with its
"not supported here" answers settled once.
"""

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from nbdstream.extents import align_down, align_up
from nbdstream.leaf.base import ColdMetadata, LeafExtent, State, write_exactly

_KEEP_SIZE = 0x01  # linux/falloc.h
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]

_WRITE_AND_WAIT = 0x01 | 0x02 | 0x04  # linux/fs.h: wait before, write, wait after

_TMPFS_MAGIC = 0x01021994  # linux/magic.h
_STATFS_SIZE = 256  # of struct statfs, generously; it begins with the type, a long

# Written where the file system can neither punch nor zero a range.
_ZEROES = memoryview(bytes(1 << 20))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Raises OSError."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


def zero_range(fd: int, offset: int, length: int, *, unmap: bool) -> None:
    """Make a range of a file read as zeroes; with ``unmap``, give its space back.

    The file's size stays the same unless the range reaches beyond its end and the file
    system makes us write the zeroes. Raises OSError.
    """
    mode = _PUNCH_HOLE if unmap else _ZERO_RANGE
    try:
        fallocate(fd, mode | _KEEP_SIZE, offset, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        for start in range(0, length, len(_ZEROES)):
            write_exactly(fd, _ZEROES[: length - start], offset + start)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give back the space of a range that will not be read, if the file system can."""
    try:
        fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
    except OSError:
        pass  # then it stays in use: nothing but space is lost


def hot_read_flags(fd: int) -> int:
    """The flags with which preadv(2) reads what is in memory and does not wait for a device.

    That is RWF_NOWAIT; tmpfs does not know it, and does not need it.
    """
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP and is_in_memory(fd):
            return 0
    return os.RWF_NOWAIT


def is_in_memory(fd: int) -> bool:
    """Whether a file or directory is on a tmpfs."""
    statfs = ctypes.create_string_buffer(_STATFS_SIZE)
    return _libc.fstatfs(fd, statfs) == 0 and (
        ctypes.c_long.from_buffer(statfs).value == _TMPFS_MAGIC
    )


def read_cached(fd: int, offset: int, length: int) -> bytes:
    """Read a range from the page cache; what lies past the file's end reads as zeroes.

    Raises ColdMetadata where that would have to wait for the disk, OSError.
    """
    buffer = bytearray(length)
    try:
        count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        raise ColdMetadata(fd, offset, length) from None
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        # A file system that cannot tell: reading is all that is left.
        count = os.preadv(fd, [buffer], offset)
    if count < length and offset + count < os.fstat(fd).st_size:
        raise ColdMetadata(fd, offset, length)
    return bytes(buffer)


def next_data(fd: int, offset: int) -> int | None:
    """Where the first data at or after ``offset`` begins; None: only a hole follows."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno == errno.EINVAL:  # this file system knows of no holes
            return offset
        raise


def next_hole(fd: int, offset: int) -> int | None:
    """Where the first hole at or after ``offset`` begins (the file's end counts as one);
    None: ``offset`` is at or beyond the end."""
    try:
        return os.lseek(fd, offset, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno == errno.EINVAL:
            return os.fstat(fd).st_size
        raise


def stored_extents(
    fd: int, offset: int, length: int, host: int, block_size: int
) -> Iterator[LeafExtent]:
    """Tile an allocated guest range that lies at ``host``: DATA, or ZERO for whole blocks that
    are holes in the file.

    ``offset`` and ``host`` agree modulo ``block_size``.
    """
    shift = offset - host
    position, end = host, host + length
    while position < end:
        data = next_data(fd, position)
        data = end if data is None else min(data, end)
        hole_end = end if data == end else align_down(data, block_size)
        if hole_end > position:
            yield LeafExtent(position + shift, hole_end - position, State.ZERO)
            position = hole_end
            continue
        hole = next_hole(fd, data)
        stop = end if hole is None else min(align_up(hole, block_size), end)
        yield LeafExtent(position + shift, stop - position, State.DATA, position)
        position = stop


def write_out(fd: int) -> None:
    """Worker: have a file's dirty data written to the disk, and wait for that.

    Nothing becomes durable by it. Errors are the next sync's to report: see
    `nbdstream.disk.writeback`.
    """
    _libc.sync_file_range(fd, 0, 0, _WRITE_AND_WAIT)


def sync_directory(path: str) -> None:
    """Make the names in the directory that holds ``path`` durable. Raises OSError."""
    fd = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
