# SPDX-License-Identifier: Apache-2.0
"""The redo log: what it holds, when it is dropped, and what happens where there can be none."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from nbdstream.leaf import redo
from nbdstream.leaf.base import FlushNeeded, State, SyncError
from nbdstream.leaf.redo import Record, RedoLog
from testbed.leaves import abandon, flush
from testbed.peers import binary
from tests.leaf_support import BACKING, ImageKind, extents, ours, pattern, read, write

SIZE = 4 << 20
BLOCK = 65536
KINDS = [ours("raw"), ours("qcow2"), ours("qed")]
BELOW = bytes(SIZE)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of all redo logs of a test."""
    parent = Path("/dev/shm") / f"nbdstream-test-{os.getpid()}"
    parent.mkdir()
    monkeypatch.setattr(redo, "_PARENTS", (str(parent),))
    yield parent / f"nbdstream-redo-{os.geteuid()}"
    shutil.rmtree(parent)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "image"
    path.touch()
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def started(fd: int) -> tuple[RedoLog, int]:
    stamps: list[int] = []
    log = redo.start(fd, "image", stamps.append)
    return log, stamps[0]


def recovered(fd: int, stamp: int) -> list[Record]:
    found: list[Record] = []
    redo.recover(fd, "image", stamp, found.extend)
    return found


# -- the log by itself ---------------------------------------------------------------------


def test_a_log_has_what_no_flush_covers(place: Path, image: int) -> None:
    log, stamp = started(image)
    for number in range(10):
        log.reserve(1)
        log.append(number, 2 * number, (1 << 64) - 1, number)
        if number == 3:
            log.begin_flush()
        if number == 5:
            log.end_flush(ok=True)
        if number == 7:
            log.begin_flush()
    log.end_flush(ok=False)
    log.close()
    expected = [Record(n, 2 * n, (1 << 64) - 1, n) for n in range(4, 10)]
    assert recovered(image, stamp) == expected
    assert recovered(image, stamp) == []
    assert not list(place.iterdir())


