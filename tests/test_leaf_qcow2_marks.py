# SPDX-License-Identifier: Apache-2.0
"""Damage that shows while an image is open is recorded in it, in time and for good."""

import errno
import os
from pathlib import Path
from unittest import mock

import pytest

from nbdstream.errors import LeafFormatError
from nbdstream.leaf import open_leaf
from nbdstream.leaf.base import FlushNeeded, SyncError
from testbed.leaves import flush
from testbed.peers import run
from tests.leaf_support import ImageKind, extents, pattern, plain, qemu_check
from tests.qcow2_damage import KINDS, Image


def marked(image: Image) -> bool:
    return bool(image.get(72) & 2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_damage_is_recorded_before_the_file_grows(kind: ImageKind, tmp_path: Path) -> None:
    image = Image.make(tmp_path / "disk", kind)
    size = image.path.stat().st_size
    entry = 1 << 63 | size
    image.put(image.l2, entry)
    leaf = open_leaf(str(image.path), format="qcow2")
    with pytest.raises(LeafFormatError, match=f"L2 entry at {image.l2:#x}"):
        extents(leaf, 0, 4096)
    assert leaf.dirty
    content = pattern(0, 256 * 1024, 9)
    with pytest.raises(FlushNeeded):
        leaf.write(768 * 1024, memoryview(content))
    assert image.path.stat().st_size == size
    flush(leaf)
    assert marked(image) and not leaf.dirty
    assert image.get(image.l2) == entry | 1 << 57
    leaf.write(768 * 1024, memoryview(content))
    leaf.close()
    assert marked(image)
    assert run(["qemu-io", "-r", "-f", "qcow2", "-c", "read 768k 64k", image.path])
    assert "corrupt" in run(["qemu-img", "info", image.path])


@pytest.mark.parametrize("fails", (0, 1, 2))
def test_damage_is_not_recorded_after_a_failed_sync(fails: int, tmp_path: Path) -> None:
    """The sync of the mark itself may fail; the damage may be met after a failed sync."""
    image = Image.make(tmp_path / "disk", plain(4096))
    image.put(image.l2, 1 << 63 | 1 << 40)
    leaf = open_leaf(str(image.path), format="qcow2")
    if fails == 0:
        with mock.patch.object(os, "fdatasync", side_effect=OSError(errno.EIO, "bad sector")):
            with pytest.raises(SyncError):
                flush(leaf)
    with pytest.raises(LeafFormatError):
        extents(leaf, 0, 4096)
    if fails:
        with mock.patch.object(os, "fdatasync", side_effect=OSError(errno.EIO, "bad sector")):
            with pytest.raises(SyncError):
                flush(leaf)
    before = image.path.read_bytes()
    for _ in range(fails):
        with pytest.raises(SyncError):
            flush(leaf)
    with pytest.raises(SyncError):
        leaf.close()
    assert image.path.read_bytes() == before
    assert fails or not marked(image)


def test_a_flush_that_records_damage_can_be_repeated(tmp_path: Path) -> None:
    image = Image.make(tmp_path / "disk", plain(4096))
    image.put(image.l2, 1 << 63 | 1 << 40)
    leaf = open_leaf(str(image.path), format="qcow2")
    with pytest.raises(LeafFormatError):
        extents(leaf, 0, 4096)
    with mock.patch.object(os, "pwrite", side_effect=OSError(errno.ENOSPC, "full")):
        with pytest.raises(OSError, match="full"):
            flush(leaf)
    assert not marked(image) and leaf.dirty
    flush(leaf)
    assert marked(image) and not leaf.dirty
    assert image.get(image.l2) == 1 << 63 | 1 << 40
    leaf.close()


def test_reading_a_damaged_image_marks_nothing(tmp_path: Path) -> None:
    image = Image.make(tmp_path / "disk", plain(4096))
    image.put(image.l2, 1 << 63 | 1 << 40)
    before = image.path.read_bytes()
    leaf = open_leaf(str(image.path), read_only=True, format="qcow2")
    with pytest.raises(LeafFormatError):
        extents(leaf, 0, 4096)
    assert not leaf.dirty
    leaf.close()
    assert image.path.read_bytes() == before


def test_a_leaf_marked_corrupt_can_be_repaired_while_it_is_open(tmp_path: Path) -> None:
    image = Image.make(tmp_path / "disk", plain(4096))
    image.put(image.l2, 1 << 63 | 1 << 40)
    leaf = open_leaf(str(image.path), format="qcow2")
    with pytest.raises(LeafFormatError):
        extents(leaf, 0, 4096)
    assert leaf.check(repair=True).errors == 1
    extents(leaf)
    leaf.close()
    assert not marked(image)
    qemu_check(image.path, "qcow2")
