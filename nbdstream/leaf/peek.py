# SPDX-License-Identifier: Apache-2.0
"""What an image records of its backing, read without a lock: a look that gets in no one's way.

Opening an image, even for reading, takes locks that would make another process fail which opens
it for writing at that moment.
"""

import os

from nbdstream.leaf.base import BackingReference
from nbdstream.leaf.probe import has_map, map_path, probe_format
from nbdstream.leaf.qcow2.header_file import read_header as read_qcow2_header
from nbdstream.leaf.qed.header import read_backing as read_qed_backing
from nbdstream.leaf.qed.header import read_header as read_qed_header
from nbdstream.leaf.raw.map import AllocationMap


def backing_of(path: str) -> BackingReference | None:
    """The backing that an image still needs, None if it needs none (worker).

    Raises:
        LeafError: it cannot be told: damaged, of an unknown format, or just being changed.
        OSError: it cannot be read.
    """
    image_format = probe_format(path)
    if image_format == "raw":
        if not has_map(path):
            return None
        allocation = AllocationMap(map_path(path), read_only=True)
        allocation.close()
        return allocation.header.backing
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if image_format == "qcow2":
            return read_qcow2_header(fd, path).backing
        return read_qed_backing(fd, read_qed_header(fd))
    finally:
        os.close(fd)
