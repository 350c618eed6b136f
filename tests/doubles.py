# SPDX-License-Identifier: Apache-2.0
"""A leaf and a backing that tests can steer: every awkward moment on request.

`MemoryLeaf` keeps its promises to the letter and checks that its callers keep theirs;
it can be made to raise the interface's signals at any call. `GatedBacking` answers only
when told to, can fail, and records every read, so that "one fetch per cluster" can be
counted.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import trio

from nbdstream.backing.base import Backing, BackingStatistics, Grant, Priority
from nbdstream.backing.identity import fingerprint
from nbdstream.disk import buffers, fetch
from nbdstream.disk.buffers import Buffers
from nbdstream.errors import BackingReadError
from nbdstream.extents import BackingExtent
from nbdstream.leaf.base import (
    ALL_ZERO,
    SCATTERED,
    BackingReference,
    CheckResult,
    ColdMetadata,
    FlushNeeded,
    Leaf,
    LeafExtent,
    State,
    write_exactly,
)


class MemoryLeaf(Leaf):
    """A leaf in a memory file: guest offset = host offset, one state per block.

    ``signal`` is asked at the start of each call that may raise ColdMetadata or
    FlushNeeded; it may raise one. ``compressed`` maps cluster offsets to their content.
    """

    def __init__(self, size: int, *, block_size: int = 512, cluster_size: int = 2048) -> None:
        self.path = "memory"
        self.format = "memory"
        self.size = size
        self.block_size = block_size
        self.cluster_size = cluster_size
        self.read_only = False
        self.fd = os.memfd_create("leaf")
        os.ftruncate(self.fd, size)
        self.backing = BackingReference("memory:")
        self.states = [State.UNALLOCATED] * -(-size // block_size)
        self.compressed: dict[int, bytes] = {}
        self.signal: Callable[[], None] = lambda: None
        self.store_error: OSError | None = None
        self.stores: list[tuple[str, int, int]] = []
        self._dirty = False
        self.syncs = 0

    def _blocks(self, offset: int, length: int) -> range:
        return range(offset // self.block_size, -(-(offset + length) // self.block_size))

    def _check_aligned(self, offset: int, length: int) -> None:
        end = offset + length
        assert offset % self.block_size == 0, "unaligned offset"
        assert end % self.block_size == 0 or end == self.size, "unaligned end"

    def locate(self, offset: int, length: int) -> int:
        assert 0 < length <= self.size - offset
        states = {self.states[block] for block in self._blocks(offset, length)}
        if states == {State.DATA}:
            return offset
        return ALL_ZERO if states == {State.ZERO} else SCATTERED

    def extents(self, offset: int, length: int) -> Iterator[LeafExtent]:
        self.signal()
        assert 0 < length <= self.size - offset
        end = offset + length
        for block in self._blocks(offset, length):
            state = self.states[block]
            if state is State.UNALLOCATED and self.backing is None:
                state = State.ZERO
            start = max(block * self.block_size, offset)
            stop = min((block + 1) * self.block_size, end)
            cluster = start - start % self.cluster_size
            host = {State.DATA: start, State.COMPRESSED: cluster}.get(state, -1)
            yield LeafExtent(start, stop - start, state, host)

    def read(self, extent: LeafExtent, view: memoryview) -> None:
        if extent.state is State.COMPRESSED:
            start = extent.offset - extent.host
            view[:] = self.compressed[extent.host][start : start + extent.length]
        else:
            super().read(extent, view)

    def write(self, offset: int, view: memoryview) -> None:
        self.signal()
        if self.store_error is not None:
            raise self.store_error
        length = len(view)
        for block in self._blocks(offset, length):
            start = block * self.block_size
            whole = offset <= start and min(start + self.block_size, self.size) <= offset + length
            assert whole or self.states[block] is State.DATA, "partial write to no data"
        self._check_compressed(offset, length)
        self.stores.append(("write", offset, length))
        write_exactly(self.fd, view, offset)
        self._mark(offset, length, State.DATA)

    def zero(self, offset: int, length: int, *, unmap: bool, as_backing: bool = False) -> None:
        self.signal()
        if self.store_error is not None:
            raise self.store_error
        self._check_aligned(offset, length)
        self._check_compressed(offset, length)
        self.stores.append(("zero", offset, length))
        # What a ZERO block has in the file must never be seen: make it recognisable.
        write_exactly(self.fd, memoryview(b"\xee" * length), offset)
        self._mark(offset, length, State.ZERO)

    def _check_compressed(self, offset: int, length: int) -> None:
        for block in self._blocks(offset, length):
            if self.states[block] is State.COMPRESSED:
                cluster = block * self.block_size // self.cluster_size * self.cluster_size
                end = min(cluster + self.cluster_size, self.size)
                assert offset <= cluster and end <= offset + length, "a part of a compressed one"

    def _mark(self, offset: int, length: int, state: State) -> None:
        for block in self._blocks(offset, length):
            self.states[block] = state
        self._dirty = True

    @property
    def dirty(self) -> bool:
        return self._dirty

    def begin_flush(self) -> Callable[[], None]:
        self._dirty = False

        def finish() -> None:
            self.syncs += 1

        return finish

    def end_flush(self, *, ok: bool) -> None:
        self._dirty = self._dirty or not ok

    def drop_backing(self) -> None:
        self.backing = None

    def record_backing(self, backing: BackingReference) -> None:
        self.backing = backing

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def check(self, *, repair: bool) -> CheckResult:
        return CheckResult()

    # -- for tests ---------------------------------------------------------------------

    def compress(self, cluster: int, content: bytes) -> None:
        """Make one cluster COMPRESSED with this content."""
        self.compressed[cluster] = content
        for block in self._blocks(cluster, len(content)):
            self.states[block] = State.COMPRESSED

    def data_between(self, start: int, end: int) -> bool:
        """Whether all of a range is DATA."""
        return {self.states[block] for block in self._blocks(start, end - start)} == {State.DATA}

    def cold(self) -> ColdMetadata:
        """The signal, naming a place that can really be warmed."""
        return ColdMetadata(self.fd, 0, 1)

    def full(self) -> FlushNeeded:
        """The other signal."""
        return FlushNeeded()


@dataclass
class Read:
    """One read that reached the backing, and the gate that lets it be answered."""

    offset: int
    length: int
    priority: Priority
    gate: trio.Event = field(default_factory=trio.Event)
    fail: bool = False


class GatedBacking(Backing):
    """A backing in memory. With ``gated``, each read waits for its gate; else it passes.

    ``holes`` are reported (and may be known) as zero.
    """

    def __init__(self, content: bytes, *, gated: bool = False) -> None:
        self.uri = "memory:"
        self.content = content
        self.size = len(content)
        self.gated = gated
        self.reads: list[Read] = []
        self.promoted: list[tuple[int, int]] = []
        self.holes: list[tuple[int, int]] = []
        self.known = False
        self.error: BackingReadError | None = None
        self.speed = 0
        self.room = 8192
        self.grants_held = 0

    async def read(
        self, view: memoryview, offset: int, priority: Priority, grant: Grant | None = None
    ) -> None:
        if grant is not None:
            grant.use(priority)
        assert offset >= 0 and offset + len(view) <= self.size
        read = Read(offset, len(view), priority)
        self.reads.append(read)
        if self.gated:
            await read.gate.wait()
        else:
            await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        if read.fail:
            view[:] = b"\xdd" * len(view)  # garbage that must never be seen
            raise BackingReadError("told to fail")
        view[:] = self.content[offset : offset + len(view)]

    def promote(self, offset: int, length: int) -> None:
        self.promoted.append((offset, length))

    def known_zero(self, offset: int, length: int) -> bool:
        return self.known and any(
            start <= offset and offset + length <= start + size for start, size in self.holes
        )

    def forget(self) -> None:
        self.known = False

    async def pin(self) -> str:
        return await fingerprint(self)

    async def extents(self, offset: int, length: int) -> list[BackingExtent]:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        end = offset + length
        for start, size in self.holes:
            if start <= offset < start + size:
                return [BackingExtent(offset, min(end, start + size) - offset, True)]
            if offset < start < end:
                end = start
        return [BackingExtent(offset, end - offset, False)]

    async def wait_for_room(self, priority: Priority) -> Grant:
        await trio.lowlevel.checkpoint()
        self.grants_held += 1
        return Grant(self.room, priority, self._grant_ended)

    def _grant_ended(self, _grant: Grant) -> None:
        self.grants_held -= 1

    def set_unit_least(self, length: int) -> None:
        assert length > 0

    def set_speed(self, speed: int) -> None:
        self.speed = speed

    def statistics(self) -> BackingStatistics:
        return BackingStatistics(
            connected=True,
            since=0.0,
            connections=1,
            last_error="",
            reconnects=0,
            retries=0,
            requests={},
            bytes={},
            in_flight=0,
            window=0,
            rate=0.0,
            base_rtt=0.0,
        )

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    # -- for tests ---------------------------------------------------------------------

    @property
    def waiting(self) -> list[Read]:
        """Reads whose gate is still shut."""
        return [read for read in self.reads if not read.gate.is_set()]

    def fetched_twice(self) -> list[tuple[int, int]]:
        """Ranges that were read more than once."""
        seen: set[int] = set()
        twice = []
        for read in self.reads:
            area = set(range(read.offset, read.offset + read.length))
            if area & seen:
                twice.append((read.offset, read.length))
            seen |= area
        return twice


class PoisonedBuffers(Buffers):
    """What is read from a buffer after it was given back is poison."""

    def give(self, buffer: bytearray) -> None:
        buffer[:] = b"\xee" * len(buffer)
        super().give(buffer)


def poison_buffers() -> Iterator[None]:
    """For a fixture: buffers of every size are used again, and poisoned in between."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "LEAST", 1)
        patch.setattr(fetch, "Buffers", PoisonedBuffers)
        yield
