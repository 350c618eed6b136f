# SPDX-License-Identifier: Apache-2.0
"""Small images of every kind, and how an input damages them.

An image is kept as the pieces of its files that are not holes. Its *sites* are the fields of
its metadata: a mutation sets one of them, so that inputs find their way past the magic number.
Its *places* are the guest's clusters with all that they depend on: what no mutation has touched
has to stay what it was.
"""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.source import Source

# Content of the backing, wherever an image has one.
BACKING_BYTE = 0xB5
MAP_SUFFIX = ".map"
# Sites whose change may mean anything for the whole disk.
GLOBAL = ("header", "geometry")


@dataclass(frozen=True)
class Site:
    """A field: ``group`` is header, extension, refcount, table or map. ``file``: "" or a suffix."""

    offset: int
    size: int
    group: str
    file: str = ""


@dataclass(frozen=True)
class Place:
    """A guest range, and the ranges (file, offset, length) of the files that decide on it."""

    offset: int
    length: int
    depends: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Image:
    """An undamaged image. ``files`` maps suffixes ("" is the image) to (size, pieces)."""

    name: str
    format: str
    byteorder: str
    files: dict[str, tuple[int, list[tuple[int, bytes]]]]
    sites: Sequence[Site]
    content: bytes
    places: Sequence[Place]
    cluster_size: int
    # Whether opening it for writing must succeed as long as nothing is damaged.
    writable: bool = True


@dataclass
class Damage:
    """What was done to an image.

    Attributes:
        ranges: of the files, that were changed.
        everywhere: whether it may change the whole disk.
    """

    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    everywhere: bool = False

    def touches(self, place: Place) -> bool:
        """Whether a guest range depends on anything that was changed."""
        return self.everywhere or any(
            file == changed and offset < at + size and at < offset + length
            for file, offset, length in place.depends
            for changed, at, size in self.ranges
        )


def read_pieces(path: Path) -> tuple[int, list[tuple[int, bytes]]]:
    """A file's size and what is in it that is not a hole (or zeroes)."""
    data = path.read_bytes()
    step = 512
    pieces: list[tuple[int, bytes]] = []
    for at in range(0, len(data), step):
        piece = data[at : at + step]
        if not piece.strip(b"\0"):
            continue
        if pieces and pieces[-1][0] + len(pieces[-1][1]) == at:
            pieces[-1] = pieces[-1][0], pieces[-1][1] + piece
        else:
            pieces.append((at, piece))
    return len(data), pieces


def damaged(image: Image, source: Source, path: Path) -> Damage:
    """Write the image to ``path`` with the mutations that the input asks for."""
    damage = Damage()
    for suffix in ("", MAP_SUFFIX):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    descriptors = {}
    try:
        for suffix, (size, pieces) in image.files.items():
            fd = os.open(f"{path}{suffix}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            descriptors[suffix] = fd
            os.ftruncate(fd, size)
            for offset, data in pieces:
                os.pwrite(fd, data, offset)
        for _ in range(source.byte() % 8):
            _mutate(image, source, descriptors, damage)
        if MAP_SUFFIX in descriptors and source.flag():
            _correct_map_checksums(descriptors[MAP_SUFFIX])
    finally:
        for fd in descriptors.values():
            os.close(fd)
    return damage


def _mutate(image: Image, source: Source, descriptors: dict[str, int], damage: Damage) -> None:
    kind = source.byte()
    if kind < 8:
        file = source.choice(tuple(descriptors))
        size = os.fstat(descriptors[file]).st_size
        new = (0, 512, size - 1, size + 1, size - image.cluster_size, size + image.cluster_size)
        os.ftruncate(descriptors[file], max(0, new[kind % len(new)]))
        damage.everywhere = True
        return
    site = image.sites[source.below(len(image.sites))]
    fd = descriptors[site.file]
    old = os.pread(fd, site.size, site.offset).ljust(site.size, b"\0")
    mask = (1 << 8 * site.size) - 1
    value = _value(image, source, kind % 8, int.from_bytes(old, image.byteorder))  # type: ignore[arg-type]
    new_bytes = (value & mask).to_bytes(site.size, image.byteorder)  # type: ignore[arg-type]
    if kind % 8 == 7:  # another field's bytes
        other = image.sites[source.below(len(image.sites))]
        new_bytes = os.pread(descriptors[other.file], site.size, other.offset)
    os.pwrite(fd, new_bytes, site.offset)
    damage.ranges.append((site.file, site.offset, site.size))
    damage.everywhere |= site.group in GLOBAL


def _value(image: Image, source: Source, how: int, old: int) -> int:
    if how == 0:
        return old ^ 1 << source.byte() % 64
    if how == 1:
        return old + source.byte() - 128
    if how == 2:
        return old + (source.byte() - 128) * image.cluster_size
    if how == 3:  # a cluster of the file, with flags
        flags = source.choice((0, 1 << 63, 1 << 62, 1, 3 << 62))
        return source.byte() * image.cluster_size | flags
    if how == 4:
        return source.number(8)
    return source.integer(64)


def _correct_map_checksums(fd: int) -> None:
    """Make the checksums of a raw map's headers right again, so that what they protect is read."""
    for slot in (0, 4096):
        page = os.pread(fd, 4096, slot).ljust(4096, b"\0")
        length = int.from_bytes(page[12:16], "little")
        if 60 <= length <= 4096:
            covered = page[:_MAP_CRC] + bytes(4) + page[_MAP_CRC + 4 : length]
            os.pwrite(fd, zlib.crc32(covered).to_bytes(4, "little"), slot + _MAP_CRC)


# Where a raw map's header has its checksum.
_MAP_CRC = 56
