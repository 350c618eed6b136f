# SPDX-License-Identifier: Apache-2.0
"""The header of a QED image (docs/interop/qed_spec.rst, "Header"), and what we keep behind it.

QED has room for the backing's name, but for nothing else about it. The specification
leaves the rest of the header's clusters to "legitimate extra information", and QEMU
neither reads nor writes it (checked with ``qemu-img rebase -u``, ``check``, ``resize``
and writes). So an image of ours has

    0     the header, 64 bytes: changed by writing just these, within one sector
    64    name slot 0, up to 1023 bytes; where QEMU puts the name
    1088  name slot 1
    3072  identity record of the name in slot 0, one sector
    3584  identity record of the name in slot 1

A new name goes to the slot that is not in use, with its record; when both are durable,
the header is made to point there. A crash leaves one of the two, whole. A record names
its name by a checksum, so when another tool has changed the name, what we know of the
old backing is not taken for knowledge of the new one: the identity is then empty, and
the size unknown, until they are recorded again.
"""

import os
import struct
import zlib
from dataclasses import dataclass, replace

from nbdstream.errors import LeafError, LeafFormatError, LeafUnsupportedError
from nbdstream.extents import align_down
from nbdstream.leaf.base import BackingReference, write_exactly
from nbdstream.leaf.durability import Syncs

MAGIC = b"QED\0"
BACKING_FILE = 0x01
NEED_CHECK = 0x02
BACKING_FORMAT_NO_PROBE = 0x04
# A redo log's stamp (`nbdstream.leaf.redo`) is in the upper half of the self-clearing features:
# a program that does not know these clears them before it changes the image.
STAMP_SHIFT = 32
_KNOWN_FEATURES = BACKING_FILE | NEED_CHECK | BACKING_FORMAT_NO_PROBE

MIN_CLUSTER_SIZE = 4096
MAX_CLUSTER_SIZE = 64 << 20
MAX_TABLE_SIZE = 16
MAX_NAME = 1023  # QEMU's limit for the name of a backing file

# magic, cluster size, table size, header size; features, compatible and self-clearing ones;
# offset of the L1 table, disk size; offset and length of the backing's name
_HEADER = struct.Struct("<4sIIIQQQQQII")
_NAME_SLOTS = (_HEADER.size, _HEADER.size + MAX_NAME + 1)
_RECORD_SLOTS = (3072, 3584)

# magic, CRC-32 of the name that it belongs to, size of the backing, length of the identity
# (UTF-8, behind this), CRC-32 of all of it with this field zero
_RECORD = struct.Struct("<8sIQHxxI")
_RECORD_MAGIC = b"nbdsback"
_RECORD_SIZE = 512


@dataclass(frozen=True)
class Header:
    """The fields, by the specification's names; sizes of tables and header in clusters."""

    cluster_size: int
    table_size: int
    header_size: int
    features: int
    compat_features: int
    autoclear_features: int
    l1_table_offset: int
    image_size: int
    backing_filename_offset: int = 0
    backing_filename_size: int = 0

    @property
    def header_bytes(self) -> int:
        return self.header_size * self.cluster_size

    @property
    def table_bytes(self) -> int:
        return self.table_size * self.cluster_size

    @property
    def table_entries(self) -> int:
        return self.table_bytes // 8

    @property
    def max_image_size(self) -> int:
        return min(self.table_entries**2 * self.cluster_size, (1 << 63) - 1)

    def pack(self) -> bytes:
        return _HEADER.pack(
            MAGIC,
            self.cluster_size,
            self.table_size,
            self.header_size,
            self.features,
            self.compat_features,
            self.autoclear_features,
            self.l1_table_offset,
            self.image_size,
            self.backing_filename_offset,
            self.backing_filename_size,
        )

    def with_mark(self, need_check: bool) -> "Header":
        """This header with `NEED_CHECK` set or cleared."""
        features = self.features & ~NEED_CHECK | (NEED_CHECK if need_check else 0)
        return replace(self, features=features)

    @property
    def stamp(self) -> int:
        """The stamp of the redo log, 0 if there is none."""
        return self.autoclear_features >> STAMP_SHIFT

    def stamped(self, stamp: int) -> "Header":
        """This header with another stamp, or 0 for none, and no other self-clearing feature."""
        return replace(self, autoclear_features=stamp << STAMP_SHIFT)

    def write(self, fd: int) -> None:
        """Write the header in place, and nothing behind it. Raises OSError."""
        write_exactly(fd, memoryview(self.pack()), 0)


def is_cluster_size(value: int) -> bool:
    return MIN_CLUSTER_SIZE <= value <= MAX_CLUSTER_SIZE and value & (value - 1) == 0


