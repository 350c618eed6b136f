# SPDX-License-Identifier: Apache-2.0
"""Changes by guests that could not be made at once: writes, zeroes, trims.

A change that covers a part of a block first has that block made DATA, with its content unchanged.
Then it is an overwrite in place. The change itself happens in the step that found nothing in
its way.
"""

import enum
import errno
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import starmap
from time import perf_counter

import trio

from nbdstream.disk.atomic import Atomically
from nbdstream.disk.fetch import Fetch
from nbdstream.disk.gate import Gate
from nbdstream.disk.lookup import Lookup
from nbdstream.disk.populate import ZERO_PIECE
from nbdstream.disk.reads import COPY_PIECE
from nbdstream.disk.writeback import Writeback
from nbdstream.disk.zeroes import is_zero, zeroes
from nbdstream.errors import TROUBLE
from nbdstream.extents import pieces
from nbdstream.leaf.base import Leaf, LeafExtent, State


class DetectZeroes(enum.Enum):
    """What to do with guest writes that hold only zeroes (QEMU's detect-zeroes)."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


class Changer:
    """The changes of one disk."""

    def __init__(
        self,
        leaf: Leaf,
        lookup: Lookup,
        atomically: Atomically,
        *,
        gate: Gate,
        writeback: Writeback,
        detect_zeroes: DetectZeroes,
        read: Callable[[memoryview, int], Awaitable[object]],
        fetch: Callable[[LeafExtent], list[Fetch]],
        flush: Callable[[], Awaitable[None]],
    ) -> None:
        """``read`` and ``flush`` are the disk's; ``fetch`` has an extent fetched and stored."""
        self._leaf = leaf
        self._lookup = lookup
        self._atomically = atomically
        self._gate = gate
        self._writeback = writeback
        self._detect_zeroes = detect_zeroes
        self._read = read
        self._fetch = fetch
        self._flush = flush

    async def write(self, view: memoryview, offset: int, *, fua: bool) -> None:
        """Store data; see `Export.write`. Raises OSError, BackingError, LeafError."""
        # Cut where blocks end: a block that the guest covers needs nothing of the backing.
        for at, length in pieces(offset, len(view), COPY_PIECE, self._leaf.block_size):
            piece = view[at - offset : at - offset + length]
            if perf_counter() < self._writeback.congested_until:
                await self._writeback.wait_written()
            await self._change(at, length, self._writer(at, piece))
            await trio.lowlevel.checkpoint()
        if fua:
            await self._flush()

    def _writer(self, offset: int, view: memoryview) -> Callable[[], None]:
        """The plain call that stores this data."""
        if (
            self._detect_zeroes is not DetectZeroes.OFF
            and self._lookup.whole_blocks(offset, len(view)) == (offset, offset + len(view))
            and is_zero(view)
        ):
            unmap = self._detect_zeroes is DetectZeroes.UNMAP
            return partial(self._leaf.zero, offset, len(view), unmap=unmap)
        return partial(self._leaf.write, offset, view)

    async def zero(
        self, offset: int, length: int, *, may_trim: bool, fast_only: bool, fua: bool
    ) -> None:
        """Make a range read as zeroes; see `Export.zero`. Raises OSError, BackingError,
        LeafError."""
        start, end = self._lookup.whole_blocks(offset, length)
        if start < end:
            edges = [(offset, start - offset), (end, offset + length - end)]
        else:
            edges = [(offset, length)]
        if fast_only and await self._atomically(
            lambda: any(starmap(self._lookup.slow_to_zero, edges))
        ):
            raise OSError(errno.ENOTSUP, "a part of a block would have to be fetched first")
        for at, size in edges:
            if size and not await self._atomically(self._lookup.reads_zero, at, size):
                await self.write(memoryview(zeroes(size)), at, fua=False)
        await self._zero_blocks(start, end, unmap=may_trim)
        if fua:
            await self._flush()

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """Give back whole blocks; see `Export.trim`. Raises OSError, LeafError."""
        start, end = self._lookup.whole_blocks(offset, length)
        await self._zero_blocks(start, end, unmap=True)
        if fua:
            await self._flush()

    async def _zero_blocks(self, start: int, end: int, *, unmap: bool) -> None:
        for offset in range(start, end, ZERO_PIECE):
            length = min(ZERO_PIECE, end - offset)
            zero = partial(self._leaf.zero, offset, length, unmap=unmap)
            await self._change(offset, length, zero)
            await trio.lowlevel.checkpoint()

    async def _change(self, offset: int, length: int, change: Callable[[], None]) -> None:
        """Clear what is in the way of a change by a guest, then make it."""

        def attempt() -> LeafExtent | None:
            if self._leaf.read_only:
                raise OSError(errno.EROFS, "the leaf is open read-only")
            self._gate.check()
            obstacle = self._lookup.obstacle(offset, length)
            if obstacle is None:
                change()
            return obstacle

        if self._gate.reason:
            await self._gate.wait_for_change()
        failure: Exception | None = None
        while (obstacle := await self._atomically(attempt)) is not None:
            if failure is not None:
                raise failure
            try:
                await self._clear(obstacle)
            except TROUBLE as error:
                # Another write may have cleared the way meanwhile: look once more.
                failure = error

    async def _clear(self, obstacle: LeafExtent) -> None:
        """Make DATA of (at least) one obstacle, contents unchanged."""
        if obstacle.state is State.COMPRESSED:
            await self._expand(obstacle)
        elif obstacle.state is State.ZERO or self._lookup.known_zero(obstacle):

            def fill() -> None:
                if self._lookup.reads_zero(obstacle.offset, obstacle.length):
                    self._leaf.write(obstacle.offset, memoryview(zeroes(obstacle.length)))

            await self._atomically(fill)
        else:
            for fetch in self._fetch(obstacle):
                await fetch.wait()
                if fetch.store_error is not None:
                    raise fetch.store_error

    async def _expand(self, extent: LeafExtent) -> None:
        """Replace a compressed cluster by its plain content."""
        offset, length = self._lookup.cluster(extent.offset)

        before = await self._atomically(self._lookup.extents, offset, length)
        data = memoryview(bytearray(length))
        await self._read(data, offset)

        def store() -> None:
            if self._lookup.extents(offset, length) == before:
                self._leaf.write(offset, data)

        await self._atomically(store)
