# SPDX-License-Identifier: Apache-2.0
"""Metadata contexts: what block status means under each name ("Metadata querying").

A context is a name and a function from what the disk reports (`StatusExtent`) to the
32 bits of flags that go on the wire. Its place in `CONTEXTS`, from 1, is its ID.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from nbdstream.export import StatusExtent
from nbdstream.server.constants import STATE_HOLE, STATE_ZERO


def _allocation(extent: StatusExtent) -> int:
    # A hole whose contents are unknown is reported as data: clients skip holes when
    # they copy, and what a hole of the backing reads as may matter to a client.
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


class Descriptors:
    """The first ``limit`` descriptors of a NBD_REPLY_TYPE_BLOCK_STATUS chunk, collected from
    extents that follow each other; neighbours that look the same become one."""

    def __init__(self, context: MetaContext, limit: int) -> None:
        self.context = context
        self._limit = limit
        self._fields: list[int] = []  # length and flags by turns
        self._full = False

    def add(self, extents: Iterable[StatusExtent]) -> None:
        """Go on with extents that begin where the last ones ended."""
        fields, flags_of = self._fields, self.context.flags
        if self._full:
            return
        for extent in extents:
            flags = flags_of(extent)
            if fields and fields[-1] == flags:
                fields[-2] += extent.length
            elif len(fields) == 2 * self._limit:
                self._full = True
                return
            else:
                fields += (extent.length, flags)

    def encode(self) -> bytes:
        """The descriptors as bytes."""
        return struct.pack(f">{len(self._fields)}I", *self._fields)
