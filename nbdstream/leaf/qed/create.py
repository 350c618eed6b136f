# SPDX-License-Identifier: Apache-2.0
"""Make an empty QED image: the header, and an L1 table without entries."""

import os
from dataclasses import replace

from nbdstream.errors import UsageError
from nbdstream.extents import align_down, align_up
from nbdstream.leaf.base import BackingReference
from nbdstream.leaf.durability import Syncs
from nbdstream.leaf.qed.header import MAX_TABLE_SIZE, Header, install_backing, is_cluster_size

DEFAULT_CLUSTER_SIZE = 65536  # QEMU's defaults
DEFAULT_TABLE_SIZE = 4


def create(
    path: str, *, size: int, cluster_size: int | None, backing: BackingReference | None
) -> None:
    """Make a new image, durably, with tables of QEMU's default size unless the disk needs more.

    Raises UsageError, LeafError (the backing's name does not fit in), OSError.
    """
    cluster_size = cluster_size or DEFAULT_CLUSTER_SIZE
    if not is_cluster_size(cluster_size):
        raise UsageError(
            f"cluster size {cluster_size}: a QED image needs a power of two from 4k to 64M"
        )
    size = align_up(size, 512)
    header = Header(
        cluster_size=cluster_size,
        table_size=DEFAULT_TABLE_SIZE,
        header_size=1,
        features=0,
        compat_features=0,
        autoclear_features=0,
        l1_table_offset=cluster_size,
        image_size=size,
    )
    while size > header.max_image_size and header.table_size < MAX_TABLE_SIZE:
        header = replace(header, table_size=header.table_size * 2)
    if size > header.max_image_size:
        raise UsageError(
            f"a QED disk of {size} bytes: with clusters of {cluster_size} at most"
            f" {align_down(header.max_image_size, 512)}"
        )
    syncs = Syncs(path)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(fd, align_up(header.header_bytes + header.table_bytes, cluster_size))
        header.write(fd)
        if backing is not None:
            install_backing(fd, header, backing, syncs)
        syncs.sync(fd)
    finally:
        os.close(fd)
