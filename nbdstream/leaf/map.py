# SPDX-License-Identifier: Apache-2.0
"""A leaf as a whole: what ``nbdstream map``, ``info`` and the control socket show."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdstream.leaf.base import ColdMetadata, Leaf, LeafExtent, State, joined


def walk(leaf: Leaf) -> Iterator[LeafExtent]:
    """The longest extents that tile the whole disk (worker: reads what metadata it needs)."""

    def pieces() -> Iterator[LeafExtent]:
        offset = 0
        while offset < leaf.size:
            try:
                for extent in leaf.extents(offset, leaf.size - offset):
                    yield extent
                    offset = extent.end
            except ColdMetadata as cold:
                cold.warm()

    return joined(pieces())


@dataclass(frozen=True)
class Shares:
    """How many bytes of a disk are of each kind."""

    data: int
    zero: int
    remote: int


def shares(leaf: Leaf) -> Shares:
    """Count the whole disk (worker)."""
    count = dict.fromkeys(State, 0)
    for extent in walk(leaf):
        count[extent.state] += extent.length
    return Shares(
        data=count[State.DATA] + count[State.COMPRESSED],
        zero=count[State.ZERO],
        remote=count[State.UNALLOCATED],
    )


def image_info(leaf: Leaf) -> dict[str, object]:
    """What a leaf is, by the names of QEMU's ImageInfo (qapi/block-core.json)."""
    info: dict[str, object] = {
        "filename": leaf.path,
        "format": leaf.format,
        "virtual-size": leaf.size,
        "actual-size": _status(leaf).st_blocks * 512,
        "cluster-size": leaf.cluster_size,
    }
    if leaf.backing is not None:
        info["backing-filename"] = leaf.backing.uri
        info["backing-filename-format"] = leaf.backing.format
    if details := leaf.describe():
        info["format-specific"] = {"type": leaf.format, "data": details}
    return info


def _status(leaf: Leaf) -> os.stat_result:
    # One that was let go of is closed.
    return os.fstat(leaf.fd) if leaf.fd >= 0 else Path(leaf.path).stat()


def map_entry(extent: LeafExtent) -> dict[str, object]:
    """An extent as ``qemu-img map --output=json`` has it (QEMU's MapEntry)."""
    local = extent.state is not State.UNALLOCATED
    entry: dict[str, object] = {
        "start": extent.offset,
        "length": extent.length,
        "depth": 0 if local else 1,
        "present": local,
        "zero": extent.state is State.ZERO,
        "data": extent.state in (State.DATA, State.COMPRESSED),
        "compressed": extent.state is State.COMPRESSED,
    }
    if extent.state is State.DATA:
        entry["offset"] = extent.host
    return entry
