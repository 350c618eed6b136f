# SPDX-License-Identifier: Apache-2.0
"""A backing below a larger leaf: what lies past its end reads as zeroes, as in QEMU."""

from nbdstream.backing.base import Backing, BackingStatistics, Grant, Priority
from nbdstream.extents import BackingExtent


class PaddedBacking(Backing):
    """``backing`` followed by zeroes, up to ``size`` bytes. Closes ``backing`` when closed."""

    def __init__(self, backing: Backing, size: int) -> None:
        self.uri = backing.uri
        self.size = size
        self.known_identity = backing.known_identity
        self.timeout = backing.timeout
        self.local = backing.local
        self._backing = backing

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

    def forget(self) -> None:
        """See `Backing.forget`."""
        self._backing.forget()

    async def pin(self) -> str:
        """See `Backing.pin`."""
        return await self._backing.pin()

    async def extents(self, offset: int, length: int) -> list[BackingExtent]:
        """See `Backing.extents`."""
        if inside := self._inside(offset, length):
            return await self._backing.extents(offset, inside)
        return [BackingExtent(offset, length, zero=True)]

    async def wait_for_room(self, priority: Priority) -> Grant:
        """See `Backing.wait_for_room`."""
        return await self._backing.wait_for_room(priority)

    def set_unit_least(self, length: int) -> None:
        """See `Backing.set_unit_least`."""
        self._backing.set_unit_least(length)

    def set_speed(self, speed: int) -> None:
        """See `Backing.set_speed`."""
        self._backing.set_speed(speed)

    def set_timeout(self, timeout: float | None) -> None:
        """See `Backing.set_timeout`."""
        self.timeout = timeout
        self._backing.set_timeout(timeout)

    def statistics(self) -> BackingStatistics:
        """See `Backing.statistics`."""
        return self._backing.statistics()

    async def aclose(self) -> None:
        """See `Backing.aclose`."""
        await self._backing.aclose()

    def _inside(self, offset: int, length: int) -> int:
        """How many bytes of a range the backing itself has."""
        return max(0, min(length, self._backing.size - offset))
