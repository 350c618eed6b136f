# SPDX-License-Identifier: Apache-2.0
"""What a slice of an L2 table says of a guest range, as extents.

Runs of clusters that are alike, the common case, are found by comparing words; only
clusters whose blocks differ among themselves are taken apart.
"""

from array import array
from collections.abc import Iterator
from typing import NamedTuple

from nbdstream.leaf.base import LeafExtent, State
from nbdstream.leaf.qcow2.layout import LOW_32, Cluster, Geometry, is_run


class _Piece(NamedTuple):
    """A part of the range: bytes, state, and place in the file (or descriptor)."""

    length: int
    state: State
    host: int


def slice_extents(
    geometry: Geometry, entries: "array[int]", offset: int, end: int, hole: State
) -> Iterator[LeafExtent]:
    """The extents of a guest range within one slice, neighbours joined; ``hole`` is the state
    of what is unallocated."""
    start, state, host = offset, hole, -1
    while offset < end:
        for piece in _pieces(geometry, entries, offset, end, hole):
            if piece.state is not state or not _joins(piece, host + offset - start):
                if offset > start:
                    yield LeafExtent(start, offset - start, state, host)
                start, state, host = offset, piece.state, piece.host
            offset += piece.length
    yield LeafExtent(start, end - start, state, host)


def _joins(piece: _Piece, expected: int) -> bool:
    """Whether a piece continues a run of its state."""
    if piece.state is State.DATA:
        return piece.host == expected
    return piece.state is not State.COMPRESSED


def _pieces(
    geometry: Geometry, entries: "array[int]", offset: int, end: int, hole: State
) -> list[_Piece]:
    """The parts of one cluster from ``offset`` on, or one part that spans several clusters."""
    index = ((offset >> geometry.cluster_bits) & (geometry.slice_entries - 1)) * geometry.words
    inside = offset & (geometry.cluster_size - 1)
    bitmap = entries[index + 1] if geometry.extended else 0
    cluster = geometry.decode(entries[index], bitmap)
    if cluster.packed >= 0:
        length = min(end - offset, geometry.cluster_size - inside)
        return [_Piece(length, State.COMPRESSED, cluster.packed)]
    if cluster.data == geometry.full or (not cluster.data and cluster.zero in (0, geometry.full)):
        limit = index + geometry.clusters(inside + end - offset) * geometry.words
        step = geometry.cluster_size if cluster.host else 0
        run = _run_length(geometry, entries[index:limit], step)
        length = min(end - offset, run - inside)
        if cluster.data:
            return [_Piece(length, State.DATA, cluster.host + inside)]
        return [_Piece(length, State.ZERO if cluster.zero else hole, -1)]
    stop = min(inside + end - offset, geometry.cluster_size)
    return _block_pieces(geometry, cluster, inside, stop, hole)


def _run_length(geometry: Geometry, entries: "array[int]", step: int) -> int:
    """Bytes of the guest's in the run that these entries begin with: clusters of one kind,
    each at ``step`` behind its predecessor."""
    words = geometry.words
    firsts = entries[::words]
    bitmaps = entries[1::2] if words == 2 else firsts[:0]
    count = 1
    if is_run(firsts, step) and (not bitmaps or is_run(bitmaps, 0)):
        count = len(firsts)
    else:
        entry = firsts[0] + step
        while firsts[count] == entry and (not bitmaps or bitmaps[count] == bitmaps[0]):
            count += 1
            entry += step
    return count << geometry.cluster_bits


def _block_pieces(
    geometry: Geometry, cluster: Cluster, inside: int, stop: int, hole: State
) -> list[_Piece]:
    """The parts of a cluster whose blocks differ, between two offsets inside of it."""
    block_size = geometry.block_size
    neither = ~(cluster.data | cluster.zero) & LOW_32
    pieces = []
    while inside < stop:
        block = inside // block_size
        if cluster.data >> block & 1:
            state, run, host = State.DATA, cluster.data >> block, cluster.host + inside
        elif cluster.zero >> block & 1:
            state, run, host = State.ZERO, cluster.zero >> block, -1
        else:
            state, run, host = hole, neither >> block, -1
        # The number of ones at the low end of the run.
        blocks = (~run & (run + 1)).bit_length() - 1
        after = min(stop, (block + blocks) * block_size)
        pieces.append(_Piece(after - inside, state, host))
        inside = after
    return pieces
