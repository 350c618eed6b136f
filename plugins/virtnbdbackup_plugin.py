# SPDX-License-Identifier: Apache-2.0
"""nbdkit's Python plugin over backups that virtnbdbackup made: one disk, read-only.

    nbdkit python plugins/virtnbdbackup_plugin.py file=vda.full.data file=vda.inc.1.data

``file`` is given once for each backup, the full (or copy) backup first and the others in the
order in which they were made: what is shown is the disk as it was at the last of them.

virtnbdbackup's own plugin shows a full backup only; of incremental ones virtnbdmap writes a
copy. This one reads the frames of all files when it starts, and looks up each request in
them. The format is read by virtnbdbackup's library (``libvirtnbdbackup.sparsestream``).
"""

import builtins
import os
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import lz4.frame
import nbdkit  # provided by nbdkit itself
from libvirtnbdbackup.sparsestream import exceptions, streamer, types

API_VERSION = 2
# A compressed block is decompressed whole; so many are kept.
BLOCKS_KEPT = 8

# What reading a file raises that is no such backup, or was cut short.
_DAMAGE = (exceptions.StreamFormatException, ValueError, LookupError, EOFError, StopIteration)

_TYPES = types.SparseStreamTypes()
_STREAM = streamer.SparseStream(types)


class Segment(NamedTuple):
    """Bytes ``start`` to ``end`` of the disk, in a file at ``offset``.

    ``packed``: the length of the compressed block there, of which the segment begins ``skip``
    bytes into what was compressed; 0 for plain data.
    """

    start: int
    end: int
    file: int
    offset: int
    packed: int = 0
    skip: int = 0

    def part(self, start: int, end: int) -> "Segment":
        """The segment from ``start`` to ``end``."""
        ahead = start - self.start
        if self.packed:
            return self._replace(start=start, end=end, skip=self.skip + ahead)
        return self._replace(start=start, end=end, offset=self.offset + ahead)


_files: list[str] = []
_segments: list[Segment] = []
_starts: list[int] = []
_size = 0


def config(key: str, value: str) -> None:
    if key != "file":
        raise RuntimeError(f"unknown parameter {key}; wanted: file=BACKUP, once for each")
    _files.append(str(Path(value).absolute()))  # nbdkit changes its directory later


def config_complete() -> None:
    global _segments, _starts, _size
    if not _files:
        raise RuntimeError("wanted: file=BACKUP, the full backup first")
    checkpoint = None
    for index, path in enumerate(_files):
        try:
            with builtins.open(path, "rb") as reader:
                meta = _meta(reader)
                _check_order(path, meta, checkpoint)
                _segments = _over(_segments, sorted(_data(reader, meta, index)))
        except _DAMAGE as error:
            raise RuntimeError(f"{path}: not a complete backup of virtnbdbackup") from error
        checkpoint = meta["checkpointName"]
        _size = meta["virtualSize"]
    _starts = [segment.start for segment in _segments]


def _check_order(path: str, meta: dict[str, Any], checkpoint: str | None) -> None:
    """Raises RuntimeError if a backup does not follow the one before it."""
    if checkpoint is None:
        if meta["incremental"]:
            raise RuntimeError(f"{path}: an incremental backup; the full one has to come first")
    elif not meta["incremental"]:
        raise RuntimeError(f"{path}: a full backup; it has to come first")
    elif meta["parentCheckpoint"] != checkpoint:
        raise RuntimeError(
            f"{path}: follows the checkpoint {meta['parentCheckpoint']}, not {checkpoint}: "
            "a backup is missing, or the order is wrong"
        )


def _meta(reader: BinaryIO) -> dict[str, Any]:
    """The header of a backup."""
    kind, _, length = _STREAM.readFrame(reader)
    if kind != _TYPES.META:
        raise ValueError("it has no header")
    meta: dict[str, Any] = _STREAM.loadMetadata(_exactly(reader, length))
    _end_of_frame(reader)
    return meta


