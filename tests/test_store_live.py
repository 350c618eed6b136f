# SPDX-License-Identifier: Apache-2.0
"""The live map: other processes learn at once what an image's file has, and nothing else."""

import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from nbdstream.leaf.base import BackingReference, SyncError
from nbdstream.leaf.raw.leaf import RawLeaf
from nbdstream.store.layout import Image, Store
from nbdstream.store.live import LiveMap, live_path
from nbdstream.store.local import LocalImage
from testbed.leaves import flush
from testbed.peers import temporary_directory

BLOCK = 4096
SIZE = 40 * BLOCK + 512


@pytest.fixture
def found() -> Iterator[Image]:
    reference = BackingReference("nbd://far/image", "raw", SIZE, f"s1:{0:064x}")
    with temporary_directory() as directory:
        yield Store(directory / "store").create(reference)


@contextmanager
def served(found: Image) -> Iterator[RawLeaf]:
    """The image's leaf and live map, as its process has them."""
    leaf = RawLeaf(str(found.leaf), read_only=False)
    live = LiveMap(found, leaf)
    try:
        yield leaf
    finally:
        try:
            leaf.close()
        finally:
            live.close()


def write(leaf: RawLeaf, block: int, count: int = 1) -> None:
    leaf.write(block * BLOCK, memoryview(bytes([block]) * (count * BLOCK)))


def test_a_reader_learns_of_blocks_before_they_are_durable(found: Image) -> None:
    with served(found) as leaf, closing(LocalImage(found)) as local:
        assert not local.has(8 * BLOCK, BLOCK)
        write(leaf, 8, 3)
        leaf.zero(20 * BLOCK, BLOCK, unmap=True)
        leaf.write(40 * BLOCK, memoryview(b"e" * 512))
        assert local.has(8 * BLOCK, 3 * BLOCK)
        assert local.has(9 * BLOCK + 7, 100)
        assert local.has(20 * BLOCK, BLOCK)
        assert local.has(40 * BLOCK, 512)
        for offset, length in (
            (7 * BLOCK, BLOCK),
            (8 * BLOCK, 4 * BLOCK),
            (7 * BLOCK + 4095, 2),
            (40 * BLOCK, 513),
            (39 * BLOCK, BLOCK + 512),
        ):
            assert not local.has(offset, length)


def test_what_a_killed_process_wrote_still_counts(found: Image) -> None:
    """The page cache has it."""
    pid = os.fork()
    if pid == 0:
        with served(found) as leaf:
            write(leaf, 3)
            flush(leaf)
            write(leaf, 8)
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    with closing(LocalImage(found)) as local, served(found):
        with closing(LocalImage(found)) as later:
            for reader in (local, later):
                assert reader.has(3 * BLOCK, BLOCK)
                assert reader.has(8 * BLOCK, BLOCK)
                assert os.pread(reader.fd, BLOCK, 8 * BLOCK) == bytes([8]) * BLOCK


def test_nothing_of_another_boot_counts(found: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(found) as leaf:
        write(leaf, 3)
        flush(leaf)
        write(leaf, 8)
        old = live_path(found)
        content = old.read_bytes()
    boot_id = found.directory / "boot_id"
    boot_id.write_text("another\n")
    monkeypatch.setattr("nbdstream.store.live._BOOT_ID", boot_id)
    with closing(LocalImage(found)) as local:
        assert not local.has(8 * BLOCK, BLOCK)
    old.write_bytes(content)
    with served(found), closing(LocalImage(found)) as local:
        assert local.has(3 * BLOCK, BLOCK)
        assert not old.exists()


def test_a_failed_sync_withdraws_everything(found: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(SyncError), served(found) as leaf, closing(LocalImage(found)) as local:
        write(leaf, 3)
        assert local.has(3 * BLOCK, BLOCK)
        monkeypatch.setattr(os, "fdatasync", fail)
        with pytest.raises(SyncError):
            flush(leaf)
        monkeypatch.undo()
        assert not local.has(3 * BLOCK, BLOCK)
        write(leaf, 5)
        assert not local.has(5 * BLOCK, BLOCK)


def test_a_full_disk_costs_the_news_only(found: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> int:
        raise OSError(28, "No space left on device")

    with served(found) as leaf, closing(LocalImage(found)) as local:
        monkeypatch.setattr("nbdstream.store.live.os.pwrite", full)
        leaf.on_allocated(3 * BLOCK, BLOCK)
        monkeypatch.undo()
        assert not local.has(3 * BLOCK, BLOCK)
        leaf.on_allocated(3 * BLOCK, BLOCK)
        assert local.has(3 * BLOCK, BLOCK)


def test_a_complete_image_needs_no_map(found: Image) -> None:
    with served(found) as leaf:
        write(leaf, 0, 40)
        leaf.write(40 * BLOCK, memoryview(b"e" * 512))
        flush(leaf)
        leaf.drop_backing()
    live_path(found).unlink()
    with closing(LocalImage(found)) as local:
        assert local.complete.is_set()
        assert local.has(0, SIZE)
        assert not local.has(0, SIZE + 1)
