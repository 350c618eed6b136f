# SPDX-License-Identifier: Apache-2.0
"""A disk for the server's targets: answers from a fixed pattern, now or later, or with an error."""

import errno
from collections.abc import Coroutine
from typing import Any, TypeVar

from nbdstream.errors import LeafFormatError
from nbdstream.export import Hit, StatusExtent

T = TypeVar("T")

# By the number of the block that a request begins in, modulo the length.
_HIT, _ZERO, _MISS, _ERROR, _DAMAGED = range(5)
_KINDS = (_HIT, _HIT, _ZERO, _HIT, _MISS, _HIT, _ERROR, _MISS, _DAMAGED)
BLOCK = 512


def pattern(offset: int, length: int) -> bytes:
    """The content of the disk where it is not zeroes."""
    start = offset % 251
    return (bytes(range(251)) * (length // 251 + 2))[start : start + length]


class PatternExport:
    """An `Export`. Its async methods never wait, so that no event loop is needed (`finished`).

    ``writes`` records (offset, data) of what was written.
    """

    description = "a disk of the fuzzer"
    preferred_block_size = 4096

    def __init__(self, size: int, *, name: str = "disk", read_only: bool = False) -> None:
        self.name = name
        self.size = size
        self.read_only = read_only
        self.writes: list[tuple[int, bytes]] = []

    def _kind(self, offset: int, length: int) -> int:
        assert length > 0 and offset >= 0 and offset + length <= self.size, (offset, length)
        return _KINDS[offset // BLOCK % len(_KINDS)]

    def fails(self, offset: int) -> bool:
        """Whether requests that begin there are answered with an error."""
        return _KINDS[offset // BLOCK % len(_KINDS)] in (_ERROR, _DAMAGED)

    def content(self, offset: int, length: int) -> bytes:
        """What a read of this range has to return, if it doesn't fail."""
        if self._kind(offset, length) == _ZERO:
            return bytes(length)
        return pattern(offset, length)

    def _raise(self, kind: int) -> None:
        if kind == _ERROR:
            raise OSError(errno.EIO, "as the fuzzer wants it")
        if kind == _DAMAGED:
            raise LeafFormatError("a damaged table, says the fuzzer")

    def read_nowait(self, view: memoryview, offset: int) -> Hit:
        kind = self._kind(offset, len(view))
        self._raise(kind)
        if kind == _ZERO:
            return Hit.ZERO
        if kind == _MISS:
            return Hit.MISS
        view[:] = pattern(offset, len(view))
        return Hit.DONE

    def write_nowait(self, view: memoryview, offset: int) -> Hit:
        assert not self.read_only
        kind = self._kind(offset, len(view))
        self._raise(kind)
        if kind == _MISS:
            return Hit.MISS
        self.writes.append((offset, bytes(view)))
        return Hit.DONE

    async def read(self, view: memoryview, offset: int) -> list[tuple[int, int]]:
        kind = self._kind(offset, len(view))
        self._raise(kind)
        view[:] = self.content(offset, len(view))
        return [(offset, len(view))] if kind == _ZERO else []

    async def write(self, view: memoryview, offset: int, *, fua: bool) -> None:
        assert not self.read_only
        self._raise(self._kind(offset, len(view)))
        self.writes.append((offset, bytes(view)))

    async def zero(
        self, offset: int, length: int, *, may_trim: bool, fast_only: bool, fua: bool
    ) -> None:
        assert not self.read_only
        self._raise(self._kind(offset, length))
        if fast_only and length % BLOCK:
            raise OSError(errno.ENOTSUP, "not fast")

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        assert not self.read_only
        self._raise(self._kind(offset, length))

    async def flush(self) -> None:
        pass

    async def cache(self, offset: int, length: int) -> None:
        self._raise(self._kind(offset, length))

    async def block_status(self, offset: int, length: int, limit: int) -> list[StatusExtent]:
        self._raise(self._kind(offset, length))
        assert limit > 0
        extents: list[StatusExtent] = []
        end = min(offset + length, offset + 64 * BLOCK)
        while offset < end and len(extents) < limit:
            unit = offset // BLOCK
            stop = min(end, (unit + 1) * BLOCK)
            local, zero = unit % 3 != 0, unit % 4 == 0
            extents.append(
                StatusExtent(offset, stop - offset, local, zero, zero, 1 if local else 2)
            )
            offset = stop
        return extents


def finished(call: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing."""
    try:
        call.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    call.close()
    raise AssertionError("the coroutine waits for something")
