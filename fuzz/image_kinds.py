# SPDX-License-Identifier: Apache-2.0
"""The images that are damaged: every format, several cluster sizes, ours and QEMU's.

They are made when first asked for, by nbdstream or by qemu-img, and kept in memory.
"""

import functools
import os
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fuzz.files import directory
from fuzz.images import BACKING_BYTE, MAP_SUFFIX, Image, Place, Site, read_pieces
from nbdstream.leaf import create_leaf, open_leaf
from nbdstream.leaf.base import BackingReference, Leaf, State
from nbdstream.leaf.qcow2.header import FIELDS_V2, FIELDS_V3, RECORD, Extension, Header
from nbdstream.leaf.qcow2.header_file import read_header
from testbed.leaves import drive, flush
from testbed.peers import binary

BACKING = BackingReference("nbd://localhost:10809/disk", "raw", 1 << 20, "s1:0123456789abcdef")
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
_SIZES = {"I": 4, "Q": 8}
# Fields of the qcow2 header whose change leaves the meaning of the tables alone.
_HARMLESS = {"compatible_features", "autoclear_features"}
# Entries of a table that are sites: hostile counts are not found by more of them.
_MOST_ENTRIES = 24


def _content(size: int) -> bytes:
    return b"".join(struct.pack(">Q", 1 << 63 | n) for n in range(-(-size // 8)))[:size]


# -- making ----------------------------------------------------------------------------------


def _ours(
    image_format: str, cluster: int | None, size: int, *, backing: bool, dirty: bool = False
) -> Image:
    """An image made by nbdstream, with data, zeroes and holes."""
    path = directory() / "base"
    create_leaf(
        str(path),
        format=image_format,
        size=size,
        cluster_size=cluster,
        backing=BACKING if backing else None,
        extended_l2=image_format != "qcow2" or cluster is None or cluster >= 16384,
    )
    leaf = open_leaf(str(path), format=image_format)
    block = leaf.block_size
    content = _content(size)
    for start in (0, 2 * leaf.cluster_size, size // 2 // block * block):
        end = min(size, start + 2 * block)
        data = memoryview(content)[start:end]
        drive(leaf, lambda at=start, data=data: leaf.write(at, data))  # type: ignore[misc]
    drive(leaf, lambda: leaf.zero(leaf.cluster_size, block, unmap=True))
    flush(leaf)
    if not dirty:
        leaf.close()
    name = f"{image_format}-{cluster or 'default'}{'-backing' * backing}{'-dirty' * dirty}"
    image = _taken(name, image_format, path, writable=True)
    if dirty:
        leaf.close()
    return image


def _by_qemu(options: str, size: int, *, compressed: bool = False, snapshot: bool = False) -> Image:
    """A qcow2 image made by qemu-img, a part of it data."""
    raw, path = directory() / "base.raw", directory() / "base"
    raw.write_bytes(_content(size // 2) + bytes(size - size // 2))
    command = [binary("QEMU_IMG"), "convert", "-f", "raw", "-O", "qcow2", "-o", options]
    command += ["-c"] if compressed else []
    subprocess.run([*command, str(raw), str(path)], check=True, capture_output=True)
    if snapshot:
        command = [binary("QEMU_IMG"), "snapshot", "-c", "one", str(path)]
        subprocess.run(command, check=True, capture_output=True)
    kind = f"qemu-{options}{'-compressed' * compressed}{'-snapshot' * snapshot}"
    return _taken(kind, "qcow2", path, writable=not snapshot)


def _with_record(record: Callable[[Header], bytes]) -> Image:
    """An image whose extension for what we know of the backing holds something else."""
    path = directory() / "base"
    create_leaf(str(path), format="qcow2", size=65536, cluster_size=None, backing=BACKING)
    with path.open("r+b") as file:
        header = read_header(file.fileno(), str(path))
        kept = tuple(e for e in header.extensions if e.type != RECORD)
        new = replace(header, extensions=(*kept, Extension(RECORD, record(header))))
        os.pwrite(file.fileno(), b"".join(new.encode()), 0)
    return _taken("qcow2-record", "qcow2", path, writable=True)


def _infinite_record(header: Header) -> bytes:
    name = zlib.crc32(header.backing_name)
    return b'{"name-crc32": %d, "size": 1e999, "identity": ""}' % name


def _taken(name: str, image_format: str, path: Path, *, writable: bool) -> Image:
    """The image at ``path`` as a value; the files are removed."""
    # No other process has it, but it may still be open here, and locked.
    copy = path.with_name("copy")
    for suffix in ("", MAP_SUFFIX):
        if Path(f"{path}{suffix}").exists():
            Path(f"{copy}{suffix}").write_bytes(Path(f"{path}{suffix}").read_bytes())
    files = {"": read_pieces(copy)}
    if Path(f"{copy}{MAP_SUFFIX}").exists():
        files[MAP_SUFFIX] = read_pieces(Path(f"{copy}{MAP_SUFFIX}"))
    sites = list(_SITES[image_format](copy))
    leaf = open_leaf(str(copy), format=image_format, read_only=True)
    try:
        content, places = _places(leaf, _ENTRIES[image_format](copy))
        cluster_size = leaf.cluster_size
    finally:
        leaf.close()
    for file in (path, copy):
        for suffix in ("", MAP_SUFFIX):
            Path(f"{file}{suffix}").unlink(missing_ok=True)
    byteorder = "big" if image_format == "qcow2" else "little"
    return Image(
        name, image_format, byteorder, files, sites, content, places, cluster_size, writable
    )


Entries = Callable[[int], list[tuple[str, int, int]]]


def _places(leaf: Leaf, entries: Entries) -> tuple[bytes, list[Place]]:
    """What the guest sees, and what each of its clusters depends on."""
    content = bytearray(leaf.size)
    places = []
    for cluster in range(0, leaf.size, leaf.cluster_size):
        length = min(leaf.cluster_size, leaf.size - cluster)
        depends = entries(cluster)
        for extent in leaf.extents(cluster, length):
            view = memoryview(content)[extent.offset : extent.end]
            if extent.state is State.UNALLOCATED:
                view[:] = bytes([BACKING_BYTE]) * extent.length
            elif extent.state is State.DATA:
                leaf.read(extent, view)
                depends.append(("", extent.host, extent.length))
            elif extent.state is State.COMPRESSED:
                leaf.read(extent, view)
                depends.append(("", (extent.host & (1 << 48) - 1), leaf.cluster_size))
        places.append(Place(cluster, length, tuple(depends)))
    return bytes(content), places


# -- qcow2 -----------------------------------------------------------------------------------


def _words(path: Path, offset: int, count: int, byteorder: str) -> list[int]:
    with path.open("rb") as file:
        data = os.pread(file.fileno(), count * 8, offset).ljust(count * 8, b"\0")
    return list(struct.unpack(f"{'>' if byteorder == 'big' else '<'}{count}Q", data))


def _qcow2_sites(path: Path) -> Iterator[Site]:
    with path.open("rb") as file:
        header = read_header(file.fileno(), str(path))
    at = 4
    for name, code in FIELDS_V2 if header.version == 2 else FIELDS_V3:
        yield Site(at, _SIZES[code], "extension" if name in _HARMLESS else "header")
        at += _SIZES[code]
    for offset in range(at, min(header.used + 16, 1024), 4):
        yield Site(offset, 4, "extension")
    step = header.cluster_size
    for index in range(3):
        yield Site(header.refcount_table_offset + 8 * index, 8, "refcount")
    for block in _words(path, header.refcount_table_offset, 3, "big"):
        for offset in range(0, 128 if block else 0, 4):
            yield Site(block + offset, 4, "refcount")
    for index in range(min(header.l1_size, _MOST_ENTRIES)):
        yield Site(header.l1_table_offset + 8 * index, 8, "table")
    l1 = _words(path, header.l1_table_offset, min(header.l1_size, _MOST_ENTRIES), "big")
    for table in {entry & OFFSET_MASK for entry in l1} - {0}:
        for index in range(min(step // 8, 2 * _MOST_ENTRIES)):
            yield Site(table + 8 * index, 8, "table")


def _qcow2_entries(path: Path) -> Entries:
    with path.open("rb") as file:
        header = read_header(file.fileno(), str(path))
    geometry = header.geometry
    per_table = 1 << (geometry.table_bits - geometry.cluster_bits)

    def entries(guest: int) -> list[tuple[str, int, int]]:
        l1 = header.l1_table_offset + 8 * (guest >> geometry.table_bits)
        table = _words(path, l1, 1, "big")[0] & OFFSET_MASK
        index = (guest >> geometry.cluster_bits) % per_table
        # A slice is refused as a whole where one of its entries is damaged: so it is read,
        # or not, but never differently.
        size = 8 * geometry.words
        own = [("", l1, 8)]
        return [*own, ("", table + index * size, size)] if table else own

    return entries


# -- QED -------------------------------------------------------------------------------------


def _qed_sites(path: Path) -> Iterator[Site]:
    at = 4
    for size in (4, 4, 4, 8, 8, 8, 8, 8, 4, 4):
        yield Site(at, size, "header")
        at += size
    for offset in (*range(64, 96, 4), *range(3072, 3104, 4)):
        yield Site(offset, 4, "header")
    l1 = _words(path, 40, 1, "little")[0]
    entries = _words(path, l1, _MOST_ENTRIES, "little")
    for table in (l1, *filter(None, entries)):
        for index in range(_MOST_ENTRIES):
            yield Site(table + 8 * index, 8, "table")


def _qed_entries(path: Path) -> Entries:
    cluster, tables = struct.unpack("<II", path.read_bytes()[4:12])
    count = cluster * tables // 8
    l1 = _words(path, 40, 1, "little")[0]

    def entries(guest: int) -> list[tuple[str, int, int]]:
        number = guest // cluster
        place = l1 + 8 * (number // count)
        table = _words(path, place, 1, "little")[0]
        own = [("", place, 8)]
        return [*own, ("", table + 8 * (number % count), 8)] if table else own

    return entries


# -- raw -------------------------------------------------------------------------------------


def _raw_sites(path: Path) -> Iterator[Site]:
    if not Path(f"{path}{MAP_SUFFIX}").exists():
        for offset in range(0, 64, 8):
            yield Site(offset, 8, "data")
        return
    for slot in (0, 4096):
        at = slot
        for size in (8, 4, 4, 8, 8, 4, 4, 8, 2, 2, 2, 2, 4, 8, 8, 8, 8):
            yield Site(at, size, "header", MAP_SUFFIX)
            at += size
    for offset in range(8192, 8192 + 64, 4):
        yield Site(offset, 4, "map", MAP_SUFFIX)


def _raw_entries(path: Path) -> Entries:
    mapped = Path(f"{path}{MAP_SUFFIX}").exists()

    def entries(guest: int) -> list[tuple[str, int, int]]:
        return [(MAP_SUFFIX, 8192 + guest // 4096 // 8, 4)] if mapped else []

    return entries


_SITES = {"qcow2": _qcow2_sites, "qed": _qed_sites, "raw": _raw_sites}
_ENTRIES = {"qcow2": _qcow2_entries, "qed": _qed_entries, "raw": _raw_entries}

_MAKERS: dict[str, Sequence[Callable[[], Image]]] = {
    "qcow2": (
        lambda: _ours("qcow2", 512, 100_352, backing=True),
        lambda: _ours("qcow2", 4096, 300_000 // 512 * 512, backing=False),
        lambda: _ours("qcow2", 16384, 500_224, backing=True),
        lambda: _ours("qcow2", None, 1 << 20, backing=True),
        lambda: _ours("qcow2", 4096, 262_144, backing=True, dirty=True),
        lambda: _by_qemu("compat=0.10,cluster_size=4096", 131_072),
        lambda: _by_qemu("cluster_size=4096", 131_072, compressed=True),
        lambda: _by_qemu("cluster_size=16384,compression_type=zstd", 131_072, compressed=True),
        lambda: _by_qemu("cluster_size=512,refcount_bits=1", 65_536),
        lambda: _by_qemu("cluster_size=4096,refcount_bits=64", 65_536),
        lambda: _by_qemu("cluster_size=4096", 65_536, snapshot=True),
        lambda: _by_qemu("cluster_size=65536,extended_l2=on", 262_144),
        lambda: _with_record(lambda _header: b"[" * 4000),
        lambda: _with_record(_infinite_record),
    ),
    "qed": (
        lambda: _ours("qed", 4096, 300_032, backing=True),
        lambda: _ours("qed", 65536, 1 << 20, backing=True),
        lambda: _ours("qed", 4096, 131_072, backing=False),
        lambda: _ours("qed", 16384, 262_144, backing=True, dirty=True),
    ),
    "raw": (
        lambda: _ours("raw", 4096, 300_123, backing=True),
        lambda: _ours("raw", 65536, 1 << 20, backing=True),
        lambda: _ours("raw", None, 131_072, backing=False),
    ),
}


@functools.cache
def image(image_format: str, number: int) -> Image:
    """The image of that number (modulo how many there are) of a format."""
    makers = _MAKERS[image_format]
    return makers[number % len(makers)]()


def count(image_format: str) -> int:
    """How many images a format has."""
    return len(_MAKERS[image_format])
