# SPDX-License-Identifier: Apache-2.0
"""What a front end (the NBD server, the nbdkit plugin) asks of a disk.

The ``…_nowait`` methods are the hot path: plain calls that neither await nor block, to
be tried first for every request. They answer `MISS` when they cannot finish at once
and have then changed nothing. The async methods always finish, and may be called
for any request at any time, in any number at once.

Ranges are checked by the server: non-empty, within ``size``, of any alignment.
Errors are raised as OSError, whose errno the server turns into the NBD error, or as
NbdstreamError (EIO).
"""

import enum
from typing import NamedTuple, Protocol


class Hit(enum.IntEnum):
    """What became of a ``…_nowait`` call."""

    MISS = 0  # not done; call the async method
    DONE = 1  # done; for a read: the view is filled
    ZERO = 2  # read only: the whole range reads as zeroes; the view is untouched


class StatusExtent(NamedTuple):
    """Block status of a range, from which each metadata context follows.

    ``local``: present in the leaf. ``zero``: reads as zeroes. ``hole``: takes no space
    where it is (so a client that copies may skip it); a hole that is local is zero too.
    ``depth``: as qemu:allocation-depth: 0 allocated nowhere, 1 leaf, 2 backing.
    """

    offset: int
    length: int
    local: bool
    zero: bool
    hole: bool
    depth: int


class Export(Protocol):
    """A disk that can be served."""

    name: str
    description: str
    size: int
    read_only: bool
    # Block-size information for clients (NBD_INFO_BLOCK_SIZE): powers of two, bytes.
    preferred_block_size: int

    def read_nowait(self, view: memoryview, offset: int) -> Hit: ...

    def write_nowait(self, view: memoryview, offset: int) -> Hit: ...

    async def read(self, view: memoryview, offset: int) -> list[tuple[int, int]]:
        """Fill the view; return the sorted (offset, length) ranges known to be zeroes."""
        ...

    async def write(self, view: memoryview, offset: int, *, fua: bool) -> None:
        """Store the data; with ``fua``, durably (invariant 2)."""
        ...

    async def zero(
        self, offset: int, length: int, *, may_trim: bool, fast_only: bool, fua: bool
    ) -> None:
        """NBD_CMD_WRITE_ZEROES. ``fast_only``: raise OSError(ENOTSUP), nothing changed,
        where it would not be faster than writing (NBD_CMD_FLAG_FAST_ZERO)."""
        ...

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """NBD_CMD_TRIM: whole blocks in the range read as zeroes from now on."""
        ...

    async def flush(self) -> None:
        """Everything completed before this call is durable when it returns."""
        ...

    async def cache(self, offset: int, length: int) -> None:
        """NBD_CMD_CACHE: make the range local; returns when it is."""
        ...

    async def block_status(self, offset: int, length: int, limit: int) -> list[StatusExtent]:
        """At least one extent, from ``offset`` on, no gaps, at most ``limit`` of them;
        may cover less than asked, never more."""
        ...
