# SPDX-License-Identifier: Apache-2.0
"""The raw leaf: the common suite, and what is its own: the map file."""

import os
import random
import struct
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nbdstream.errors import LeafError, LeafFormatError, UsageError
from nbdstream.leaf import create_leaf, open_leaf
from nbdstream.leaf.base import BackingReference, Leaf, State
from nbdstream.leaf.peek import backing_of
from nbdstream.leaf.raw.map import MapHeader
from testbed.leaves import flush
from testbed.peers import run
from tests.leaf_conformance import LeafConformance
from tests.leaf_model import model_test
from tests.leaf_support import BACKING, ImageKind, extents, ours, pattern, read, write

KINDS = [ours("raw"), ours("raw", 4096), ours("raw", 2 << 20)]
SIZE = 300_000


class TestRaw(LeafConformance):
    @pytest.fixture(params=KINDS, ids=str)
    def kind(self, request: Any) -> ImageKind:
        assert isinstance(request.param, ImageKind)
        return request.param


TestRawModel = model_test(ours("raw"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A raw leaf with one flushed block at 8192."""
    path = tmp_path / "disk.raw"
    leaf = ours("raw").new(path, SIZE)
    write(leaf, 8192, pattern(8192, 4096, 1))
    flush(leaf)
    leaf.close()
    return path


def map_of(path: Path) -> Path:
    return path.with_name(path.name + ".map")


def test_the_reference_is_kept_whole(path: Path) -> None:
    leaf = open_leaf(str(path))
    assert leaf.backing == BACKING
    reference = BackingReference("nbd://höst/" + "x" * 3000, "raw", 12345, "sha256:" + "f" * 64)
    leaf.record_backing(reference)
    with pytest.raises(LeafError, match="too long"):
        leaf.record_backing(BackingReference("x" * 5000))
    assert leaf.backing == reference
    leaf.close()
    assert open_leaf(str(path), read_only=True).backing == reference


def test_a_torn_header_update_leaves_the_older_one(path: Path) -> None:
    leaf = open_leaf(str(path))
    newer = BackingReference("nbd://newer")
    leaf.record_backing(newer)
    leaf.close()
    content = map_of(path).read_bytes()
    for slot, survivor in ((0, newer), (4096, BACKING)):
        damaged = bytearray(content)
        damaged[slot : slot + 4096] = random.Random(1).randbytes(4096)
        map_of(path).write_bytes(damaged)
        leaf = open_leaf(str(path))
        assert leaf.backing == survivor
        assert [e.offset for e in extents(leaf) if e.state is State.DATA] == [8192]
        leaf.close()


@pytest.mark.parametrize("suffix", ["", ".map"])
@pytest.mark.parametrize("change", [-4096, -1, 1, 4096])
def test_a_file_of_the_wrong_length_is_refused(path: Path, suffix: str, change: int) -> None:
    target = path.with_name(path.name + suffix)
    os.truncate(target, target.stat().st_size + change)
    with pytest.raises(LeafFormatError):
        open_leaf(str(path))


def test_a_map_that_is_none_is_refused(path: Path) -> None:
    for content in (b"", b"hello", bytes(12288), b"\xff" * 12288):
        map_of(path).write_bytes(content)
        with pytest.raises(LeafFormatError, match="damaged, or not an allocation map"):
            open_leaf(str(path))
        assert map_of(path).read_bytes() == content


def test_every_flipped_bit_of_the_header_is_noticed(path: Path) -> None:
    content = map_of(path).read_bytes()
    length = struct.unpack_from("<I", content, 12)[0]
    for bit in range(length * 8):
        damaged = bytearray(content[:4096])
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(LeafFormatError):
            MapHeader.unpack(bytes(damaged))


def test_headers_of_noise_are_refused() -> None:
    rng = random.Random(2)
    good = MapHeader(SIZE, 65536, BACKING).pack()
    for _ in range(2000):
        page = bytearray(good)
        for _ in range(rng.randrange(1, 30)):
            page[rng.randrange(8, 96)] = rng.randrange(256)
        if bytes(page) != good:
            with pytest.raises(LeafFormatError):
                MapHeader.unpack(bytes(page))


def test_no_backing_is_dropped_while_it_is_needed(path: Path) -> None:
    leaf = open_leaf(str(path))
    with pytest.raises(LeafError, match="still needs its backing"):
        leaf.drop_backing()
    assert map_of(path).exists() and leaf.backing == BACKING
    leaf.close()


def test_what_remains_is_a_plain_raw_image(path: Path, tmp_path: Path) -> None:
    content = pattern(0, SIZE + 512, 5)[:SIZE]
    leaf = open_leaf(str(path))
    write(leaf, 0, content)
    flush(leaf)
    leaf.drop_backing()
    leaf.close()
    assert not map_of(path).exists()
    assert path.read_bytes() == content
    copy = tmp_path / "copy"
    copy.write_bytes(content)
    run(["qemu-img", "compare", "-f", "raw", "-F", "raw", path, copy])


def test_check_finds_and_punches_what_a_crash_left(path: Path) -> None:
    with path.open("r+b") as image:
        image.seek(65536)
        image.write(b"lost" * 2048)
    leaf = open_leaf(str(path))
    assert leaf.check(repair=False).leaks == 2
    result = leaf.check(repair=True)
    assert (result.errors, result.leaks, result.repaired) == (0, 2, 2)
    assert leaf.check(repair=False).leaks == 0
    assert read(leaf, 8192, 4096, b"") == pattern(8192, 4096, 1)
    leaf.close()


def test_a_plain_file_with_holes(tmp_path: Path) -> None:
    path = tmp_path / "plain.img"
    with path.open("wb") as image:
        image.truncate(1 << 20)
        image.seek(512 << 10)
        image.write(b"d" * 8192)
    leaf = open_leaf(str(path))
    states = [(e.offset, e.length, e.state) for e in extents(leaf)]
    assert states == [
        (0, 512 << 10, State.ZERO),
        (512 << 10, 8192, State.DATA),
        ((512 << 10) + 8192, (512 << 10) - 8192, State.ZERO),
    ]
    assert leaf.locate(0, 1 << 20) == 0
    with pytest.raises(LeafError, match="has no backing"):
        leaf.record_backing(BACKING)
    leaf.close()


@pytest.mark.parametrize("cluster_size", [0, 512, 4097, 128 << 20, -4096])
def test_cluster_sizes_that_make_no_sense(tmp_path: Path, cluster_size: int) -> None:
    with pytest.raises(UsageError, match="power of two"):
        create_leaf(
            str(tmp_path / "x"), format="raw", size=SIZE, cluster_size=cluster_size, backing=None
        )
    assert list(tmp_path.iterdir()) == []


# -- renamed while it is served ------------------------------------------------------------


def complete(path: Path) -> Leaf:
    """An open leaf that has everything, and another complete one's map in reach."""
    leaf = open_leaf(str(path))
    write(leaf, 0, pattern(0, SIZE + 512)[:SIZE])
    flush(leaf)
    return leaf


def test_a_renamed_leaf_takes_its_own_map_away(path: Path, tmp_path: Path) -> None:
    leaf = complete(path)
    moved = tmp_path / "moved.raw"
    path.rename(moved)
    map_of(path).rename(map_of(moved))
    ours("raw").make(path, SIZE, BACKING)  # another leaf has the name now
    leaf.drop_backing()
    leaf.close()
    assert not map_of(moved).exists()
    other = open_leaf(str(path))
    assert other.backing == BACKING
    assert [extent.state for extent in extents(other)] == [State.UNALLOCATED]
    other.close()


def test_a_map_in_another_directory_is_found(path: Path, tmp_path: Path) -> None:
    leaf = complete(path)
    (tmp_path / "there").mkdir()
    moved = tmp_path / "there" / "disk.map"
    map_of(path).rename(moved)
    map_of(path).write_bytes(b"not ours")
    leaf.drop_backing()
    leaf.close()
    assert not moved.exists()
    assert map_of(path).read_bytes() == b"not ours"


def test_a_map_that_was_deleted_is_no_obstacle(path: Path) -> None:
    leaf = complete(path)
    map_of(path).unlink()
    map_of(path).write_bytes(b"not ours")
    leaf.drop_backing()
    assert leaf.backing is None
    leaf.close()
    assert map_of(path).read_bytes() == b"not ours"


def test_a_map_that_cannot_be_found_stays(path: Path, tmp_path: Path) -> None:
    """Without /proc there is only the old name, and it is not ours any more."""
    leaf = complete(path)
    moved = tmp_path / "moved.map"
    map_of(path).rename(moved)
    map_of(path).write_bytes(b"not ours")
    with mock.patch.object(os, "readlink", side_effect=FileNotFoundError):
        with pytest.raises(LeafError, match="was moved, and cannot be found"):
            leaf.drop_backing()
    assert leaf.backing == BACKING
    leaf.close()
    assert moved.exists() and map_of(path).read_bytes() == b"not ours"


def test_a_leaf_is_found_by_a_symbolic_link(path: Path, tmp_path: Path) -> None:
    """It used to be taken for complete: its map is not beside the link."""
    link = tmp_path / "elsewhere" / "link.raw"
    link.parent.mkdir()
    link.symlink_to(path)
    for read_only in (True, False):
        leaf = open_leaf(str(link), read_only=read_only)
        assert leaf.backing == BACKING
        assert [e.state for e in extents(leaf)][:2] == [State.UNALLOCATED, State.DATA]
        leaf.close()
    assert backing_of(str(link)) == BACKING


def test_a_leaf_without_its_map_is_refused(path: Path) -> None:
    away = path.with_name("away")
    map_of(path).rename(away)
    for read_only in (True, False):
        with pytest.raises(
            LeafFormatError, match=f"{map_of(path)}, is missing: put that file back"
        ):
            open_leaf(str(path), read_only=read_only)
    away.rename(map_of(path))
    os.removexattr(path, "user.nbdstream.map")  # a leaf of an older version
    open_leaf(str(path)).close()
    map_of(path).unlink()
    with pytest.raises(LeafFormatError, match="is not complete"):
        open_leaf(str(path))


def test_a_complete_leaf_needs_no_map(path: Path) -> None:
    leaf = open_leaf(str(path))
    write(leaf, 0, bytes(SIZE))
    flush(leaf)
    leaf.drop_backing()
    leaf.close()
    assert not map_of(path).exists()
    open_leaf(str(path)).close()
