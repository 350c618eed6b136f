# SPDX-License-Identifier: Apache-2.0
"""Block status: what a leaf and its backing together tell of a range."""

from collections.abc import Iterable

from nbdstream.backing.base import Backing
from nbdstream.disk.lookup import is_remote
from nbdstream.export import StatusExtent
from nbdstream.leaf.base import LeafExtent, State


async def block_status(
    extents: Iterable[LeafExtent], backing: Backing | None, limit: int
) -> list[StatusExtent]:
    """The status of leaf extents that follow each other; neighbours that are alike are
    joined, and at most ``limit`` are returned. Raises BackingError."""
    result: list[StatusExtent] = []
    for extent in extents:
        for status in await _status(extent, backing):
            if result and result[-1][2:] == status[2:]:
                length = result[-1].length + status.length
                result[-1] = result[-1]._replace(length=length)
            elif len(result) == limit:
                return result
            else:
                result.append(status)
    return result


async def _status(extent: LeafExtent, backing: Backing | None) -> list[StatusExtent]:
    if not is_remote(extent) or backing is None:
        zero = extent.state is State.ZERO
        return [StatusExtent(*extent[:2], local=True, zero=zero, hole=zero, depth=1)]
    result: list[StatusExtent] = []
    offset = extent.offset
    while offset < extent.end:
        for part in await backing.extents(offset, extent.end - offset):
            hole = part.zero
            depth = 0 if hole else 2
            result.append(StatusExtent(*part[:2], local=False, zero=hole, hole=hole, depth=depth))
            offset = part.end
    return result
