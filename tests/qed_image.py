# SPDX-License-Identifier: Apache-2.0
"""A QED image to look into and to damage, field by field."""

import os
import struct
from pathlib import Path

from nbdstream.leaf.qed.header import NEED_CHECK, Header, read_header
from testbed.peers import run
from tests.leaf_support import (
    by_qemu,
    pattern,
    write,
    zero,
)

SMALL = by_qemu("qed", "cluster_size=4096,table_size=2")  # a table stands for 4 MiB
CLUSTER = 4096
SIZE = 12 << 20


def small_image(tmp_path: Path) -> Path:
    """An image of three tables, with some data under each, closed clean."""
    path = tmp_path / "disk.qed"
    leaf = SMALL.new(path, SIZE)
    for table in range(3):
        for cluster in (0, 1, 5, 600):
            offset = (table << 22) + cluster * CLUSTER
            write(leaf, offset, pattern(offset, CLUSTER, 1))
    zero(leaf, 2 * CLUSTER, CLUSTER)
    leaf.close()
    return path


def header_of(path: Path) -> Header:
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(fd)
    finally:
        os.close(fd)


def set_field(path: Path, offset: int, format_code: str, *values: int) -> None:
    with path.open("r+b") as image:
        image.seek(offset)
        image.write(struct.pack("<" + format_code, *values))


def l1_entry(path: Path, index: int) -> int:
    """The offset in the file of an L1 entry."""
    return header_of(path).l1_table_offset + 8 * index


def l2_entry(path: Path, index: int) -> int:
    """The offset in the file of an entry of the first L2 table."""
    data = path.read_bytes()
    (table,) = struct.unpack_from("<Q", data, l1_entry(path, 0))
    return int(table) + 8 * index


def need_check(path: Path) -> bool:
    return bool(header_of(path).features & NEED_CHECK)


def qemu_io(path: Path, *commands: str) -> str:
    arguments = [argument for command in commands for argument in ("-c", command)]
    image = f"driver=qed,backing=,file.driver=file,file.filename={path}"
    return run(["qemu-io", *arguments, "--image-opts", image])


def leaky(path: Path) -> list[int]:
    """Make leaks of three data clusters that lie in the middle; returns their guest offsets."""
    lost = [5 * CLUSTER, 1 * CLUSTER, 600 * CLUSTER]
    for offset in lost:
        set_field(path, l2_entry(path, offset // CLUSTER), "Q", 0)
    return lost
