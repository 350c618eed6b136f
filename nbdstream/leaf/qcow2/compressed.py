# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters: unpacked for reading, never made.

Specification: QEMU's docs/interop/qcow2, "Compressed Clusters Descriptor". zlib means a
raw deflate stream; zstd a frame, which is followed by whatever fills its last sector.
"""

import errno
import os
import zlib

import zstandard

from nbdstream.leaf.qcow2.layout import Geometry

# QEMU compresses with a window of 4 KiB; larger ones, of other writers, unpack as well.
DEFLATE_WINDOW_BITS = -15


def unpack(fd: int, geometry: Geometry, packed: int, compression: str) -> bytes:
    """Worker: the whole cluster that a descriptor leads to.

    Raises OSError: EIO if what is there does not unpack to a cluster.
    """
    offset, length = geometry.packed_range(packed)
    data = os.pread(fd, length, offset)
    try:
        content = _UNPACKERS[compression](data, geometry.cluster_size)
    except (zlib.error, zstandard.ZstdError) as error:
        raise OSError(errno.EIO, f"compressed cluster at {offset:#x}: {error}") from error
    if len(content) != geometry.cluster_size:
        raise OSError(errno.EIO, f"compressed cluster at {offset:#x} is incomplete")
    return content


def _unpack_zlib(data: bytes, size: int) -> bytes:
    return zlib.decompressobj(DEFLATE_WINDOW_BITS).decompress(data, size)


def _unpack_zstd(data: bytes, size: int) -> bytes:
    # Output is limited by reading no more than a cluster, whatever the frame claims.
    with zstandard.ZstdDecompressor().stream_reader(data) as reader:
        content: bytes = reader.read(size)
        return content


_UNPACKERS = {"zlib": _unpack_zlib, "zstd": _unpack_zstd}
