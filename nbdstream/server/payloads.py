# SPDX-License-Identifier: Apache-2.0
"""How much memory the waiting requests of all clients together may hold.

What must hold:

- All clients together never hold more than `MAX_SHARED` bytes and `RESERVE` for each of them.
- A client that holds no more than its `RESERVE` never waits for others. So clients whose
  requests cannot end (the backing is away) do not stop a guest with requests of usual size.
"""

import trio

# What each client may hold in any case: one request of the longest kind that is tried at once.
RESERVE = 1 << 20
# What all clients together may hold beyond that.
MAX_SHARED = 256 << 20


class PayloadRoom:
    """The memory that the clients of one server share. `freed` is unparked when there is more."""

    def __init__(self, limit: int = MAX_SHARED) -> None:
        self.left = limit
        self.freed = trio.lowlevel.ParkingLot()


class Share:
    """What one client holds: ``held`` bytes."""

    def __init__(self, room: PayloadRoom) -> None:
        self._room = room
        self.held = 0

    def fits(self, length: int) -> bool:
        """Whether `take` would succeed."""
        return self._beyond(length) <= self._room.left

    def take(self, length: int) -> bool:
        """Hold ``length`` bytes more; returns False, and takes none, if there is no room."""
        if not self.fits(length):
            return False
        self._room.left -= self._beyond(length)
        self.held += length
        return True

    def give_back(self, length: int) -> None:
        """Hold ``length`` bytes less."""
        self.held -= length
        freed = self._beyond(length)
        if freed:
            self._room.left += freed
            self._room.freed.unpark_all()

    def close(self) -> None:
        """Hold nothing any more."""
        self.give_back(self.held)

    def _beyond(self, length: int) -> int:
        """How much of the next ``length`` bytes is beyond the reserve."""
        return max(0, self.held + length - RESERVE) - max(0, self.held - RESERVE)
