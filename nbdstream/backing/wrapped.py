# SPDX-License-Identifier: Apache-2.0
"""A backing around another one. It passes on whatever a kind of wrapper does not change."""

from nbdstream.backing.base import Backing, BackingStatistics, Grant, Priority
from nbdstream.extents import BackingExtent


class WrappedBacking(Backing):
    """``backing`` as it is. Closes ``backing`` when closed."""

    def __init__(self, backing: Backing) -> None:
        self.uri = backing.uri
        self.size = backing.size
        self.known_identity = backing.known_identity
        self.timeout = backing.timeout
        self.local = backing.local
        self._backing = backing

    async def read(
        self, view: memoryview, offset: int, priority: Priority, grant: Grant | None = None
    ) -> None:
        """See `Backing.read`."""
        await self._backing.read(view, offset, priority, grant)

    async def bring(self, offset: int, length: int) -> bool:
        """See `Backing.bring`."""
        return await self._backing.bring(offset, length)

    def promote(self, offset: int, length: int) -> None:
        """See `Backing.promote`."""
        self._backing.promote(offset, length)

    def known_zero(self, offset: int, length: int) -> bool:
        """See `Backing.known_zero`."""
        return self._backing.known_zero(offset, length)

    async def extents(self, offset: int, length: int) -> list[BackingExtent]:
        """See `Backing.extents`."""
        return await self._backing.extents(offset, length)

    def forget(self) -> None:
        """See `Backing.forget`."""
        self._backing.forget()

    async def pin(self) -> str:
        """See `Backing.pin`."""
        return await self._backing.pin()

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