def read_header(fd: int) -> Header:
    """Read and judge the header (may block).

    Raises LeafFormatError, LeafUnsupportedError, with a message that lacks the path.
    """
    data = os.pread(fd, _HEADER.size, 0)
    if len(data) < _HEADER.size or data[:4] != MAGIC:
        raise LeafFormatError("not a QED image")
    header = Header(*_HEADER.unpack(data)[1:])
    unknown = header.features & ~_KNOWN_FEATURES
    if unknown:
        raise LeafUnsupportedError(f"unknown QED feature bits {unknown:#x}")
    if not is_cluster_size(header.cluster_size):
        raise LeafFormatError(f"bad QED cluster size {header.cluster_size}")
    if header.table_size not in (1, 2, 4, 8, MAX_TABLE_SIZE):
        raise LeafFormatError(f"bad QED table size {header.table_size}")
    if header.image_size % 512 or not 0 < header.image_size <= header.max_image_size:
        raise LeafFormatError(f"bad QED image size {header.image_size}")
    file_end = align_down(os.fstat(fd).st_size, header.cluster_size)
    l1 = header.l1_table_offset
    if header.header_size == 0 or l1 % header.cluster_size:
        raise LeafFormatError(f"bad QED header size {header.header_size} or L1 offset {l1}")
    if l1 < header.header_bytes or l1 + header.table_bytes > file_end:
        raise LeafFormatError(f"the QED L1 table at {l1} is not within the {file_end} bytes there")
    return header


def read_backing(fd: int, header: Header) -> BackingReference | None:
    """What the image says of its backing (may block). Raises LeafFormatError."""
    start, length = header.backing_filename_offset, header.backing_filename_size
    if not header.features & BACKING_FILE or length == 0:
        return None
    if length > MAX_NAME or start + length > header.header_bytes:
        raise LeafFormatError(f"bad QED backing name: {length} bytes at {start}")
    name = os.pread(fd, length, start)
    size, identity = 0, ""
    if start in _NAME_SLOTS:
        slot = _RECORD_SLOTS[_NAME_SLOTS.index(start)]
        size, identity = _unpack_record(os.pread(fd, _RECORD_SIZE, slot), name)
    backing_format = "raw" if header.features & BACKING_FORMAT_NO_PROBE else ""
    return BackingReference(os.fsdecode(name), backing_format, size, identity)


def install_backing(fd: int, header: Header, backing: BackingReference, syncs: Syncs) -> Header:
    """Write another reference, durably, in place of the one that ``header`` has, if any.

    Returns the new header, which is in the file. Raises LeafError if it does not fit in,
    OSError.
    """
    name = os.fsencode(backing.uri)
    if not 0 < len(name) <= MAX_NAME:
        raise LeafError(f"a QED image has room for {MAX_NAME} bytes of the backing's URI")
    slot = 1 if header.backing_filename_offset == _NAME_SLOTS[0] else 0
    record = _pack_record(backing, name)
    write_exactly(fd, memoryview(name), _NAME_SLOTS[slot])
    write_exactly(fd, memoryview(record), _RECORD_SLOTS[slot])
    syncs.sync(fd)  # what the header is going to point at comes first
    features = header.features & ~BACKING_FORMAT_NO_PROBE | BACKING_FILE
    if backing.format == "raw":
        features |= BACKING_FORMAT_NO_PROBE
    header = replace(
        header,
        features=features,
        backing_filename_offset=_NAME_SLOTS[slot],
        backing_filename_size=len(name),
    )
    header.write(fd)
    syncs.sync(fd)
    return header


def without_backing(header: Header) -> Header:
    return replace(
        header,
        features=header.features & ~(BACKING_FILE | BACKING_FORMAT_NO_PROBE),
        backing_filename_offset=0,
        backing_filename_size=0,
    )


def _pack_record(backing: BackingReference, name: bytes) -> bytes:
    identity = backing.identity.encode()
    if _RECORD.size + len(identity) > _RECORD_SIZE:
        raise LeafError(f"the identity of the backing is too long for QED: {len(identity)} bytes")
    fields = (_RECORD_MAGIC, zlib.crc32(name), backing.size, len(identity))
    checksum = zlib.crc32(_RECORD.pack(*fields, 0) + identity)
    return (_RECORD.pack(*fields, checksum) + identity).ljust(_RECORD_SIZE, b"\0")


def _unpack_record(record: bytes, name: bytes) -> tuple[int, str]:
    """Size and identity; (0, "") where there is no record that belongs to the name."""
    unknown = (0, "")
    if len(record) < _RECORD_SIZE:
        return unknown
    magic, name_checksum, size, length, checksum = _RECORD.unpack_from(record)
    end = _RECORD.size + length
    if magic != _RECORD_MAGIC or end > _RECORD_SIZE or name_checksum != zlib.crc32(name):
        return unknown
    covered = record[: _RECORD.size - 4] + bytes(4) + record[_RECORD.size : end]
    if zlib.crc32(covered) != checksum:
        return unknown
    try:
        return size, record[_RECORD.size : end].decode()
    except UnicodeDecodeError:
        return unknown
