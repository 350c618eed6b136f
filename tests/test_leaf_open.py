# SPDX-License-Identifier: Apache-2.0
"""Telling formats apart, and creating images whole or not at all."""

import os
import random
import threading
from pathlib import Path
from unittest import mock

import pytest

from nbdstream.errors import LeafError, LeafFormatError, UsageError
from nbdstream.leaf import FORMATS, create_leaf, format_from_suffix, open_leaf, probe_format
from nbdstream.leaf.base import BackingReference
from tests.leaf_support import BACKING, ImageKind, ours, read
from tests.powercut import Disk, recording

SIZE = 1 << 20


def test_formats_by_suffix() -> None:
    names = {"a.qcow2": "qcow2", "b/c.QED": "qed", "d.e.raw": "raw", "f.img": "raw"}
    for name, expected in names.items():
        assert format_from_suffix(name) == expected
    for name in ("disk", "disk.vmdk", ".raw", "qcow2", "a.qcow2/disk"):
        with pytest.raises(UsageError, match="cannot tell the format"):
            format_from_suffix(name)


@pytest.mark.parametrize("format_name", FORMATS)
def test_formats_by_content(tmp_path: Path, format_name: str) -> None:
    path = tmp_path / "disk"
    ours(format_name).make(path, SIZE, None)
    assert probe_format(str(path)) == format_name


def test_a_guest_does_not_choose_the_format(tmp_path: Path) -> None:
    """The magic of another format at the start of a raw disk means nothing."""
    for name, backing in (("disk.raw", None), ("disk", BACKING)):
        path = tmp_path / name
        ours("raw").make(path, SIZE, backing)
        for magic in (b"QFI\xfb", b"QED\0"):
            with path.open("r+b") as image:
                image.write(magic)
            assert probe_format(str(path)) == "raw"
            leaf = open_leaf(str(path))
            assert leaf.format == "raw"
            leaf.close()


def test_the_wrong_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    ours("raw").make(path, SIZE, None)
    for other in ("qcow2", "qed"):
        with pytest.raises(LeafFormatError):
            open_leaf(str(path), format=other)
    path.with_name("disk.map").write_bytes(b"")
    with pytest.raises(LeafFormatError, match="allocation map"):
        open_leaf(str(path), format="qed")
    with pytest.raises(UsageError, match="no such format: vmdk"):
        open_leaf(str(path), format="vmdk")


def test_a_missing_image(tmp_path: Path) -> None:
    for name in ("disk", "disk.raw", "no/such/directory/disk"):
        with pytest.raises(FileNotFoundError):
            open_leaf(str(tmp_path / name))


# -- creating -----------------------------------------------------------------------------------


def create(path: Path, format_name: str, backing: BackingReference | None = BACKING) -> None:
    create_leaf(str(path), format=format_name, size=SIZE, cluster_size=None, backing=backing)


@pytest.mark.parametrize("format_name", FORMATS)
def test_nothing_is_overwritten(tmp_path: Path, format_name: str) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"precious")
    with pytest.raises(LeafError, match="exists already"):
        create(path, format_name)
    assert path.read_bytes() == b"precious"
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(LeafError, match="exists already"):
        create(path, format_name)
    assert [entry.name for entry in tmp_path.iterdir()] == ["disk"]


@pytest.mark.parametrize("format_name", FORMATS)
def test_nothing_is_left_of_a_failure(tmp_path: Path, format_name: str) -> None:
    failing = OSError(28, "full")
    for call in ("ftruncate", "fsync", "link"):
        with mock.patch.object(os, call, side_effect=failing), pytest.raises(OSError, match="full"):
            create(tmp_path / "disk", format_name)
        left = {entry.name for entry in tmp_path.iterdir()}
        # A map without its image is replaced by the next attempt.
        assert left <= {"disk.map"}
    create(tmp_path / "disk", format_name)
    open_leaf(str(tmp_path / "disk")).close()
    for size in (0, -512):
        with pytest.raises(UsageError, match="makes no sense"):
            create_leaf(
                str(tmp_path / "x"), format=format_name, size=size, cluster_size=None, backing=None
            )


@pytest.mark.parametrize("format_name", FORMATS)
def test_of_many_creators_one_wins(tmp_path: Path, format_name: str) -> None:
    path = tmp_path / "disk"
    outcomes: list[str] = []

    def attempt(number: int) -> None:
        try:
            create(path, format_name, BackingReference(f"nbd://host/{number}"))
            outcomes.append(f"nbd://host/{number}")
        except LeafError:
            pass

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    leaf = open_leaf(str(path))
    assert leaf.backing is not None
    assert outcomes == [leaf.backing.uri]
    leaf.close()
    assert {entry.name for entry in tmp_path.iterdir()} <= {"disk", "disk.map"}


@pytest.mark.parametrize("kind", [ours(name) for name in FORMATS], ids=str)
def test_a_power_cut_while_creating(tmp_path: Path, kind: ImageKind) -> None:
    """There is an image that is whole, or none; and then it can be created again."""
    home = tmp_path / "home"
    home.mkdir()
    with recording(home) as journal:
        kind.make(home / "disk", SIZE, BACKING)
    rng = random.Random(6)
    disk = Disk(journal)
    whole = 0
    for operation in journal.operations:
        disk.advance(operation)
        for _ in range(10):
            for old in home.iterdir():
                old.unlink()
            for name, content in disk.survivors(rng).items():
                (home / name).write_bytes(content)
            if not (home / "disk").exists():
                kind.make(home / "disk", SIZE, BACKING)
            else:
                whole += 1
            leaf = kind.open(home / "disk")
            assert leaf.backing is not None and leaf.backing.uri == BACKING.uri
            assert not any(read(leaf, 0, SIZE, b""))
            leaf.close()
    assert whole
