# SPDX-License-Identifier: Apache-2.0
"""A backing below a larger leaf: what lies past its end reads as zeroes, as in QEMU."""

from nbdstream.backing.base import Backing, Grant, Priority
from nbdstream.backing.wrapped import WrappedBacking
from nbdstream.extents import BackingExtent


class PaddedBacking(WrappedBacking):
    """``backing`` followed by zeroes, up to ``size`` bytes. Closes ``backing`` when closed."""

    def __init__(self, backing: Backing, size: int) -> None:
        super().__init__(backing)
        self.size = size

    async def read(
        self, view: memoryview, offset: int, priority: Priority, grant: Grant | None = None
    ) -> None:
        """See `Backing.read`."""
        inside = self._inside(offset, len(view))
        if inside:
            await self._backing.read(view[:inside], offset, priority, grant)
        elif grant is not None:
            grant.give_back()
        view[inside:] = bytes(len(view) - inside)

    async def bring(self, offset: int, length: int) -> bool:
        """See `Backing.bring`."""
        inside = self._inside(offset, length)
        return inside > 0 and await self._backing.bring(offset, inside)

    def promote(self, offset: int, length: int) -> None:
        """See `Backing.promote`."""
        if inside := self._inside(offset, length):
            self._backing.promote(offset, inside)

    def known_zero(self, offset: int, length: int) -> bool:
        """See `Backing.known_zero`."""
        inside = self._inside(offset, length)
        return not inside or self._backing.known_zero(offset, inside)

    async def extents(self, offset: int, length: int) -> list[BackingExtent]:
        """See `Backing.extents`."""
        if inside := self._inside(offset, length):
            return await self._backing.extents(offset, inside)
        return [BackingExtent(offset, length, zero=True)]

    def _inside(self, offset: int, length: int) -> int:
        """How many bytes of a range the backing itself has."""
        return max(0, min(length, self._backing.size - offset))
