# SPDX-License-Identifier: Apache-2.0
"""One writer per image, with QEMU's own programs as the others."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdstream.errors import LeafInUseError, LeafUnsupportedError
from nbdstream.leaf import open_leaf
from testbed.peers import PeerError, qemu_nbd, run
from tests.leaf_support import ours

FORMATS = ("raw", "qcow2", "qed")
SIZE = 1 << 20


@pytest.fixture(params=FORMATS)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    format_name = str(request.param)
    path = tmp_path / f"disk.{format_name}"
    ours(format_name).make(path, SIZE, None)
    return path, format_name


def test_qemu_is_refused_while_we_have_it_open(image: tuple[Path, str]) -> None:
    path, format_name = image
    writer: list[str | Path] = ["qemu-io", "-f", format_name, "-c", "write 0 512", path]
    reader: list[str | Path] = [
        "qemu-img",
        "convert",
        "-f",
        format_name,
        "-O",
        "raw",
        path,
        f"{path}.copy",
    ]
    leaf = open_leaf(str(path))
    with pytest.raises(PeerError, match="lock"):
        run(writer)
    if format_name != "raw":  # QEMU lets others read a raw image: it has no metadata to be torn
        with pytest.raises(PeerError, match="lock"):
            run(reader)
    leaf.close()
    run(writer)
    leaf = open_leaf(str(path), read_only=True)
    with pytest.raises(PeerError, match="lock"):
        run(writer)
    run(reader)
    leaf.close()


def test_we_are_refused_while_qemu_has_it_open(image: tuple[Path, str]) -> None:
    path, format_name = image
    with qemu_nbd(path, format_name):
        for read_only in (False, True):
            with pytest.raises(LeafInUseError) as caught:
                open_leaf(str(path), read_only=read_only)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    open_leaf(str(path)).close()


def test_readers_share(image: tuple[Path, str]) -> None:
    path, format_name = image
    with qemu_nbd(path, format_name, readonly=True):
        open_leaf(str(path), read_only=True).close()
        with pytest.raises(LeafInUseError, match="in use"):
            open_leaf(str(path))


def test_a_refused_open_leaves_no_lock_behind(image: tuple[Path, str]) -> None:
    path, format_name = image
    first = open_leaf(str(path), read_only=True)
    with pytest.raises(LeafInUseError):
        open_leaf(str(path))
    open_leaf(str(path), read_only=True).close()
    first.close()
    run(["qemu-io", "-f", format_name, "-c", "write 0 512", path])


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "fifo"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "disk.raw"
    make(path)
    with pytest.raises((LeafUnsupportedError, IsADirectoryError)):
        open_leaf(str(path))
    with pytest.raises(LeafUnsupportedError, match="not a regular file"):
        open_leaf(str(path), read_only=True)
