# SPDX-License-Identifier: Apache-2.0
"""The base of backings in memory: connected, and with nothing to steer or to end."""

from nbdstream.backing.base import Backing, BackingStatistics


class PlainBacking(Backing):
    """What derives from it says how data, extents and room are got; all the rest does nothing."""

    def __init__(self, uri: str, size: int, identity: str = "") -> None:
        self.uri = uri
        self.size = size
        self.identity = identity

    def promote(self, offset: int, length: int) -> None:
        """Reads are not ordered by priority."""

    def known_zero(self, offset: int, length: int) -> bool:
        return False

    def forget(self) -> None:
        """Nothing was remembered."""

    async def pin(self) -> str:
        return self.identity

    def set_unit_least(self, length: int) -> None:
        """Room comes in pieces of one size."""

    def set_speed(self, speed: int) -> None:
        """No limit is kept to."""

    def statistics(self) -> BackingStatistics:
        return BackingStatistics(True, 0.0, 1, "", 0, 0, {}, {}, 0, 0, 0.0, 0.0)

    async def aclose(self) -> None:
        """Nothing is open."""