def _data(reader: BinaryIO, meta: dict[str, Any], file: int) -> Iterator[Segment]:
    """The segments that a backup has. Where it has none the disk has zeroes, or, in an
    incremental backup, what it had before."""
    trailer = iter(_STREAM.readCompressionTrailer(reader)) if meta["compressed"] else None
    while True:
        kind, start, length = _STREAM.readFrame(reader)
        if kind == _TYPES.STOP:
            return
        if kind == _TYPES.DATA:
            if trailer is None:
                yield Segment(start, start + length, file, reader.tell())
                reader.seek(length, os.SEEK_CUR)
            else:
                yield from _packed(reader, start, next(trailer), file)
            _end_of_frame(reader)


def _packed(
    reader: BinaryIO, start: int, stored: int | dict[str, list[int]], file: int
) -> Iterator[Segment]:
    """The segments of a compressed frame: one block, or several where it was large."""
    for packed in next(iter(stored.values())) if isinstance(stored, dict) else [stored]:
        offset = reader.tell()
        block = _exactly(reader, packed)
        length = lz4.frame.get_frame_info(block)["content_size"]
        yield Segment(start, start + length, file, offset, packed)
        start += length


def _exactly(reader: BinaryIO, length: int) -> bytes:
    data = reader.read(length)
    if len(data) != length:
        raise EOFError("it ends too early")
    return data


def _end_of_frame(reader: BinaryIO) -> None:
    if reader.read(len(_TYPES.TERM)) != _TYPES.TERM:
        raise EOFError(f"a frame does not end at byte {reader.tell()}")


def _over(below: list[Segment], above: list[Segment]) -> list[Segment]:
    """The segments of both lists; those of ``above`` where both have one."""
    ends = [segment.end for segment in above]
    kept = list(above)
    for segment in below:
        position = segment.start
        for index in range(bisect_right(ends, position), len(above)):
            cover = above[index]
            if cover.start >= segment.end:
                break
            if cover.start > position:
                kept.append(segment.part(position, cover.start))
            position = max(position, cover.end)
        if position < segment.end:
            kept.append(segment.part(position, segment.end))
    return sorted(kept)


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def open(readonly: bool) -> list[int]:  # noqa: A001 - the name is nbdkit's
    return [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in _files]


def close(handle: list[int]) -> None:
    for fd in handle:
        os.close(fd)


def get_size(handle: list[int]) -> int:
    return _size


def can_write(handle: list[int]) -> bool:
    return False


def can_multi_conn(handle: list[int]) -> bool:
    return True


def _within(offset: int, length: int) -> Iterator[Segment]:
    """The parts of segments that lie in a range of the disk."""
    end = offset + length
    for index in range(max(bisect_right(_starts, offset) - 1, 0), len(_segments)):
        segment = _segments[index]
        if segment.start >= end:
            return
        if segment.end > offset:
            yield segment.part(max(segment.start, offset), min(segment.end, end))


def pread(handle: list[int], buffer: bytearray, offset: int, flags: int) -> None:
    view = memoryview(buffer)
    view[:] = bytes(len(view))
    for segment in _within(offset, len(view)):
        length = segment.end - segment.start
        if segment.packed:
            block = _unpacked(segment.file, segment.offset, segment.packed)
            data = block[segment.skip : segment.skip + length]
        else:
            data = os.pread(handle[segment.file], length, segment.offset)
        if len(data) != length:
            raise RuntimeError(f"{_files[segment.file]}: it was cut short")
        view[segment.start - offset : segment.end - offset] = data


@lru_cache(BLOCKS_KEPT)
def _unpacked(file: int, offset: int, packed: int) -> bytes:
    with builtins.open(_files[file], "rb") as reader:
        reader.seek(offset)
        return bytes(lz4.frame.decompress(_exactly(reader, packed)))


def extents(
    handle: list[int], count: int, offset: int, flags: int
) -> Iterator[tuple[int, int, int]]:
    position = offset
    for segment in _within(offset, count):
        if segment.start > position:
            yield position, segment.start - position, nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
        yield segment.start, segment.end - segment.start, 0
        position = segment.end
    if position < offset + count:
        yield position, offset + count - position, nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
