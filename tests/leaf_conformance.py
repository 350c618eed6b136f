# SPDX-License-Identifier: Apache-2.0
"""What every leaf format must do: one suite, run over every kind of image.

A test module derives a class from `LeafConformance` and gives it a fixture ``kind``, and
a state machine from `LeafMachine` with its ``kind`` set:

    class TestRaw(LeafConformance):
        @pytest.fixture(params=KINDS, ids=str)
        def kind(self, request): return request.param

    TestRawModel = model_test(ours("raw"))
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbdstream.errors import LeafError, LeafInUseError
from nbdstream.extents import align_down, align_up
from nbdstream.leaf import probe_format
from nbdstream.leaf.base import (
    ALL_ZERO,
    SCATTERED,
    BackingReference,
    ColdMetadata,
    FlushNeeded,
    Leaf,
    State,
    SyncError,
)
from testbed.leaves import drive, flush
from tests.leaf_support import (
    BACKING,
    ImageKind,
    check_locate,
    extents,
    guest_write,
    pattern,
    qemu_check,
    read,
    write,
    zero,
)
from tests.powercut import recording

SIZE = (4 << 20) + 512  # not a multiple of any cluster
BIG = 8 << 40


@contextmanager
def cold_page_cache() -> Iterator[set[tuple[int, int]]]:
    """Reads that must not wait find each piece of a file out of the page cache, once.

    Yields what was asked for so far: (descriptor, offset).
    """
    real = os.preadv
    asked: set[tuple[int, int]] = set()

    def preadv(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT and (fd, offset) not in asked:
            asked.add((fd, offset))
            raise BlockingIOError(errno.EAGAIN, "cold")
        return real(fd, buffers, offset, flags)

    with mock.patch.object(os, "preadv", preadv):
        yield asked


@contextmanager
def full_disk() -> Iterator[None]:
    """Nothing can be written."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    with mock.patch.object(os, "pwrite", full), mock.patch.object(os, "pwritev", full):
        yield