def test_a_log_goes_round(place: Path, image: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers come back to 0 when the log is empty, or before they have no room in 32 bits."""
    monkeypatch.setattr(redo, "CAPACITY", 16)
    monkeypatch.setattr(redo, "CHUNK", 4)
    monkeypatch.setattr(redo, "_NUMBER", 100)
    log, stamp = started(image)
    expected: list[int] = []
    for number in range(500):
        try:
            log.reserve(1)
        except FlushNeeded:
            assert len(expected) == 16
            log.begin_flush()
            log.end_flush(ok=True)
            expected.clear()
        log.append(number, 0)
        expected.append(number)
        if number % 7 == 3:
            log.begin_flush()
            covered = len(expected)
        if number % 7 == 5 and number % 3:
            log.end_flush(ok=True)
            del expected[:covered]
    log.close()
    with mock.patch.object(redo, "_NUMBER", (1 << 32) - 1):
        assert [record.a for record in recovered(image, stamp)] == expected


def test_a_log_of_another_state_is_dropped(place: Path, image: int) -> None:
    log, stamp = started(image)
    log.append(1, 2)
    log.close()
    for other in (0, stamp ^ 1):
        assert recovered(image, other) == []
        assert not list(place.iterdir())
        log, stamp = started(image)
        log.append(1, 2)
        log.close()
    assert recovered(image, stamp) == [Record(1, 2, 0, 0)]


def test_memory_that_is_short_makes_flushes_come_earlier(
    place: Path, image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redo, "CHUNK", 4)
    log, stamp = started(image)
    refused = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(os, "posix_fallocate", side_effect=refused):
        log.reserve(4)
        for number in range(4):
            log.append(number, 0)
        with pytest.raises(FlushNeeded):
            log.reserve(1)
        log.begin_flush()
        log.end_flush(ok=True)
        log.reserve(4)
        log.append(9, 0)
    log.close()
    assert [record.a for record in recovered(image, stamp)] == [9]


def test_a_change_that_no_log_can_hold_ends_the_log(
    place: Path, image: int, caplog: pytest.LogCaptureFixture
) -> None:
    log, stamp = started(image)
    log.reserve(redo.CAPACITY + 1)
    log.append(1, 1)
    assert "reset the guest" in caplog.text
    assert not list(place.iterdir())
    log.close()
    assert recovered(image, stamp) == []


@pytest.mark.parametrize("trouble", ["directory", "owner", "mode", "stamp"])
def test_without_a_log_there_is_a_warning(
    trouble: str,
    place: Path,
    image: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stamp(_: int) -> None:
        if trouble == "stamp":
            raise OSError(errno.EIO, "injected")

    if trouble == "directory":
        monkeypatch.setattr(redo, "_PARENTS", ("/proc/none", "/proc"))
    else:
        place.mkdir(mode=0o700)
    if trouble == "owner":
        os.chown(place, 12345, 12345)
    if trouble == "mode":
        place.chmod(0o770)
    log = redo.start(image, "disk.raw", stamp)
    log.reserve(1)
    log.append(1, 1)
    log.close()
    assert "disk.raw: no redo log" in caplog.text
    assert not place.exists() or not list(place.iterdir())


# -- leaves --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_clean_close_leaves_nothing(kind: ImageKind, place: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    leaf = kind.new(path, SIZE)
    write(leaf, 0, pattern(0, BLOCK, 1))
    assert len(list(place.iterdir())) == 1
    leaf.close()
    assert not list(place.iterdir())
    features = {"qcow2": 88, "qed": 32}.get(kind.format)  # the self-clearing ones
    assert features is None or path.read_bytes()[features : features + 8] == bytes(8)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_writes_go_on_when_the_log_is_full(
    kind: ImageKind, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redo, "CAPACITY", 8)
    monkeypatch.setattr(redo, "CHUNK", 4)
    path = tmp_path / "disk"
    leaf = kind.new(path, SIZE)
    for number in range(0, SIZE // BLOCK, 2):
        write(leaf, number * BLOCK, pattern(number * BLOCK, BLOCK, 1))
    abandon(leaf)
    leaf = kind.open(path)
    for number in range(SIZE // BLOCK):
        expected = bytes(BLOCK) if number % 2 else pattern(number * BLOCK, BLOCK, 1)
        assert read(leaf, number * BLOCK, BLOCK, BELOW) == expected
    leaf.close()


@pytest.mark.parametrize("kind", KINDS[1:], ids=str)
def test_another_program_that_writes_makes_the_log_void(
    kind: ImageKind, place: Path, tmp_path: Path
) -> None:
    """QEMU repairs the image, and may use what the killed process had used."""
    path = tmp_path / "disk"
    kind.make(path, SIZE, None)
    leaf = kind.open(path)
    write(leaf, 0, pattern(0, BLOCK, 1))
    abandon(leaf)
    subprocess.run(
        [binary("QEMU_IO"), "-f", kind.format, "-c", f"write -P 7 {BLOCK} {BLOCK}", str(path)],
        check=True,
        capture_output=True,
    )
    leaf = kind.open(path)
    assert read(leaf, 0, BLOCK, BELOW) == bytes(BLOCK)
    assert read(leaf, BLOCK, BLOCK, BELOW) == bytes([7]) * BLOCK
    assert leaf.check(repair=False).errors == 0
    leaf.close()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_backup_that_is_put_back_makes_the_log_void(
    kind: ImageKind, place: Path, tmp_path: Path
) -> None:
    """In place, so that device and inode stay."""
    path = tmp_path / "disk"
    kind.make(path, SIZE, BACKING)
    backup = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    leaf = kind.open(path)
    write(leaf, 0, pattern(0, BLOCK, 1))
    abandon(leaf)
    for name, content in backup.items():
        (tmp_path / name).write_bytes(content)
    leaf = kind.open(path)
    assert [extent.state for extent in extents(leaf)] == [State.UNALLOCATED]
    leaf.close()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_after_a_failed_sync_nothing_is_recovered(
    kind: ImageKind, place: Path, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    leaf = kind.new(path, SIZE)
    write(leaf, 0, pattern(0, BLOCK, 1))
    flush(leaf)
    write(leaf, BLOCK, pattern(BLOCK, BLOCK, 2))
    failed = OSError(errno.EIO, os.strerror(errno.EIO))
    with mock.patch.object(os, "fdatasync", side_effect=failed), pytest.raises(SyncError):
        flush(leaf)
    assert not list(place.iterdir())
    abandon(leaf)
    leaf = kind.open(path)
    assert read(leaf, 0, BLOCK, BELOW) == pattern(0, BLOCK, 1)
    assert read(leaf, BLOCK, BLOCK, BELOW) == bytes(BLOCK)
    leaf.close()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_sync_that_fails_while_it_is_recovered_is_final(
    kind: ImageKind, place: Path, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    leaf = kind.new(path, SIZE)
    write(leaf, 0, pattern(0, BLOCK, 1))
    abandon(leaf)
    failed = OSError(errno.EIO, os.strerror(errno.EIO))
    with mock.patch.object(os, "fdatasync", side_effect=failed), pytest.raises(SyncError):
        kind.open(path)
    leaf = kind.open(path)
    assert read(leaf, 0, BLOCK, BELOW) == bytes(BLOCK)
    leaf.close()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_log_that_does_not_fit_changes_nothing(
    kind: ImageKind, place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "disk"
    leaf = kind.new(path, SIZE)
    write(leaf, 0, pattern(0, BLOCK, 1))
    leaf._redo.append(1 << 40, 1, 1 << 30)  # type: ignore[attr-defined]
    abandon(leaf)
    leaf = kind.open(path)
    assert "its redo log does not fit, reset the guest" in caplog.text
    assert [extent.state for extent in extents(leaf)] == [State.UNALLOCATED]
    leaf.close()


def test_a_reader_leaves_the_log_alone(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    leaf = ours("qcow2").new(path, SIZE)
    write(leaf, 0, pattern(0, BLOCK, 1))
    abandon(leaf)
    reader = ours("qcow2").open(path, read_only=True)
    assert [extent.state for extent in extents(reader)] == [State.UNALLOCATED]
    reader.close()
    leaf = ours("qcow2").open(path)
    assert read(leaf, 0, BLOCK, BELOW) == pattern(0, BLOCK, 1)
    leaf.close()
