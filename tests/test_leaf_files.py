# SPDX-License-Identifier: Apache-2.0
"""System calls on image files, as far as file systems differ."""

import os
import re
import tempfile
from pathlib import Path
from unittest import mock

import nbdstream.leaf
from nbdstream.disk import open_disk
from nbdstream.export import Hit
from nbdstream.leaf import create_leaf, open_leaf
from nbdstream.leaf.files import hot_read_flags


def test_files_on_a_disk_are_read_without_waiting_for_it() -> None:
    with tempfile.TemporaryFile(dir="/var/tmp") as file:  # which is never in memory
        file.write(b"x")
        file.flush()
        assert hot_read_flags(file.fileno()) == os.RWF_NOWAIT


def test_files_in_memory_do_not_know_that_flag_nor_need_it() -> None:
    fd = os.memfd_create("image")
    try:
        assert hot_read_flags(fd) == 0
    finally:
        os.close(fd)


def test_a_file_system_that_does_not_know_it_is_not_taken_for_memory() -> None:
    with (
        tempfile.TemporaryFile(dir="/var/tmp") as file,
        mock.patch.object(os, "preadv", side_effect=OSError(95, "not supported")),
    ):
        assert hot_read_flags(file.fileno()) == os.RWF_NOWAIT


async def test_a_leaf_in_memory_is_hot() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = str(Path(directory) / "leaf.raw")
        create_leaf(path, format="raw", size=1 << 20, cluster_size=None, backing=None)
        leaf = open_leaf(path)
        try:
            async with open_disk(leaf, None) as disk:
                await disk.write(memoryview(b"a" * 4096), 8192, fua=False)
                view = memoryview(bytearray(4096))
                assert disk.read_nowait(view, 8192) is Hit.DONE
                assert view == b"a" * 4096
        finally:
            leaf.close()


def test_one_place_syncs() -> None:
    """All syncs of a leaf go through `Syncs`, so that the first failure is noticed."""
    room = Path(nbdstream.leaf.__file__).parent
    calls = {
        str(path.relative_to(room))
        for path in room.rglob("*.py")
        if re.search(r"os\.f(data)?sync", path.read_text())
    }
    # Besides: a new image before it has its name, and the directory that it appears in.
    assert "durability.py" in calls
    assert calls <= {"durability.py", "files.py", "__init__.py"}
