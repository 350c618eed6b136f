# SPDX-License-Identifier: Apache-2.0
"""Wrong refcounts in an image that was closed cleanly: no cluster in use is written over."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdstream.errors import LeafError, LeafFormatError
from nbdstream.leaf import open_leaf
from nbdstream.leaf.base import Leaf
from nbdstream.leaf.qcow2 import trust
from nbdstream.leaf.qcow2.space import Metadata, Space
from tests.leaf_support import ImageKind, pattern, plain, qemu_check, read, write
from tests.qcow2_damage import KINDS, SIZE, Image

USED = [(number * 512 * 1024, pattern(0, 256 * 1024, number)) for number in range(3)]


def clear_block(image: Image) -> None:
    for at in range(0, 256, 8):
        image.put(image.block + at, 0)


DAMAGE: dict[str, Callable[[Image], None]] = {
    "clusters in use have refcount 0": clear_block,
    "no refcount block": lambda image: image.put(image.header.refcount_table_offset, 0),
    "refcount block not aligned": lambda image: image.put(
        image.header.refcount_table_offset, image.block | 0x200
    ),
    "refcount block beyond the end": lambda image: image.put(
        image.header.refcount_table_offset, 1 << 40
    ),
    "refcount block at L1": lambda image: image.put(
        image.header.refcount_table_offset, image.header.l1_table_offset
    ),
    "refcount block at L2": lambda image: image.put(image.header.refcount_table_offset, image.l2),
    "refcount block in the data": lambda image: image.put(
        image.header.refcount_table_offset, image.get(image.l2) & 0xFFFFFFFFFFFE00
    ),
    "refcount table entry with reserved bits": lambda image: image.put(
        image.header.refcount_table_offset, image.block | 1 << 60
    ),
}


def fill(leaf: Leaf) -> None:
    """Write all that was not written; then every place has what it should have."""
    others = [(at + 256 * 1024, pattern(0, 256 * 1024, 9)) for at, _ in USED]
    for at, data in others:
        write(leaf, at, data)
    for at, data in USED + others:
        assert read(leaf, at, len(data), b"") == data


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("damage", DAMAGE)
def test_wrong_refcounts_are_counted_at_the_open(
    damage: str, kind: ImageKind, tmp_path: Path
) -> None:
    image = Image.make(tmp_path / "disk", kind)
    DAMAGE[damage](image)
    leaf = open_leaf(str(image.path), format="qcow2")
    fill(leaf)
    leaf.close()
    qemu_check(image.path, "qcow2")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_free_space_that_was_not_looked_at_is_not_used(
    kind: ImageKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables of a large image are not all read at the open."""
    monkeypatch.setattr(trust, "MAX_TABLES", 0)
    image = Image.make(tmp_path / "disk", kind)
    DAMAGE["clusters in use have refcount 0"](image)
    leaf = open_leaf(str(image.path), format="qcow2")
    fill(leaf)
    leaf.close()


def test_free_space_is_used_again_where_it_was_looked_at(tmp_path: Path) -> None:
    kind = plain(4096)
    path = tmp_path / "disk"
    leaf = kind.new(path, SIZE, None)
    write(leaf, 0, pattern(0, SIZE // 2, 1))
    leaf.zero(0, SIZE // 2, unmap=True)
    leaf.close()
    size = path.stat().st_size
    leaf = kind.open(path)
    write(leaf, SIZE // 2, pattern(0, SIZE // 4, 2))
    leaf.close()
    assert path.stat().st_size == size
    qemu_check(path, "qcow2")


def test_no_table_is_allocated_whatever_is_free(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(8 * 4096))
    geometry = Image.make(tmp_path / "other", plain(4096)).header.geometry
    metadata = Metadata(geometry)
    metadata.add(5 * 4096, 4096)
    fd = os.open(path, os.O_RDWR)
    space = Space(fd, geometry, metadata)
    space.add_free(4 * 4096, 3)
    with pytest.raises(LeafFormatError, match="marked as free space"):
        space.allocate(2)
    os.close(fd)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_backing_is_kept_for_what_is_damaged(kind: ImageKind, tmp_path: Path) -> None:
    """A repair makes the range unallocated: without the backing it would be zeroes."""
    path = tmp_path / "disk"
    leaf = kind.new(path, SIZE)
    write(leaf, 0, pattern(0, SIZE, 1))
    leaf.close()
    with path.open("rb") as file:
        image = Image(path, Image.make(tmp_path / "other", kind).header)
        assert file.read(4) == b"QFI\xfb"
    place = image.l2 + 3 * image.step
    good = image.get(place)
    for bad in (good | 1 << 57, 1 << 63 | 1 << 40, image.l2 | 1 << 63, 0):
        image.put(place, bad)
        leaf = open_leaf(str(path), format="qcow2")
        expected = f"nothing at {3 * leaf.cluster_size} yet"
        with pytest.raises(LeafError, match=expected):
            leaf.drop_backing()
        leaf.close()
    image.put(place, good)
    leaf = open_leaf(str(path), format="qcow2")
    leaf.drop_backing()
    leaf.close()
