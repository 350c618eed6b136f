# SPDX-License-Identifier: Apache-2.0
"""A disk as a row of cells, and how much of each is local, zero and remote."""

from collections.abc import Iterable

# What there is in a cell, in this order.
KINDS = ("local", "zero", "remote")
LOCAL, ZERO, REMOTE = range(3)


def weigh(extents: Iterable[tuple[int, int, int]], size: int, cells: int) -> list[list[float]]:
    """For each cell, how many bytes of it are of each kind.

    ``extents`` are (offset, length, kind), within a disk of ``size`` bytes.
    """
    weights = [[0.0] * len(KINDS) for _ in range(cells)]
    for offset, length, kind in extents:
        end = offset + length
        for cell in range(offset * cells // size, (end - 1) * cells // size + 1):
            start, stop = cell * size / cells, (cell + 1) * size / cells
            weights[cell][kind] += max(min(end, stop) - max(offset, start), 0)
    return weights
