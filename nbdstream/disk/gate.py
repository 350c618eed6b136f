# SPDX-License-Identifier: Apache-2.0
"""The gate of a disk: whether guests may change it now.

A disk that is handed over has one owner at every instant (invariant 14). While another copy
counts, the gate is closed, and it says why.
"""

import enum
import errno
from collections.abc import Callable

import trio


class GateState(enum.Enum):
    """What the gate lets through."""

    OPEN = "open"
    FROZEN = "frozen"  # the disk was given away: no changes by guests
    STANDING_BY = "standing by"  # it was not yet taken over: no changes, and nothing is kept
    LET_GO = "let go"  # the leaf is closed, and another process may have it


class Gate:
    """Attributes:
    state: what it lets through now.
    reason: why guests may not change the disk, in one line; "" while it is open.
    on_change: called when either has changed.
    """

    def __init__(self) -> None:
        self.state = GateState.OPEN
        self.reason = ""
        self.on_change: Callable[[], None] = lambda: None
        self._hold = 0.0
        self._opened = trio.lowlevel.ParkingLot()

    @property
    def standing_by(self) -> bool:
        """Whether nothing of the backing may be kept."""
        return self.state is GateState.STANDING_BY

    @property
    def let_go(self) -> bool:
        """Whether the leaf may not be touched at all."""
        return self.state is GateState.LET_GO

    def close(self, state: GateState, reason: str, *, hold: float = 0.0) -> None:
        """Let no change through from now on. Each waits for ``hold`` seconds before it is
        refused: an `open` by then lets it happen."""
        self.state, self.reason, self._hold = state, reason, hold
        self.on_change()

    def open(self) -> None:
        """Let changes through again, those that wait included."""
        self.state, self.reason, self._hold = GateState.OPEN, "", 0.0
        self._opened.unpark_all()
        self.on_change()

    def check(self) -> None:
        """Raises OSError (EPERM) while it is closed."""
        if self.reason:
            raise OSError(errno.EPERM, self.reason)

    async def wait_for_change(self) -> None:
        """Return when a change may be tried: at once, or when the gate opens, or when the
        hold has passed (`check` then says no)."""
        with trio.move_on_after(self._hold):
            while self.reason:
                await self._opened.park()
