# SPDX-License-Identifier: Apache-2.0
"""What every leaf format must do when it flushes, when a sync fails, and when the disk is full."""

import errno
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nbdstream.errors import LeafError
from nbdstream.extents import align_down
from nbdstream.leaf.base import (
    BackingReference,
    Leaf,
    SyncError,
)
from testbed.leaves import flush
from tests.journal import recording
from tests.leaf_support import (
    ImageKind,
    full_disk,
    pattern,
    qemu_check,
    read,
    write,
)

SIZE = (4 << 20) + 512  # not a multiple of any cluster


class LeafFlushes:
    """Part of the suite of `tests.leaf_conformance`. Each test makes its own image of the fixture
    ``kind``."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "disk"

    @pytest.fixture
    def leaf(self, kind: ImageKind, path: Path) -> Any:
        leaf = kind.new(path, SIZE)
        yield leaf
        leaf.close()
        qemu_check(path, kind.format)

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
