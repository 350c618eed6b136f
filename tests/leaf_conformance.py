# SPDX-License-Identifier: Apache-2.0
"""What every leaf format must do: one suite, run over every kind of image.

A test module derives a class from `LeafConformance` and gives it a fixture ``kind``:

    class TestRaw(LeafConformance):
        @pytest.fixture(params=KINDS, ids=str)
        def kind(self, request): return request.param
"""

import os
from functools import partial
from pathlib import Path

import pytest

from nbdstream.errors import LeafInUseError
from nbdstream.extents import align_down
from nbdstream.leaf import probe_format
from nbdstream.leaf.base import (
    SCATTERED,
    BackingReference,
    ColdMetadata,
    FlushNeeded,
    Leaf,
    State,
)
from testbed.leaves import drive, flush
from tests.leaf_flushes import SIZE, LeafFlushes
from tests.leaf_support import (
    BACKING,
    ImageKind,
    check_locate,
    cold_page_cache,
    extents,
    guest_write,
    pattern,
    qemu_check,
    read,
    write,
    zero,
)

BIG = 8 << 40


class LeafConformance(LeafFlushes):
    """The suite. Each test makes its own image of the fixture ``kind``."""

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
