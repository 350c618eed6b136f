# SPDX-License-Identifier: Apache-2.0
"""Ways to damage a qcow2 image, and what qemu-img says about it."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nbdstream.leaf.qcow2.header import Header
from nbdstream.leaf.qcow2.header_file import read_header
from testbed.peers import run
from tests.leaf_support import ImageKind, ours, pattern, plain, write

SIZE = 2 << 20
U64 = struct.Struct(">Q")


@dataclass
class Image:
    """An image with its places, to damage it."""

    path: Path
    header: Header

    @classmethod
    def make(cls, path: Path, kind: ImageKind) -> "Image":
        kind.make(path, SIZE, None)
        leaf = kind.open(path)
        for number in range(3):
            write(leaf, number * 512 * 1024, pattern(0, 256 * 1024, number))
        leaf.close()
        with path.open("rb") as file:
            return cls(path, read_header(file.fileno(), str(path)))

    def get(self, offset: int) -> int:
        with self.path.open("rb") as file:
            return int(U64.unpack(os.pread(file.fileno(), 8, offset))[0])

    def put(self, offset: int, value: int) -> None:
        with self.path.open("r+b") as file:
            os.pwrite(file.fileno(), U64.pack(value), offset)

    @property
    def l2(self) -> int:
        """The offset of the first L2 table."""
        return self.get(self.header.l1_table_offset) & 0x00FFFFFFFFFFFE00

    @property
    def block(self) -> int:
        """The offset of the first refcount block."""
        return self.get(self.header.refcount_table_offset)

    @property
    def step(self) -> int:
        return 16 if self.header.extended else 8


def l2_entry(value: int, bitmap: int = 0) -> Callable[[Image], None]:
    def damage(image: Image) -> None:
        image.put(image.l2, value)
        if image.header.extended:
            image.put(image.l2 + 8, bitmap)

    return damage


def flip(where: Callable[[Image], int], bits: int) -> Callable[[Image], None]:
    return lambda image: image.put(where(image), image.get(where(image)) ^ bits)


def duplicate_data(image: Image) -> None:
    image.put(image.l2, image.get(image.l2 + image.step))


def to_metadata(image: Image) -> None:
    image.put(image.l2, image.header.l1_table_offset | 1 << 63)


def l1_to_itself(image: Image) -> None:
    image.put(image.header.l1_table_offset, image.header.l1_table_offset | 1 << 63)


def l1_shared(image: Image) -> None:
    entry = image.get(image.header.l1_table_offset)
    image.put(image.header.l1_table_offset + 8, entry)


DAMAGE: dict[str, Callable[[Image], None]] = {
    "a data cluster is forgotten": l2_entry(0),
    "a data cluster twice": duplicate_data,
    "data in the L1 table": to_metadata,
    "data nowhere": l2_entry(1 << 63),
    "data beyond the end": l2_entry(1 << 63 | 1 << 40),
    "data not aligned": flip(lambda image: image.l2, 0x200),
    "reserved bits in L2": flip(lambda image: image.l2, 0x4),
    "L2 copied flag": flip(lambda image: image.l2, 1 << 63),
    "L1 copied flag": flip(lambda image: image.header.l1_table_offset, 1 << 63),
    "compressed beyond the end": l2_entry(1 << 62 | 1 << 45),
    "compressed with subclusters": l2_entry(1 << 62 | 0x1000, 7),
    "compressed with the copied flag": l2_entry(3 << 62 | 0x1000),
    "subclusters of nothing": l2_entry(0, 7),
    "data and zero": flip(lambda image: image.l2 + 8, 1 << 32),
    "no L2 table": lambda image: image.put(image.header.l1_table_offset, 0),
    "L2 beyond the end": lambda image: image.put(image.header.l1_table_offset, 1 << 63 | 1 << 40),
    "L1 entry leads to L1": l1_to_itself,
    "L1 reserved bits": flip(lambda image: image.header.l1_table_offset, 1 << 57),
    "refcounts zero": lambda image: image.put(image.block + 8, 0),
    "refcounts many": flip(lambda image: image.block + 8, 0x0002000300040005),
    "no refcount block": lambda image: image.put(image.header.refcount_table_offset, 0),
    "refcount block at L1": lambda image: image.put(
        image.header.refcount_table_offset, image.header.l1_table_offset
    ),
    "refcount block beyond the end": lambda image: image.put(
        image.header.refcount_table_offset, 1 << 40
    ),
    "refcount block not aligned": flip(lambda image: image.header.refcount_table_offset, 0x200),
}
KINDS = [plain(4096), ours("qcow2", 16384)]


def qemu_report(path: Path) -> dict[str, int]:
    report = json.loads(run(["qemu-img", "check", "--output=json", path], check=False))
    assert isinstance(report, dict)
    return report


def qemu_errors(path: Path) -> int:
    return qemu_report(path).get("corruptions", 0)
