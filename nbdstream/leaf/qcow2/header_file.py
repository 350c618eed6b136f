# SPDX-License-Identifier: Apache-2.0
"""The qcow2 header in the file: parsed with every number checked, and rewritten without a
moment at which a power cut would leave a header that means something else.

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

Specification: QEMU's docs/interop/qcow2, "Header" to "Feature name table".
"""

import os
import struct
from itertools import pairwise
from typing import Any

from nbdstream.errors import LeafFormatError, LeafUnsupportedError
from nbdstream.extents import align_up
from nbdstream.leaf.base import write_exactly
from nbdstream.leaf.durability import Syncs
from nbdstream.leaf.qcow2.header import (
    COMPRESSION_NAMES,
    COMPRESSION_TYPE,
    END,
    EXTERNAL_DATA,
    FEATURE_NAME,
    FEATURE_NAMES,
    FIELDS_V2,
    FIELDS_V3,
    INCOMPATIBLE,
    MAGIC,
    MAX_BACKING_NAME,
    PADDING,
    STRUCT_V2,
    STRUCT_V3,
    Extension,
    Header,
)
from nbdstream.leaf.qcow2.layout import (
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS,
    SECTOR,
)

MAX_SNAPSHOTS = 65536
# QEMU does not count beyond it.
MAX_SIZE = 1 << 62


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
    extensions, area, end = _parse_extensions(cluster, length, values["backing_file_offset"])
    name = _parse_name(cluster, values["backing_file_offset"], values["backing_file_size"])
    used = max(end, values["backing_file_offset"] + len(name))
    return Header(**values, extensions=extensions, backing_name=name, area=area, used=used)


def _parse_extensions(
    data: bytes, start: int, name_at: int
) -> tuple[tuple[Extension, ...], int, int]:
    """The extensions, where the first one is (behind padding), and where their area ends:
    at the end mark, or where the backing file's name begins (which old writers put right
    behind the last one)."""
    end = min(name_at, len(data)) if name_at > start else len(data)
    extensions: list[Extension] = []
    area = at = start
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
        if not extensions:
            area = at
    return tuple(extensions), area, at


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


def store_features(fd: int, header: Header) -> None:
    """Write the feature bits of a version 3 header, and nothing else (not synced): a change of
    the extensions or of the backing's name that is under way, or has failed half-way, is not
    touched."""
    features = struct.pack(
        ">QQQ",
        header.incompatible_features,
        header.compatible_features,
        header.autoclear_features,
    )
    write_exactly(fd, memoryview(features), STRUCT_V2.size)


def reread_header(fd: int) -> Header:
    """The header as it is in the file, after it could not be replaced. Raises LeafFormatError,
    OSError."""
    return _parse(os.pread(fd, 1 << MAX_CLUSTER_BITS, 0))


def install(fd: int, old: Header, new: Header, syncs: Syncs) -> Header:
    """Replace an image's header, durably; return the new one as it is in the file.

    See the module's docstring for the order. Where the header cluster has no room for a
    second copy (clusters of 1 or 2 KiB, a name of hundreds of bytes), the sectors are
    written one after the other. Raises LeafUnsupportedError if the new one does not fit,
    OSError.
    """
    new = new.fitted()
    plain = b"".join(new.encode())
    plain += bytes(-len(plain) % SECTOR)
    end = max(len(plain), align_up(old.used, SECTOR))
    if plain[SECTOR:] != os.pread(fd, len(plain), 0)[SECTOR:]:
        # After a cut, what is in use may be the second copy of that time: the front is free.
        if old.area < len(plain):
            end = _switch_to_copy(fd, new, end, syncs)
        _write_synced(fd, plain[SECTOR:], SECTOR, syncs)
    _write_synced(fd, plain[:SECTOR], 0, syncs)
    _write_synced(fd, bytes(min(end, new.cluster_size) - len(plain)), len(plain), syncs)
    return _parse(os.pread(fd, new.cluster_size, 0))


def _switch_to_copy(fd: int, new: Header, offset: int, syncs: Syncs) -> int:
    """Put the extensions and the name at ``offset``, if there is room, and make the first
    sector refer to them; return where they end."""
    front, area = new.encode(offset)
    end = offset + len(area)
    if end > new.cluster_size:
        return offset
    _write_synced(fd, area, offset, syncs)
    _write_synced(fd, front.ljust(SECTOR, b"\0"), 0, syncs)
    return end


def _write_synced(fd: int, data: bytes, offset: int, syncs: Syncs) -> None:
    if data:
        write_exactly(fd, memoryview(data), offset)
        syncs.sync(fd)
