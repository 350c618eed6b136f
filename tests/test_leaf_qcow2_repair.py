# SPDX-License-Identifier: Apache-2.0
"""Repairs of qcow2 images: what is mended, what it costs, and what a crash in the middle leaves."""

import contextlib
import errno
import itertools
import os
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner

from nbdstream.cli import cli
from nbdstream.errors import LeafUnsupportedError
from nbdstream.leaf import open_leaf
from nbdstream.leaf.qcow2.header_file import read_header
from testbed.peers import run
from tests.leaf_support import (
    ImageKind,
    by_qemu,
    pattern,
    plain,
    qemu_check,
    read,
    write,
)
from tests.qcow2_damage import DAMAGE, KINDS, SIZE, Image

REPAIRABLE = (
    "a data cluster is forgotten",
    "L2 copied flag",
    "L1 copied flag",
    "no L2 table",
    "refcounts many",
)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("damage", REPAIRABLE)
def test_repair(damage: str, kind: ImageKind, tmp_path: Path) -> None:
    image = Image.make(tmp_path / "disk", kind)
    DAMAGE[damage](image)
    leaf = open_leaf(str(image.path), format="qcow2")
    result = leaf.check(repair=True)
    assert result.repaired == result.errors + result.leaks > 0
    assert leaf.check(repair=False).errors == 0
    write(leaf, 1 << 20, pattern(0, 512 * 1024, 9))
    leaf.close()
    qemu_check(image.path, "qcow2")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("corrupt", (False, True))
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_repair_leaves_an_image_that_qemu_finds_clean(
    damage: str, corrupt: bool, kind: ImageKind, tmp_path: Path
) -> None:
    image = Image.make(tmp_path / "disk", kind)
    DAMAGE[damage](image)
    if corrupt:
        image.put(72, image.header.incompatible_features | 2)
        with pytest.raises(LeafUnsupportedError, match="nbdstream check --repair"):
            open_leaf(str(image.path), format="qcow2")
    leaf = open_leaf(str(image.path), format="qcow2", repair=True)
    result = leaf.check(repair=True)
    assert result.repaired == result.errors + result.leaks > 0
    assert not leaf.describe()["corrupt"]
    leaf.close()
    qemu_check(image.path, "qcow2")
    leaf = open_leaf(str(image.path), format="qcow2")
    write(leaf, 1 << 20, pattern(0, 512 * 1024, 9))
    leaf.close()
    qemu_check(image.path, "qcow2")


def test_an_image_of_version_2_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    by_qemu("qcow2", "compat=0.10,cluster_size=4096").make(path, SIZE, None)
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", path])
    with path.open("rb") as file:
        image = Image(path, read_header(file.fileno(), str(path)))
    assert image.header.version == 2
    image.put(image.l2, 1 << 63 | 1 << 40)
    invoke("check", "--repair", "-f", "qcow2", path, status=0)
    qemu_check(path, "qcow2")
    leaf = open_leaf(str(path), read_only=True, format="qcow2")
    assert read(leaf, 0, 65536, b"") == bytes(4096) + b"\1" * 61440
    leaf.close()


def test_subclusters_of_a_compressed_cluster_are_no_loss(tmp_path: Path) -> None:
    """The bitmap of such an entry is not used, and has to be zero: the data is sound."""
    raw, path = tmp_path / "raw", tmp_path / "disk"
    data = b"".join(bytes([number]) * 16384 for number in range(1, 65))
    raw.write_bytes(data)
    options = "extended_l2=on,cluster_size=16k"
    run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path])
    with path.open("rb") as file:
        image = Image(path, read_header(file.fileno(), str(path)))
    for index in (0, 3, 40):
        assert image.get(image.l2 + 16 * index) & 1 << 62
        image.put(image.l2 + 16 * index + 8, 7 << 32 | 1)
    told = invoke("check", "-f", "qcow2", path, status=2)
    assert "compressed cluster with subclusters (3x)" in told and "lose" not in told
    told = invoke("check", "--repair", "-f", "qcow2", path, status=0)
    assert "lost" not in told
    qemu_check(path, "qcow2")
    leaf = open_leaf(str(path), read_only=True, format="qcow2")
    assert read(leaf, 0, len(data), b"") == data
    leaf.close()


def test_a_repair_names_the_guest_ranges_that_it_costs(tmp_path: Path) -> None:
    image = Image.make(tmp_path / "disk", plain(4096))
    for index in (1, 2, 3, 200):
        image.put(image.l2 + 8 * index, 1 << 63 | 1 << 40)
    foretold = invoke("check", image.path, status=2)
    assert "guest range 0x1000 to 0x4000 will lose its local data to --repair" in foretold
    told = invoke("check", "--repair", image.path, status=0)
    assert "guest range 0x1000 to 0x4000 lost its local data, it reads as zeroes" in told
    leaf = open_leaf(str(image.path), read_only=True, format="qcow2")
    data = pattern(0, 256 * 1024, 0)
    assert read(leaf, 0, 256 * 1024, b"") == data[:4096] + bytes(3 * 4096) + data[4 * 4096 :]
    leaf.close()
    assert "No errors" in invoke("check", image.path, status=0)


def invoke(*arguments: object, status: int) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.output


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_repair_that_is_cut_off_is_repeated(cut: int, tmp_path: Path) -> None:
    """Its first ``cut`` syncs succeed, the next one fails."""
    image = Image.make(tmp_path / "disk", plain(4096))
    DAMAGE["data in the L1 table"](image)
    image.put(72, image.header.incompatible_features | 2)
    real, left = os.fdatasync, itertools.count(cut, -1)

    def fdatasync(fd: int) -> None:
        if next(left) == 0:
            raise OSError(errno.EIO, "bad sector")
        real(fd)

    with mock.patch.object(os, "fdatasync", fdatasync), contextlib.suppress(OSError):
        leaf = open_leaf(str(image.path), format="qcow2", repair=True)
        leaf.close()
    leaf = open_leaf(str(image.path), format="qcow2", repair=True)
    leaf.check(repair=True)
    leaf.close()
    qemu_check(image.path, "qcow2")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("damage", [name for name in DAMAGE if name.startswith("refcount")])
def test_a_dirty_image_gets_new_refcounts(damage: str, kind: ImageKind, tmp_path: Path) -> None:
    image = Image.make(tmp_path / "disk", kind)
    DAMAGE[damage](image)
    image.put(72, image.header.incompatible_features | 1)
    leaf = open_leaf(str(image.path), format="qcow2")
    assert leaf.check(repair=False).errors == 0
    write(leaf, 1 << 20, pattern(0, 512 * 1024, 9))
    leaf.close()
    qemu_check(image.path, "qcow2")
