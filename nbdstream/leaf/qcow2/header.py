# SPDX-License-Identifier: Apache-2.0
"""The qcow2 header: parsed with every number checked, and rewritten without a moment
at which a power cut would leave a header that means something else.

**What is refused.** Unknown incompatible features, encryption and external data files
are refused by name (the feature name table of the image knows names that we do not).
Unknown compatible features are ignored; unknown header extensions and additional header
fields are kept as they are.

**Rewriting.** A disk writes a sector whole or not at all, but a header may span several.
The fixed fields all lie in the first one, so `store_fields` is atomic. `install`, which
changes extensions or the backing file name, first writes the new extension area and
name a second time, behind all that the old header uses; then the first sector is
switched to that copy in one write (a padding extension, of a type that all others
ignore, leads there); then the area at the front, which nothing uses now, is written and
the first sector switched back. Each step is synced before the next.

**Our own extension** (`RECORD`) holds, as JSON, the backing's size and identity. It also
holds a checksum of the backing file name that it speaks of: tools that change the name
copy the extension untouched, and the record must not speak for another image.

Specification: QEMU's docs/interop/qcow2, "Header" to "Feature name table".
"""

import json
import os
import struct
import zlib
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from nbdstream.errors import LeafFormatError, LeafUnsupportedError
from nbdstream.extents import align_up
from nbdstream.leaf.base import BackingReference, write_exactly
from nbdstream.leaf.qcow2.layout import (
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS,
    SECTOR,
    Geometry,
)

MAGIC = b"QFI\xfb"
MAX_BACKING_NAME = 1023
MAX_SNAPSHOTS = 65536
# QEMU does not count beyond it.
MAX_SIZE = 1 << 62

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
    """A header, as the version 3 fields have it; ``used`` is where its bytes end."""

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

    def marked(self, *, dirty: bool) -> "Header":
        """This header with the dirty bit set or cleared."""
        features = self.incompatible_features & ~DIRTY | (DIRTY if dirty else 0)
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
    except (ValueError, KeyError, TypeError):
        pass  # somebody else's extension of the same type: it is not a record
    return 0, ""


def feature_name_table() -> Extension:
    """The extension that tells other programs the names of the features we know."""
    rows = [
        FEATURE_NAME.pack(kind, bit, name.encode())
        for kind, names in enumerate((INCOMPATIBLE, COMPATIBLE, AUTOCLEAR))
        for bit, name in names.items()
    ]
    return Extension(FEATURE_NAMES, b"".join(rows))


# -- reading ---------------------------------------------------------------------------


def read_header(fd: int, path: str) -> Header:
    """Read and check the header of an image.

    Raises LeafFormatError, LeafUnsupportedError, OSError.
    """
    data = os.pread(fd, 1 << MAX_CLUSTER_BITS, 0)
    try:
        header = _parse(data)
        _check_features(header)
        _check_tables(header, os.fstat(fd).st_size)
    except LeafFormatError as error:
        raise LeafFormatError(f"{path}: {error}") from error
    except LeafUnsupportedError as error:
        raise LeafUnsupportedError(f"{path}: {error}") from error
    return header


def _parse(data: bytes) -> Header:
    """The fields, the extensions and the backing file's name."""
    if data[:4] != MAGIC:
        raise LeafFormatError("not a qcow2 image")
    version = int.from_bytes(data[4:8], "big")
    if version not in (2, 3):
        raise LeafUnsupportedError(f"qcow2 version {version} is not supported")
    layout, fields = (STRUCT_V2, FIELDS_V2) if version == 2 else (STRUCT_V3, FIELDS_V3)
    if len(data) < layout.size:
        raise LeafFormatError(f"the header is cut off after {len(data)} bytes")
    values: dict[str, Any] = dict(
        zip((name for name, _ in fields), layout.unpack_from(data)[1:], strict=True)
    )
    if not MIN_CLUSTER_BITS <= values["cluster_bits"] <= MAX_CLUSTER_BITS:
        raise LeafFormatError(f"cluster size 2^{values['cluster_bits']} is out of range")
    cluster = data[: 1 << values["cluster_bits"]]
    length = values.setdefault("header_length", STRUCT_V2.size)
    if length < layout.size or length % 8 or length > len(cluster):
        raise LeafFormatError(f"header length {length} is invalid")
    values["additional"] = cluster[layout.size : length]
    extensions, end = _parse_extensions(cluster, length, values["backing_file_offset"])
    name = _parse_name(cluster, values["backing_file_offset"], values["backing_file_size"])
    used = max(end, values["backing_file_offset"] + len(name))
    return Header(**values, extensions=extensions, backing_name=name, used=used)


def _parse_extensions(data: bytes, start: int, name_at: int) -> tuple[tuple[Extension, ...], int]:
    """The extensions and where their area ends: at the end mark, or where the backing
    file's name begins (which old writers put right behind the last one)."""
    end = min(name_at, len(data)) if name_at > start else len(data)
    extensions = []
    at = start
    while at + 8 <= end:
        kind, length = struct.unpack_from(">II", data, at)
        at += 8
        if kind == END:
            break
        if length > end - at:
            raise LeafFormatError(f"header extension {kind:#x} with {length} bytes is too long")
        if kind != PADDING:
            extensions.append(Extension(kind, data[at : at + length]))
        at += align_up(length, 8)
    return tuple(extensions), at


