# SPDX-License-Identifier: Apache-2.0
"""Metadata contexts: what block status means under each name ("Metadata querying").

A context is a name and a function from what the disk reports (`StatusExtent`) to the
32 bits of flags that go on the wire. Its place in `CONTEXTS`, from 1, is its ID.
"""

from collections.abc import Callable, Iterable, Sequence
from struct import Struct
from typing import NamedTuple

from nbdstream.export import StatusExtent
from nbdstream.server.constants import STATE_HOLE, STATE_ZERO

_DESCRIPTOR = Struct(">II")  # length, flags


def _allocation(extent: StatusExtent) -> int:
    # A hole whose contents are unknown is reported as data: clients skip holes when
    # they copy, and what a hole of the backing reads as may matter to somebody.
    if not extent.zero:
        return 0
    return STATE_ZERO | STATE_HOLE if extent.hole else STATE_ZERO


def _depth(extent: StatusExtent) -> int:
    return extent.depth


def _local(extent: StatusExtent) -> int:
    return int(extent.local)


class MetaContext(NamedTuple):
    """``flags`` gives the status flags of an extent under this context."""

    id: int
    name: str
    flags: Callable[[StatusExtent], int]

    @property
    def namespace(self) -> str:
        """With the colon."""
        return self.name[: self.name.index(":") + 1]


CONTEXTS = (
    MetaContext(1, "base:allocation", _allocation),
    # QEMU's docs/interop/nbd.rst: 0 unallocated, 1 the top image, 2 the next one down.
    MetaContext(2, "qemu:allocation-depth", _depth),
    # Ours: bit 0 is set where the data is in the leaf.
    MetaContext(3, "nbdstream:local", _local),
)


def list_matches(queries: Sequence[str]) -> list[MetaContext]:
    """The contexts that match NBD_OPT_LIST_META_CONTEXT: a name, or a namespace as
    wildcard; no query at all matches every context."""
    wanted = set(queries)
    return [
        context
        for context in CONTEXTS
        if not wanted or context.name in wanted or context.namespace in wanted
    ]


def set_matches(queries: Sequence[str]) -> list[MetaContext]:
    """The contexts that match NBD_OPT_SET_META_CONTEXT: names only."""
    wanted = set(queries)
    return [context for context in CONTEXTS if context.name in wanted]


def descriptors(context: MetaContext, extents: Iterable[StatusExtent], limit: int) -> bytes:
    """The first ``limit`` extents as the descriptors of a NBD_REPLY_TYPE_BLOCK_STATUS chunk.

    Neighbours that look the same under this context become one.
    """
    merged: list[tuple[int, int]] = []
    for extent in extents:
        flags = context.flags(extent)
        if merged and merged[-1][1] == flags:
            merged[-1] = (merged[-1][0] + extent.length, flags)
        elif len(merged) == limit:
            break
        else:
            merged.append((extent.length, flags))
    return b"".join(_DESCRIPTOR.pack(length, flags) for length, flags in merged)
