# SPDX-License-Identifier: Apache-2.0
"""A disk by another name, for reading only."""

import errno

from nbdstream.export import Export, Hit, StatusExtent


class ReadOnlyExport:
    """Implements `nbdstream.export.Export` over another one."""

    read_only = True

    def __init__(self, disk: Export, name: str, description: str) -> None:
        self._disk = disk
        self.name = name
        self.description = description
        self.size = disk.size
        self.preferred_block_size = disk.preferred_block_size
        self.read_nowait = disk.read_nowait
        self.read = disk.read
        self.cache = disk.cache
        self.flush = disk.flush

    def write_nowait(self, view: memoryview, offset: int) -> Hit:
        """Never done."""
        return Hit.MISS

    async def write(self, view: memoryview, offset: int, *, fua: bool) -> None:
        """Refused. Raises OSError (EPERM)."""
        raise OSError(errno.EPERM, "read-only")

    async def zero(
        self, offset: int, length: int, *, may_trim: bool, fast_only: bool, fua: bool
    ) -> None:
        """Refused. Raises OSError (EPERM)."""
        raise OSError(errno.EPERM, "read-only")

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """Refused. Raises OSError (EPERM)."""
        raise OSError(errno.EPERM, "read-only")

    async def block_status(self, offset: int, length: int, limit: int) -> list[StatusExtent]:
        """The disk's."""
        return await self._disk.block_status(offset, length, limit)
