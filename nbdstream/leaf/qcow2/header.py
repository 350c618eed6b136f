# SPDX-License-Identifier: Apache-2.0
"""The qcow2 header as a value: its fields, its extensions, the backing that it names.

**Our own extension** (`RECORD`) holds, as JSON, the backing's size and identity. It also
holds a checksum of the backing file name that it speaks of: tools that change the name
copy the extension untouched, and the record must not speak for another image.

Specification: QEMU's docs/interop/qcow2, "Header" to "Feature name table".
"""

import json
import struct
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

from nbdstream.errors import LeafUnsupportedError
from nbdstream.leaf.base import BackingReference
from nbdstream.leaf.qcow2.layout import SECTOR, Geometry

# What to do about damage, for the end of an error message.
REMEDY = "try: nbdstream check --repair, which drops the local data under damaged entries"

MAGIC = b"QFI\xfb"
MAX_BACKING_NAME = 1023

# (field, struct code), in the order in which they lie in the file.
FIELDS_V2 = (
    ("version", "I"),
    ("backing_file_offset", "Q"),
    ("backing_file_size", "I"),
    ("cluster_bits", "I"),
    ("size", "Q"),
    ("crypt_method", "I"),
    ("l1_size", "I"),
    ("l1_table_offset", "Q"),
    ("refcount_table_offset", "Q"),
    ("refcount_table_clusters", "I"),
    ("nb_snapshots", "I"),
    ("snapshots_offset", "Q"),
)
FIELDS_V3 = (
    *FIELDS_V2,
    ("incompatible_features", "Q"),
    ("compatible_features", "Q"),
    ("autoclear_features", "Q"),
    ("refcount_order", "I"),
    ("header_length", "I"),
)
STRUCT_V2 = struct.Struct(">4s" + "".join(code for _, code in FIELDS_V2))
STRUCT_V3 = struct.Struct(">4s" + "".join(code for _, code in FIELDS_V3))
# Smaller clusters may have no room for two copies of a header of several sectors.
SMALL_CLUSTER = 4096
# With compression_type, the only additional field so far, and its padding.
HEADER_LENGTH = STRUCT_V3.size + 8

DIRTY, CORRUPT, EXTERNAL_DATA, COMPRESSION_TYPE, EXTENDED_L2 = (1 << bit for bit in range(5))
LAZY_REFCOUNTS = 1
BITMAPS = 1
# A redo log's stamp (`nbdstream.leaf.redo`) is in the upper half of the autoclear features: a
# program that does not know these clears them before it changes the image.
STAMP_SHIFT = 32
INCOMPATIBLE = {
    0: "dirty bit",
    1: "corrupt bit",
    2: "external data file",
    3: "compression type",
    4: "extended L2 entries",
}
COMPATIBLE = {0: "lazy refcounts"}
AUTOCLEAR = {0: "bitmaps", 1: "raw external data"}
COMPRESSION_NAMES = {0: "zlib", 1: "zstd"}

END = 0
BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857
BITMAPS_EXTENSION = 0x23852875
RECORD = 0x6E627374  # "nbst"
PADDING = 0x6E627370  # "nbsp"
FEATURE_NAME = struct.Struct(">BB46s")


@dataclass(frozen=True)
class Extension:
    """A header extension, its data without the padding."""

    type: int
    data: bytes

    def encode(self) -> bytes:
        return struct.pack(">II", self.type, len(self.data)) + _padded(self.data)


