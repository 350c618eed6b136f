# SPDX-License-Identifier: Apache-2.0
"""QED's need-check bit, and the repair of images whose process crashed."""

import logging
import random
import shutil
from pathlib import Path

import pytest

from nbdstream.leaf import open_leaf
from nbdstream.leaf.base import FlushNeeded, Leaf, State
from nbdstream.leaf.qed.header import NEED_CHECK
from testbed.leaves import flush
from tests.journal import recording
from tests.leaf_support import (
    extents,
    pattern,
    qemu_check,
    read,
    write,
)
from tests.powercut import Disk
from tests.qed_image import (
    CLUSTER,
    SIZE,
    SMALL,
    header_of,
    leaky,
    need_check,
    set_field,
    small_image,
)

path = pytest.fixture(small_image)


def test_need_check_is_set_while_there_is_a_need(path: Path) -> None:
    leaf = open_leaf(str(path))
    assert read(leaf, 0, CLUSTER, b"") == pattern(0, CLUSTER, 1)
    write(leaf, 0, pattern(0, CLUSTER, 2))
    assert not need_check(path), "nothing was allocated"
    write(leaf, 7 * CLUSTER, pattern(0, CLUSTER, 2))
    assert need_check(path)
    flush(leaf)
    assert need_check(path)
    leaf.close()
    assert not need_check(path)


def test_need_check_asked_for_during_a_flush_takes_another_one(path: Path) -> None:
    leaf = open_leaf(str(path))
    rest = leaf.begin_flush()
    with pytest.raises(FlushNeeded):
        leaf.write(7 * CLUSTER, memoryview(bytes(CLUSTER)))
    rest()
    leaf.end_flush(ok=True)
    assert leaf.dirty and not need_check(path)
    write(leaf, 7 * CLUSTER, pattern(0, CLUSTER, 2))
    assert need_check(path)
    leaf.close()


def crashed_copy(path: Path, leaf: Leaf) -> Path:
    """The image as it is now, in another place: its process crashed, the system did not."""
    copy = path.with_name("crashed.qed")
    shutil.copyfile(path, copy)
    leaf.close()
    return copy


def test_a_crashed_image_is_repaired_when_opened(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leaf = open_leaf(str(path))
    write(leaf, 8 * CLUSTER, pattern(0, CLUSTER, 3))
    flush(leaf)
    write(leaf, 9 * CLUSTER, pattern(0, CLUSTER, 3))  # never flushed: a leak
    copy = crashed_copy(path, leaf)
    before = copy.read_bytes()
    reader = open_leaf(str(copy), read_only=True)
    assert reader.check(repair=False).leaks == 1
    reader.close()
    assert copy.read_bytes() == before
    with caplog.at_level(logging.WARNING):
        leaf = open_leaf(str(copy))
    assert "was not closed clean: checked it, leaked clusters: 1" in caplog.text
    assert leaf.check(repair=False) == leaf.check(repair=True)
    assert read(leaf, 8 * CLUSTER, CLUSTER, b"") == pattern(0, CLUSTER, 3)
    assert extents(leaf, 9 * CLUSTER, CLUSTER)[0].state is State.UNALLOCATED
    leaf.close()
    qemu_check(copy, "qed")


def test_a_repair_gives_leaks_in_the_middle_back(path: Path) -> None:
    leaf = open_leaf(str(path), read_only=True)
    visible = bytearray(read(leaf, 0, SIZE, b""))
    leaf.close()
    for offset in leaky(path):
        visible[offset : offset + CLUSTER] = bytes(CLUSTER)
    size = path.stat().st_size
    leaf = open_leaf(str(path))
    assert leaf.check(repair=False).leaks == 3
    result = leaf.check(repair=True)
    assert (result.errors, result.leaks, result.repaired) == (0, 3, 3)
    assert leaf.check(repair=False).leaks == 0
    assert read(leaf, 0, SIZE, b"") == visible
    leaf.close()
    assert path.stat().st_size == size - 3 * CLUSTER
    qemu_check(path, "qed")


def test_a_power_cut_during_a_repair_loses_nothing(path: Path, tmp_path: Path) -> None:
    leaky(path)
    set_field(path, 16, "Q", header_of(path).features | NEED_CHECK)
    home = tmp_path / "home"
    home.mkdir()
    image = Path(shutil.copy(path, home))
    with recording(home) as journal:
        leaf = open_leaf(str(image))
        visible = read(leaf, 0, SIZE, b"")
        leaf.close()
    assert len(journal.operations) > 8
    rng = random.Random(3)
    disk = Disk(journal)
    for operation in journal.operations:
        disk.advance(operation)
        for _ in range(25):
            image.write_bytes(disk.survivors(rng)["disk.qed"])
            leaf = open_leaf(str(image))
            assert read(leaf, 0, SIZE, b"") == visible
            assert leaf.check(repair=False) == leaf.check(repair=True)
            leaf.close()


def test_a_new_table_is_empty_whatever_was_there(tmp_path: Path) -> None:
    """A failed write leaves its bytes behind the last cluster, where the next table goes."""
    path = tmp_path / "disk.qed"
    leaf = SMALL.new(path, SIZE)
    write(leaf, 0, pattern(0, CLUSTER, 1))
    with recording(tmp_path) as journal:
        journal.room = 3 * CLUSTER + 100
        with pytest.raises(OSError, match="full"):
            write(leaf, CLUSTER, b"\x01" * (5 * CLUSTER))
    write(leaf, 4 << 20, pattern(0, CLUSTER, 2))
    flush(leaf)
    for now in (leaf, None):
        if now is None:
            leaf.close()
            now = open_leaf(str(path), read_only=True)
        states = [(e.offset, e.length) for e in extents(now) if e.state is not State.UNALLOCATED]
        assert states == [(0, CLUSTER), (4 << 20, CLUSTER)]
        now.close()
    qemu_check(path, "qed")
