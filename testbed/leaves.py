# SPDX-License-Identifier: Apache-2.0
"""Driving a leaf without an event loop, by the rules that the disk keeps to."""

import os
from collections.abc import Callable
from typing import TypeVar

from nbdstream.leaf.base import ColdMetadata, FlushNeeded, Leaf, flushing
from nbdstream.leaf.durability import DurableLeaf

T = TypeVar("T")


def drive(leaf: Leaf, call: Callable[[], T]) -> T:
    """Make a call as the disk does: warm what is cold, flush where needed, and try again."""
    while True:
        try:
            return call()
        except ColdMetadata as cold:
            cold.warm()
        except FlushNeeded:
            flush(leaf)


def flush(leaf: Leaf) -> None:
    """One whole flush. Raises what the leaf raises."""
    with flushing(leaf) as rest:
        rest()


def abandon(leaf: Leaf) -> None:
    """What a killed process does to a leaf: its descriptors are closed, and nothing else."""
    assert isinstance(leaf, DurableLeaf)
    leaf._redo.close()
    for fd in leaf._files():
        os.close(fd)
    leaf.fd = -1