@dataclass(frozen=True)
class Header:
    """A header, as the version 3 fields have it.

    ``area`` is where the extensions begin in the file, behind padding if any; ``used`` is
    where the last byte of all ends.
    """

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    crypt_method: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    backing_file_offset: int = 0
    backing_file_size: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = HEADER_LENGTH
    additional: bytes = bytes(HEADER_LENGTH - STRUCT_V3.size)
    extensions: tuple[Extension, ...] = ()
    backing_name: bytes = b""
    area: int = field(default=0, compare=False)
    used: int = field(default=0, compare=False)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.size, self.cluster_bits, self.extended, self.refcount_order)

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended(self) -> bool:
        return bool(self.incompatible_features & EXTENDED_L2)

    @property
    def dirty(self) -> bool:
        return bool(self.incompatible_features & DIRTY)

    @property
    def corrupt(self) -> bool:
        return bool(self.incompatible_features & CORRUPT)

    @property
    def compression(self) -> str:
        """QEMU's name of the compression type."""
        return COMPRESSION_NAMES[self.additional[0] if self.additional else 0]

    def extension(self, kind: int) -> bytes | None:
        """The data of the first extension of a type."""
        return next((e.data for e in self.extensions if e.type == kind), None)

    @property
    def stamp(self) -> int:
        """The stamp of the redo log, 0 if there is none."""
        return self.autoclear_features >> STAMP_SHIFT

    def stamped(self, stamp: int) -> "Header":
        """This header with another stamp, or 0 for none, and no other autoclear feature."""
        return replace(self, autoclear_features=stamp << STAMP_SHIFT)

    def marked(self, *, dirty: bool, corrupt: bool | None = None) -> "Header":
        """This header with the dirty bit, and the corrupt bit unless None, set or cleared."""
        features = self.incompatible_features & ~DIRTY | (DIRTY if dirty else 0)
        if corrupt is not None:
            features = features & ~CORRUPT | (CORRUPT if corrupt else 0)
        return replace(self, incompatible_features=features)

    # -- the backing -------------------------------------------------------------------

    @property
    def backing(self) -> BackingReference | None:
        """What the header says of the backing; the format is "" where it does not say."""
        if not self.backing_name:
            return None
        size, identity = _parse_record(self.extension(RECORD), self.backing_name)
        return BackingReference(
            uri=self.backing_name.decode(errors="surrogateescape"),
            format=(self.extension(BACKING_FORMAT) or b"").decode(errors="replace"),
            size=size,
            identity=identity,
        )

    def with_backing(self, backing: BackingReference | None) -> "Header":
        """This header with another backing, or none. Raises LeafUnsupportedError if the
        name is too long for the format."""
        kept = tuple(e for e in self.extensions if e.type not in (BACKING_FORMAT, RECORD, PADDING))
        if backing is None:
            return replace(self, backing_name=b"", extensions=kept)
        name = backing.uri.encode(errors="surrogateescape")
        if len(name) > MAX_BACKING_NAME:
            raise LeafUnsupportedError(
                f"the backing's name has {len(name)} bytes; "
                f"qcow2 has room for {MAX_BACKING_NAME}: use a shorter one"
            )
        own = [Extension(RECORD, _record(backing, name))]
        if backing.format:
            own.insert(0, Extension(BACKING_FORMAT, backing.format.encode()))
        return replace(self, backing_name=name, extensions=(*own, *kept))

    # -- encoding ----------------------------------------------------------------------

    def fitted(self) -> "Header":
        """This header, without the feature name table (which is optional) if there is no
        room for it in the first cluster, and for a second copy of it all (see `install`).

        Raises LeafUnsupportedError if even that is not enough.
        """
        kept = tuple(e for e in self.extensions if e.type != FEATURE_NAMES)
        room = SECTOR if self.cluster_size < SMALL_CLUSTER else self.cluster_size
        for header, limit in (
            (self, room),
            (replace(self, extensions=kept), self.cluster_size),
        ):
            length = sum(map(len, header.encode()))
            if length <= limit:
                return header
        raise LeafUnsupportedError(
            f"the header needs {length} bytes, a cluster has {self.cluster_size}: "
            "use larger clusters, or a shorter name for the backing"
        )

    def encode_fields(self) -> bytes:
        """The fixed fields, as version 3 has them (or version 2, if this is one)."""
        fields = FIELDS_V2 if self.version == 2 else FIELDS_V3
        layout = STRUCT_V2 if self.version == 2 else STRUCT_V3
        return layout.pack(MAGIC, *(getattr(self, name) for name, _ in fields))

    def encode(self, area_offset: int | None = None) -> tuple[bytes, bytes]:
        """The bytes of the header up to the extension area, and the area with the name.

        The area follows at once, or lies at ``area_offset`` of the file; then a padding
        extension leads there. Sets the fields that say where the name is.
        """
        area = b"".join(e.encode() for e in self.extensions) + bytes(8)
        start = self.header_length if area_offset is None else area_offset
        header = replace(
            self,
            backing_file_offset=start + len(area) if self.backing_name else 0,
            backing_file_size=len(self.backing_name),
        )
        front = header.encode_fields() + self.additional
        if area_offset is not None:
            front += struct.pack(">II", PADDING, area_offset - self.header_length - 8)
        return front, area + self.backing_name


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def _record(backing: BackingReference, name: bytes) -> bytes:
    values = {"size": backing.size, "identity": backing.identity, "name-crc32": zlib.crc32(name)}
    return json.dumps(values, separators=(",", ":")).encode()


def _parse_record(data: bytes | None, name: bytes) -> tuple[int, str]:
    """Size and identity of the backing of that name; 0 and "" where nothing is recorded."""
    try:
        values: Any = json.loads(data or b"")
        if values["name-crc32"] == zlib.crc32(name):
            return int(values["size"]), str(values["identity"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass  # another program's extension of the same type: it is not a record
    return 0, ""


def feature_name_table() -> Extension:
    """The extension that tells other programs the names of the features we know."""
    rows = [
        FEATURE_NAME.pack(kind, bit, name.encode())
        for kind, names in enumerate((INCOMPATIBLE, COMPATIBLE, AUTOCLEAR))
        for bit, name in names.items()
    ]
    return Extension(FEATURE_NAMES, b"".join(rows))
