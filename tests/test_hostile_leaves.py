# SPDX-License-Identifier: Apache-2.0
"""Leaves that strangers wrote, opened as they are: bombs, tables that lead to themselves, and
paths that lead to no file."""

import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from nbdstream.errors import LeafError
from nbdstream.leaf import open_leaf
from tests.hostile_images import qcow2
from tests.leaf_support import read, write

MIB = 1 << 20
CLUSTER = 1 << 16
COPIED, COMPRESSED = 1 << 63, 1 << 62
L2 = 4 * CLUSTER
MARK = b"what a guest wrote. "
PLACES = {
    "the refcount table": CLUSTER,
    "a refcount block": 2 * CLUSTER,
    "the L1 table": 3 * CLUSTER,
    "the L2 table": L2,
    "the header": 0,
    "nowhere": 1 << 50,
}


def image(*, l1: int = L2 | COPIED, l2: int = 0, behind: bytes = b"", **fields: Any) -> bytes:
    """A qcow2 image with one L2 table, the first entry of which is ``l2``."""
    content = bytearray(qcow2(l1_entry=l1, **fields)) + bytes(CLUSTER) + behind
    struct.pack_into(">Q", content, L2, l2)
    clusters = -(-len(content) // CLUSTER)
    struct.pack_into(f">{clusters}H", content, 2 * CLUSTER, *[1] * clusters)
    return bytes(content).ljust(clusters * CLUSTER, b"\0")


def deflated(content: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(content) + packer.flush()


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_a_compressed_cluster_unpacks_to_a_cluster_and_no_more(
    compression: str, tmp_path: Path
) -> None:
    """100 MiB of zeroes in what an image says is one cluster."""
    pack = deflated if compression == "zlib" else zstandard.ZstdCompressor().compress
    bomb = pack(bytes(100 * MIB))
    sectors = -(-len(bomb) // 512)
    assert sectors <= 256
    fields: dict[str, Any] = {"header_length": 112, "incompatible": 8}
    entry = COMPRESSED | (sectors - 1) << 54 | 5 * CLUSTER
    content = bytearray(image(l2=entry, behind=bomb, **(fields if compression == "zstd" else {})))
    content[104] = compression == "zstd"
    path = tmp_path / "bomb.qcow2"
    path.write_bytes(content)
    leaf = open_leaf(str(path), read_only=True)
    tracemalloc.start()
    try:
        for _ in range(20):
            assert read(leaf, 0, CLUSTER, bytes(MIB)) == bytes(CLUSTER)
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()
        leaf.close()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("table", ["l1", "l2"])
def test_tables_that_lead_to_tables_are_not_written_over(
    table: str, place: str, tmp_path: Path
) -> None:
    """A guest that writes there gets an error, or its write goes elsewhere."""
    entry: dict[str, Any] = {table: PLACES[place] | COPIED}
    path = tmp_path / "loop.qcow2"
    path.write_bytes(image(**entry))
    content = (MARK * (CLUSTER // len(MARK) + 1))[:CLUSTER]
    try:
        leaf = open_leaf(str(path))
    except LeafError:
        return
    try:
        for offset in (0, MIB // 2):
            for attempt in (read, _write_there):
                try:
                    attempt(leaf, offset, CLUSTER, content)
                except (LeafError, OSError):
                    pass
    finally:
        leaf.close()
    after = path.read_bytes()
    assert after[:4] == b"QFI\xfb"
    assert MARK not in after[: 5 * CLUSTER]


def _write_there(leaf: object, offset: int, length: int, content: bytes) -> None:
    write(leaf, offset, content[:length])  # type: ignore[arg-type]


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, _device], ids=["directory", "fifo", "zero"]
)
@pytest.mark.parametrize("name", ["leaf.raw", "leaf.qcow2", "leaf.qed"])
@pytest.mark.timeout(20)
def test_what_is_no_file_is_no_leaf(
    make: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    """It is refused at once, for reading and for writing."""
    path = tmp_path / name
    make(path)
    for read_only in (True, False):
        with pytest.raises((LeafError, OSError)):
            open_leaf(str(path), read_only=read_only)