def _parse_name(data: bytes, offset: int, length: int) -> bytes:
    if offset == 0:
        return b""
    if length > MAX_BACKING_NAME or offset + length > len(data):
        raise LeafFormatError(f"backing file name at {offset} (+{length}) is out of bounds")
    return data[offset : offset + length]


def _check_features(header: Header) -> None:
    """Refuse, by name, what cannot be handled."""
    unknown = header.incompatible_features & ~sum(1 << bit for bit in INCOMPATIBLE)
    if unknown:
        names = _feature_names(header)
        wanted = [names.get(bit, f"bit {bit}") for bit in range(64) if unknown >> bit & 1]
        raise LeafUnsupportedError(f"unsupported incompatible features: {', '.join(wanted)}")
    if header.crypt_method:
        raise LeafUnsupportedError("encryption is not supported")
    if header.incompatible_features & EXTERNAL_DATA:
        raise LeafUnsupportedError("an external data file is not supported")
    kind = header.additional[0] if header.additional else 0
    if bool(header.incompatible_features & COMPRESSION_TYPE) != bool(kind):
        raise LeafFormatError("the compression type contradicts the incompatible features")
    if kind not in COMPRESSION_NAMES:
        raise LeafUnsupportedError(f"compression type {kind} is not supported")
    if header.extended and header.cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
        raise LeafFormatError(f"clusters of 2^{header.cluster_bits} bytes have no subclusters")
    if header.refcount_order > 6:
        raise LeafFormatError(f"refcount width 2^{header.refcount_order} is out of range")


def _feature_names(header: Header) -> dict[int, str]:
    """Names of incompatible features by bit, from the image's own table."""
    table = header.extension(FEATURE_NAMES) or b""
    rows = FEATURE_NAME.iter_unpack(table[: len(table) // FEATURE_NAME.size * FEATURE_NAME.size])
    return {
        bit: ascii(name.rstrip(b"\0").decode(errors="replace"))[1:-1]
        for kind, bit, name in rows
        if kind == 0
    }


def _check_tables(header: Header, file_size: int) -> None:
    """Sizes and places of the tables that the header points to."""
    if header.size > MAX_SIZE:
        raise LeafFormatError(f"a disk of {header.size} bytes is out of range")
    geometry = header.geometry
    if header.l1_size * 8 > MAX_L1_BYTES:
        raise LeafFormatError(f"an L1 table of {header.l1_size} entries is too large")
    if header.l1_size < geometry.l1_entries:
        raise LeafFormatError(
            f"an L1 table of {header.l1_size} entries is too small "
            f"for {header.size} bytes, which need {geometry.l1_entries}"
        )
    refcount_bytes = header.refcount_table_clusters << header.cluster_bits
    if not 0 < refcount_bytes <= MAX_REFCOUNT_TABLE_BYTES:
        raise LeafFormatError(f"a refcount table of {refcount_bytes} bytes is out of range")
    if header.nb_snapshots > MAX_SNAPSHOTS:
        raise LeafFormatError(f"{header.nb_snapshots} snapshots are too many")
    regions = [
        (0, header.cluster_size, "header"),
        (header.refcount_table_offset, refcount_bytes, "refcount table"),
    ]
    if header.l1_size:
        regions.append((header.l1_table_offset, header.l1_size * 8, "L1 table"))
    for offset, length, name in regions:
        if offset % header.cluster_size:
            raise LeafFormatError(f"the {name} at {offset:#x} is not aligned to a cluster")
        # The header's own cluster, or a table's last one, may be cut short by the end.
        if offset and offset + length > align_up(file_size, header.cluster_size):
            raise LeafFormatError(f"the {name} at {offset:#x} (+{length}) is beyond the file's end")
    regions.sort()
    for (offset, length, name), (after, _, other) in pairwise(regions):
        if offset + align_up(length, header.cluster_size) > after:
            raise LeafFormatError(f"the {name} overlaps the {other} at {after:#x}")


# -- writing ---------------------------------------------------------------------------


def store_fields(fd: int, header: Header) -> None:
    """Write the fixed fields (not synced): a part of one sector, hence atomic."""
    write_exactly(fd, memoryview(header.encode_fields()), 0)


def install(fd: int, old: Header, new: Header) -> Header:
    """Replace an image's header, durably; return the new one as it is in the file.

    See the module's docstring for the order. Where the header cluster has no room for a
    second copy (clusters of 1 or 2 KiB, a name of hundreds of bytes), the sectors are
    written one after the other. Raises LeafUnsupportedError if the new one does not fit,
    OSError.
    """
    new = new.fitted()
    plain = b"".join(new.encode())
    plain += bytes(max(align_up(old.used, SECTOR) - len(plain), -len(plain) % SECTOR))
    shadow_at, shadow_length = len(plain), 0
    if plain[SECTOR:] != os.pread(fd, len(plain), 0)[SECTOR:]:
        front, area = new.encode(shadow_at)
        if shadow_at + len(area) <= new.cluster_size:
            shadow_length = len(area)
            _write_synced(fd, area, shadow_at)
            _write_synced(fd, front, 0)
        _write_synced(fd, plain[SECTOR:], SECTOR)
    _write_synced(fd, plain[:SECTOR], 0)
    _write_synced(fd, bytes(shadow_length), shadow_at)
    return _parse(os.pread(fd, new.cluster_size, 0))


def _write_synced(fd: int, data: bytes, offset: int) -> None:
    if data:
        write_exactly(fd, memoryview(data), offset)
        os.fdatasync(fd)