class LeafConformance:
    """The suite. Each test makes its own image of the fixture ``kind``."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "disk"

    @pytest.fixture
    def leaf(self, kind: ImageKind, path: Path) -> Any:
        leaf = kind.new(path, SIZE)
        yield leaf
        leaf.close()
        qemu_check(path, kind.format)

    # -- a new image -------------------------------------------------------------------

    def test_new_image(self, kind: ImageKind, path: Path, leaf: Leaf) -> None:
        assert probe_format(str(path)) == kind.format == leaf.format
        assert leaf.size == SIZE
        assert leaf.cluster_size % leaf.block_size == 0
        assert leaf.backing is not None and leaf.backing.uri == BACKING.uri
        assert {extent.state for extent in extents(leaf)} == {State.UNALLOCATED}
        assert leaf.locate(0, 4096) == SCATTERED
        assert not leaf.read_only
        assert leaf.check(repair=False).errors == 0

    def test_without_backing_nothing_is_unallocated(self, kind: ImageKind, path: Path) -> None:
        leaf = kind.new(path, SIZE, None)
        assert leaf.backing is None
        assert {extent.state for extent in extents(leaf)} == {State.ZERO}
        guest_write(leaf, 1000, b"local", b"")
        leaf.close()
        again = kind.open(path)
        assert read(again, 998, 9, b"") == b"\0\0local\0\0"
        again.close()
        qemu_check(path, kind.format)

    def test_the_last_block_may_be_short(self, leaf: Leaf) -> None:
        start = align_down(SIZE - 1, leaf.block_size)
        data = pattern(start, SIZE - start, 7)
        write(leaf, start, data)
        assert read(leaf, start, SIZE - start, b"") == data
        assert extents(leaf, start)[-1].state is State.DATA

    # -- data --------------------------------------------------------------------------

    def test_a_block_is_allocated_by_itself(self, leaf: Leaf) -> None:
        block = leaf.block_size
        backing = pattern(0, SIZE)
        write(leaf, 3 * block, pattern(0, block, 1))
        states = [extent.state for extent in extents(leaf, 2 * block, 3 * block)]
        assert states == [State.UNALLOCATED, State.DATA, State.UNALLOCATED]
        assert read(leaf, 2 * block, block, backing) == backing[2 * block : 3 * block]
        assert read(leaf, 3 * block, block, backing) == pattern(0, block, 1)
        for offset, length in ((3 * block, block), (3 * block + 5, 7), (2 * block, 2 * block)):
            check_locate(leaf, offset, length, backing)
        assert leaf.locate(4 * block - 512, 512) >= 0

    def test_overwriting_a_part_in_place(self, leaf: Leaf) -> None:
        block = leaf.block_size
        write(leaf, 0, pattern(0, 2 * block, 1))
        flush(leaf)
        write(leaf, block - 100, b"x" * 200)
        expected = bytearray(pattern(0, 2 * block, 1))
        expected[block - 100 : block + 100] = b"x" * 200
        assert read(leaf, 0, 2 * block, b"") == expected

    def test_a_write_may_start_and_end_within_data(self, leaf: Leaf) -> None:
        block = leaf.block_size
        write(leaf, 0, pattern(0, block, 1))
        write(leaf, 3 * block, pattern(3 * block, block, 1))
        write(leaf, block - 512, pattern(block - 512, 2 * block + 1024, 2))
        expected = (
            pattern(0, block - 512, 1)
            + pattern(block - 512, 2 * block + 1024, 2)
            + pattern(3 * block + 512, block - 512, 1)
        )
        assert read(leaf, 0, 4 * block, b"") == expected

    def test_zero(self, leaf: Leaf) -> None:
        block = leaf.block_size
        write(leaf, 0, pattern(0, 2 * block, 1))
        for number, unmap in ((1, True), (0, False), (4, True), (6, False)):
            zero(leaf, number * block, block, unmap=unmap)
            found = extents(leaf, number * block, block)
            assert {extent.state for extent in found} <= {State.ZERO, State.DATA}
            assert not any(read(leaf, number * block, block, b"\xff" * SIZE))
            check_locate(leaf, number * block, block, b"")
        write(leaf, 4 * block, pattern(4 * block, block, 2))
        assert read(leaf, 4 * block, block, b"") == pattern(4 * block, block, 2)

    def test_zero_gives_space_back(self, leaf: Leaf) -> None:
        length = 2 << 20
        write(leaf, 0, pattern(0, length, 1))
        flush(leaf)
        before = os.fstat(leaf.fd).st_blocks
        zero(leaf, 0, length, unmap=True)
        flush(leaf)
        assert os.fstat(leaf.fd).st_blocks <= before - length // 512 * 9 // 10

    # -- durability ----------------------------------------------------------------------

    def test_everything_is_there_after_a_reopen(
        self, kind: ImageKind, path: Path, leaf: Leaf
    ) -> None:
        backing = pattern(0, SIZE)
        guest_write(leaf, 70_000, b"guest" * 1000, backing)
        zero(leaf, 2 << 20, leaf.block_size)
        expected = read(leaf, 0, SIZE, backing)
        states = [extent[:3] for extent in extents(leaf)]
        flush(leaf)
        leaf.close()
        qemu_check(path, kind.format)
        for read_only in (True, False):
            again = kind.open(path, read_only=read_only)
            assert again.read_only is read_only
            assert read(again, 0, SIZE, backing) == expected
            assert [extent[:3] for extent in extents(again)] == states
            assert not again.dirty
            again.close()

    def test_dirty_until_flushed(self, leaf: Leaf) -> None:
        assert not leaf.dirty
        write(leaf, 0, pattern(0, leaf.block_size, 1))
        assert leaf.dirty
        rest = leaf.begin_flush()
        write(leaf, 1 << 20, pattern(1 << 20, leaf.block_size, 1))
        rest()
        leaf.end_flush(ok=True)
        assert leaf.dirty, "what came after the snapshot is not flushed"
        flush(leaf)
        assert not leaf.dirty

    def test_a_flush_without_room_can_be_repeated(self, kind: ImageKind, path: Path) -> None:
        leaf = kind.new(path, SIZE)
        write(leaf, 0, pattern(0, leaf.block_size, 1))
        with full_disk(), pytest.raises(OSError, match="full"):
            flush(leaf)
        assert leaf.dirty
        write(leaf, 4 * leaf.block_size, pattern(0, leaf.block_size, 2))
        flush(leaf)
        assert not leaf.dirty
        leaf.close()
        again = kind.open(path)
        assert read(again, 0, again.block_size, b"") == pattern(0, again.block_size, 1)
        assert read(again, 4 * again.block_size, 512, b"") == pattern(0, 512, 2)
        again.close()
        qemu_check(path, kind.format)

    def test_the_first_failed_sync_is_final(self, kind: ImageKind, path: Path) -> None:
        """The next sync would succeed, and prove nothing."""
        backing = pattern(0, SIZE)
        leaf = kind.new(path, SIZE)
        block = leaf.block_size
        write(leaf, 0, pattern(0, block, 1))
        flush(leaf)
        write(leaf, 2 * block, pattern(0, block, 2))
        with mock.patch.object(os, "fdatasync", side_effect=OSError(errno.EIO, "broken")):
            with pytest.raises(SyncError, match="broken"):
                flush(leaf)
        assert leaf.dirty
        write(leaf, 4 * block, pattern(0, block, 3))
        assert read(leaf, 4 * block, block, b"") == pattern(0, block, 3)
        with recording(path.parent) as journal:
            for refused in (
                leaf.begin_flush,
                lambda: leaf.record_backing(BackingReference("nbd://other/")),
                leaf.drop_backing,
                lambda: leaf.check(repair=True),
                leaf.close,
            ):
                with pytest.raises(SyncError, match="an earlier sync failed"):
                    refused()
        assert not journal.operations
        leaf.close()
        again = kind.open(path)
        assert read(again, 0, SIZE, backing) == pattern(0, block, 1) + backing[block:]
        again.close()
        qemu_check(path, kind.format)

    def test_only_a_complete_leaf_lets_go_of_its_backing(self, path: Path, leaf: Leaf) -> None:
        """What counts is the file, whatever memory and the caller say."""
        backing = pattern(0, SIZE)
        last = align_down(SIZE - 1, leaf.block_size)
        write(leaf, 0, backing[:last])
        flush(leaf)
        with pytest.raises(LeafError, match=f"still needs its backing: nothing at {last} yet"):
            leaf.drop_backing()
        write(leaf, last, backing[last:])
        with pytest.raises(LeafError, match=f"still needs its backing: nothing at {last} yet"):
            leaf.drop_backing()
        flush(leaf)
        assert leaf.backing is not None
        leaf.drop_backing()
        assert leaf.backing is None

    def test_a_full_disk_changes_nothing_else(self, kind: ImageKind, path: Path) -> None:
        leaf = kind.new(path, SIZE)
        block = leaf.block_size
        backing = pattern(0, SIZE)
        write(leaf, 0, pattern(0, block, 1))

        with full_disk(), pytest.raises(OSError, match="full"):
            write(leaf, 2 * block, pattern(0, 3 * block, 2))
        assert read(leaf, 0, SIZE, backing) == pattern(0, block, 1) + backing[block:]
        write(leaf, 3 * block, pattern(0, block, 3))
        flush(leaf)
        assert read(leaf, 3 * block, block, backing) == pattern(0, block, 3)
        leaf.close()
        qemu_check(path, kind.format)

    def test_cold_metadata_is_asked_for_before_anything_changes(
        self, kind: ImageKind, path: Path
    ) -> None:
        """Every first look at a piece of metadata finds it out of the page cache."""
        backing = pattern(0, SIZE)
        leaf = kind.new(path, SIZE)
        block = leaf.block_size
        write(leaf, 0, pattern(0, block, 1))
        leaf.close()
        with cold_page_cache() as asked:
            for change in (
                lambda leaf: leaf.write(0, memoryview(pattern(0, 3 * block, 2))),
                lambda leaf: leaf.zero(0, 3 * block, unmap=True),
                lambda leaf: list(leaf.extents(0, SIZE)),
            ):
                leaf = kind.open(path)
                asked.clear()
                before = path.read_bytes()
                signals = 0
                while True:
                    try:
                        change(leaf)
                        break
                    except ColdMetadata as cold:
                        assert path.read_bytes() == before
                        signals += 1
                        cold.warm()
                    except FlushNeeded:
                        flush(leaf)
                        before = path.read_bytes()
                assert signals == len(asked)
                expected = read(leaf, 0, SIZE, backing)
                leaf.close()
                leaf = kind.open(path, read_only=True)
                assert read(leaf, 0, SIZE, backing) == expected
                leaf.close()
        qemu_check(path, kind.format)

    # -- the backing ---------------------------------------------------------------------

    def test_record_backing(self, kind: ImageKind, path: Path, leaf: Leaf) -> None:
        write(leaf, 0, pattern(0, leaf.block_size, 1))
        for number in range(3):
            other = BackingReference(f"nbd://other/{number}", "raw", SIZE + number, f"id-{number}")
            flush(leaf)
            leaf.record_backing(other)
            assert leaf.backing == other
            leaf.close()
            leaf = kind.open(path)
            assert leaf.backing == other
            assert read(leaf, 0, 512, b"") == pattern(0, 512, 1)
        leaf.close()
        qemu_check(path, kind.format)

    def test_drop_backing(self, kind: ImageKind, path: Path, leaf: Leaf) -> None:
        backing = pattern(0, SIZE)
        step = leaf.cluster_size
        for offset in range(0, SIZE, step):
            if (offset // step) % 3:
                write(leaf, offset, backing[offset : offset + step])
            else:
                zero(leaf, offset, min(step, SIZE - offset))
        expected = read(leaf, 0, SIZE, b"")
        flush(leaf)
        leaf.drop_backing()
        assert leaf.backing is None
        write(leaf, 0, pattern(0, leaf.block_size, 9))
        leaf.close()
        again = kind.open(path)
        assert again.backing is None
        found = read(again, 0, SIZE, b"")
        assert found == pattern(0, again.block_size, 9) + expected[again.block_size :]
        again.close()
        qemu_check(path, kind.format)

    # -- one writer ----------------------------------------------------------------------

    def test_one_writer(self, kind: ImageKind, path: Path, leaf: Leaf) -> None:
        for read_only in (False, True):
            with pytest.raises(LeafInUseError, match="in use"):
                kind.open(path, read_only=read_only)
        leaf.close()
        first = kind.open(path, read_only=True)
        second = kind.open(path, read_only=True)
        with pytest.raises(LeafInUseError, match="in use"):
            kind.open(path)
        first.close()
        second.close()
        kind.open(path).close()

    def test_reading_changes_nothing(self, kind: ImageKind, path: Path, leaf: Leaf) -> None:
        write(leaf, 0, pattern(0, leaf.block_size, 1))
        flush(leaf)
        leaf.close()
        before = path.read_bytes()
        again = kind.open(path, read_only=True)
        read(again, 0, SIZE, b"")
        again.check(repair=False)
        again.close()
        assert path.read_bytes() == before

    # -- size ------------------------------------------------------------------------------

    def test_a_huge_image_costs_what_it_holds(self, kind: ImageKind, path: Path) -> None:
        size = min(BIG, kind.size_most)
        leaf = kind.new(path, size)
        assert len(extents(leaf)) < 70_000
        for offset in (0, size // 2, size - leaf.block_size):
            write(leaf, offset, pattern(offset, leaf.block_size, 3))
        flush(leaf)
        leaf.close()
        again = kind.open(path)
        data = [extent for extent in extents(again) if extent.state is State.DATA]
        assert [extent.offset for extent in data] == [0, size // 2, size - again.block_size]
        assert os.fstat(again.fd).st_blocks * 512 < 64 << 20
        again.close()

    def test_dirty_metadata_is_bounded(self, kind: ImageKind, path: Path) -> None:
        """Scattered writes come to a FlushNeeded sooner or later, and go on after it."""
        size = min(512 << 30, kind.size_most)
        leaf = kind.new(path, size)
        needed = 0
        # Far enough apart that each needs a page of metadata of its own.
        step = size // 6000
        data = pattern(0, leaf.block_size, 1)

        def change(offset: int) -> None:
            """Allocate a block; large ones as zeroes, which take no space."""
            if len(data) > 65536:
                leaf.zero(offset, len(data), unmap=False)
            else:
                leaf.write(offset, memoryview(data))

        for offset in range(0, size - step, align_down(step, leaf.cluster_size)):
            try:
                change(offset)
            except FlushNeeded:
                needed += 1
                flush(leaf)
                drive(leaf, partial(change, offset))
        assert 0 < needed < 100
        leaf.close()


# -- the model ------------------------------------------------------------------------------


class LeafMachine(RuleBasedStateMachine):
    """A leaf against a byte array, through flushes, failures and reopens.

    A flush may be under way: then its snapshot is taken, and its blocking part runs at
    some later step, with changes in between.
    """

    kind: ImageKind
    size = (1 << 20) + 1536
    # Where things happen: at both ends, and around the middle.
    places = st.one_of(
        st.integers(0, 160 * 1024),
        st.integers((1 << 19) - 5000, (1 << 19) + 5000),
        st.integers((1 << 20) - 66000, (1 << 20) + 1535),
    )

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.path = self.directory / "disk"
        self.backing = pattern(0, self.size)
        self.version = 0
        self.flushing: Any = None

    @initialize()
    def create(self) -> None:
        self.leaf = self.kind.new(self.path, self.size)
        self.unit = self.leaf.block_size
        self.visible = bytearray(self.backing)
        self.allocated = [False] * -(-self.size // self.unit)

    def _data(self, length: int) -> bytes:
        self.version += 1
        return (b"%d." % self.version * (length // 2 + 1))[:length]

    def _call(self, call: Any) -> None:
        """Like `drive`, but a flush that is under way ends before another one begins."""
        try:
            call()
        except FlushNeeded:
            if self.flushing is not None:
                self.end_flush(ok=True)
            drive(self.leaf, call)
        except Exception:
            drive(self.leaf, call)

    def _mark(self, start: int, end: int) -> None:
        for block in range(start // self.unit, -(-end // self.unit)):
            self.allocated[block] = True

    @rule(offset=places, length=st.integers(1, 150_000))
    def write_anything(self, offset: int, length: int) -> None:
        """As a guest does: the blocks at the edges are filled in first."""
        if self.flushing is not None:
            self.end_flush(ok=True)
        data = self._data(min(length, self.size - offset))
        guest_write(self.leaf, offset, data, self.backing)
        self.visible[offset : offset + len(data)] = data
        self._mark(offset, offset + len(data))
        # A compressed cluster would have been expanded as a whole.
        for extent in extents(self.leaf):
            if extent.state is not State.UNALLOCATED:
                self._mark(extent.offset, extent.end)

    @rule(offset=places, blocks=st.integers(1, 20))
    def write_blocks(self, offset: int, blocks: int) -> None:
        start = align_down(offset, self.unit)
        end = min(start + blocks * self.unit, self.size)
        data = self._data(end - start)
        self._call(lambda: self.leaf.write(start, memoryview(data)))
        self.visible[start:end] = data
        self._mark(start, end)

    @rule(offset=places, blocks=st.integers(1, 20), unmap=st.booleans())
    def zero_blocks(self, offset: int, blocks: int, unmap: bool) -> None:
        start = align_down(offset, self.unit)
        end = min(start + blocks * self.unit, self.size)
        self._call(lambda: self.leaf.zero(start, end - start, unmap=unmap))
        self.visible[start:end] = bytes(end - start)
        self._mark(start, end)

    @precondition(lambda self: self.flushing is None)
    @rule()
    def begin_flush(self) -> None:
        self.flushing = self.leaf.begin_flush()

    @precondition(lambda self: self.flushing is not None)
    @rule(ok=st.booleans())
    def end_flush(self, ok: bool) -> None:
        """With ``ok`` False there is no room for metadata, if there is any to write."""
        rest, self.flushing = self.flushing, None
        try:
            with nullcontext() if ok else full_disk():
                rest()
        except OSError:
            assert not ok
        else:
            ok = True
        self.leaf.end_flush(ok=ok)

    @precondition(lambda self: self.flushing is None)
    @rule()
    def reopen(self) -> None:
        self.leaf.close()
        qemu_check(self.path, self.kind.format)
        self.leaf = self.kind.open(self.path)
        assert not self.leaf.dirty

    @precondition(lambda self: self.flushing is None)
    @rule(number=st.integers(0, 9))
    def record_backing(self, number: int) -> None:
        flush(self.leaf)
        self.leaf.record_backing(BackingReference(f"nbd://host/{number}", "raw", self.size, "id"))

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "leaf"):
            return
        assert read(self.leaf, 0, self.size, self.backing) == self.visible
        for extent in extents(self.leaf):
            first, stop = extent.offset // self.unit, align_up(extent.end, self.unit) // self.unit
            local = extent.state is not State.UNALLOCATED
            assert set(self.allocated[first:stop]) == {local}, extent

    @rule(offset=places, length=st.integers(1, 300_000))
    def locate(self, offset: int, length: int) -> None:
        length = min(length, self.size - offset)
        check_locate(self.leaf, offset, length, self.backing)
        host = self.leaf.locate(offset, length)
        drive(self.leaf, lambda: list(self.leaf.extents(offset, length)))
        # Asked again with all metadata in memory, one block is never a mystery.
        one = min(self.unit - offset % self.unit, length)
        if extents(self.leaf, offset, one)[0].state is State.DATA:
            assert self.leaf.locate(offset, one) >= 0
        assert host in (ALL_ZERO, SCATTERED) or host >= 0

    def teardown(self) -> None:
        try:
            if self.flushing is not None:
                self.end_flush(ok=True)
            if hasattr(self, "leaf"):
                self.leaf.close()
                qemu_check(self.path, self.kind.format)
        finally:
            shutil.rmtree(self.directory)


def model_test(kind: ImageKind, *, examples: int = 40, steps: int = 25) -> Any:
    """The test case that runs `LeafMachine` over a kind of image."""
    machine: Any = type(f"Machine_{kind.name}", (LeafMachine,), {"kind": kind})
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return case
