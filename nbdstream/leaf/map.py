# SPDX-License-Identifier: Apache-2.0
"""A leaf's map as a whole: what ``nbdstream map``, ``info`` and the control socket show."""

from collections.abc import Iterator
from dataclasses import dataclass

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
