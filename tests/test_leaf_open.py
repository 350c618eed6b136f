# SPDX-License-Identifier: Apache-2.0
"""Telling formats apart, and creating images whole or not at all."""

import os
import random
import threading
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from nbdstream.errors import LeafError, LeafFormatError, UsageError
from nbdstream.leaf import FORMATS, create_leaf, format_from_suffix, open_leaf, probe_format
from nbdstream.leaf.base import BackingReference
from nbdstream.leaf.marks import is_vouched_for
from tests.journal import recording
from tests.leaf_support import BACKING, ImageKind, ours, read, write
from tests.powercut import Disk

SIZE = 1 << 20


def test_formats_by_suffix() -> None:
    names = {"a.qcow2": "qcow2", "b/c.QED": "qed", "d.e.raw": "raw", "f.img": "raw"}
    for name, expected in names.items():
        assert format_from_suffix(name) == expected
    for name in ("disk", "disk.vmdk", ".raw", "qcow2", "a.qcow2/disk"):
        with pytest.raises(UsageError, match="cannot tell the format"):
            format_from_suffix(name)


@pytest.fixture(params=[True, False], ids=["marks", "no marks"])
def lasting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system has extended attributes."""
    if not request.param:
        refused = mock.Mock(side_effect=OSError(95, "Operation not supported"))
        monkeypatch.setattr(os, "getxattr", refused)
        monkeypatch.setattr(os, "setxattr", refused)
    return bool(request.param)


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_image_is_opened_as_it_was_made(tmp_path: Path, format_name: str) -> None:
    path = tmp_path / "disk"
    ours(format_name).make(path, SIZE, None)
    assert probe_format(str(path)) == format_name
    path.rename(tmp_path / "disk.bin")
    assert probe_format(str(tmp_path / "disk.bin")) == format_name


# What a guest can write to the start, or to the end, of its disk.
MAGICS = {
    "qcow2": (0, b"QFI\xfb\0\0\0\3"),
    "qcow": (0, b"QFI\xfb\0\0\0\1"),
    "QED": (0, b"QED\0"),
    "VMDK": (0, b"KDMV"),
    "VMDK descriptor": (0, b"# Disk DescriptorFile\n"),
    "VHDX": (0, b"vhdxfile"),
    "VHD": (0, b"conectix"),
    "VHD footer": (SIZE - 512, b"conectix"),
    "VDI": (64, b"\x7f\x10\xda\xbe"),
    "LUKS": (0, b"LUKS\xba\xbe\0\2"),
    "Parallels": (0, b"WithoutFreeSpace"),
}
NAMES = ("disk", "disk.img", "disk.raw", "disk.bin", "disk.vmdk")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("magic", MAGICS.values(), ids=MAGICS)
def test_a_guest_does_not_choose_the_format(
    tmp_path: Path, name: str, magic: tuple[int, bytes], lasting: bool
) -> None:
    """A raw disk stays raw where that can be remembered; elsewhere it is refused, and never
    read as anything else."""
    path = tmp_path / name
    ours("raw").make(path, SIZE, None)
    leaf = open_leaf(str(path))
    assert leaf.format == "raw"
    write(leaf, magic[0], magic[1])
    leaf.close()
    if lasting:
        assert probe_format(str(path)) == "raw"
    else:
        with pytest.raises(LeafFormatError, match="-f raw"):
            open_leaf(str(path))
    leaf = open_leaf(str(path), format="raw")
    assert read(leaf, magic[0], len(magic[1]), b"") == magic[1]
    leaf.close()


def test_a_map_beside_it_makes_an_image_raw(tmp_path: Path, lasting: bool) -> None:
    del lasting
    path = tmp_path / "disk"
    ours("raw").make(path, SIZE, BACKING)
    leaf = open_leaf(str(path))
    write(leaf, 0, MAGICS["qcow2"][1].ljust(4096, b"\0"))
    leaf.close()
    assert probe_format(str(path)) == "raw"


def test_an_image_from_elsewhere_is_marked_when_it_is_first_written_to(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    open_leaf(str(path), read_only=True).close()
    path.write_bytes(MAGICS["qcow2"][1].ljust(SIZE, b"\0"))
    with pytest.raises(LeafFormatError, match=r"-f raw .* -f qcow2"):
        open_leaf(str(path))
    open_leaf(str(path), format="raw").close()
    open_leaf(str(path)).close()
    with pytest.raises(LeafFormatError):
        open_leaf(str(path), format="qcow2")  # the user's word overrules the mark


def test_a_raw_image_is_not_made_under_a_name_that_says_otherwise(
    tmp_path: Path, lasting: bool
) -> None:
    path = tmp_path / "disk.qcow2"
    if lasting:
        ours("raw").make(path, SIZE, None)
        assert probe_format(str(path)) == "raw"
    else:
        with pytest.raises(UsageError, match=r"call it .raw or .img"):
            ours("raw").make(path, SIZE, None)
        assert list(tmp_path.iterdir()) == []


def test_the_backing_counts_that_the_owner_named(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    ours("qcow2").make(path, SIZE, BACKING)
    assert is_vouched_for(str(path), BACKING)
    for changed in (replace(BACKING, uri="nbd://other"), replace(BACKING, format="qcow2")):
        assert not is_vouched_for(str(path), changed)
    assert is_vouched_for(str(path), replace(BACKING, identity="", size=5))
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    assert not is_vouched_for(str(copy), BACKING)


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
    for call in ("ftruncate", "fdatasync", "fsync", "link"):
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
