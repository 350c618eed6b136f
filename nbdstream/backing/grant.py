# SPDX-License-Identifier: Apache-2.0
"""Classes of reads, and room in the window as a value.

Background work asks the scheduler for room and gets a `Grant`. The grant names the class
that holds it, so that no other class can spend it. It ends in exactly one of two ways: a
read uses it, or its holder gives it back because nothing was left to fetch.
"""

import enum
from collections.abc import Callable


class Priority(enum.IntEnum):
    """Why something is read; a smaller value goes first."""

    DEMAND = 0  # a guest waits for it
    READAHEAD = 1  # a guest that reads sequentially will want it next
    PREFETCH = 2  # named by a boot profile, or asked for with NBD_CMD_CACHE
    STREAM = 3  # the stream job: everything else


class Grant:
    """Room for one background read. As a context manager it is given back at the end of the
    block, unless a read has used it.

    Attributes:
        length: bytes that the read may ask for at the most. A holder that needs a whole
            cluster may ask for that, even if it is longer.
        priority: the class that holds it.
    """

    def __init__(
        self, length: int, priority: Priority, ended: Callable[["Grant"], None] | None = None
    ) -> None:
        """``ended`` is called once, when the grant is used or given back."""
        self.length = length
        self.priority = priority
        self._ended = ended

    def use(self, priority: Priority) -> None:
        """A read of this class takes the room.

        Raises:
            ValueError: another class holds it.
        """
        if priority is not self.priority:
            raise ValueError(f"room for {self.priority.name} cannot carry {priority.name}")
        self.give_back()

    def take(self) -> "Grant":
        """The same room in other hands; this grant has ended then."""
        ended, self._ended = self._ended, None
        return Grant(self.length, self.priority, ended)

    def give_back(self) -> None:
        """The holder does not need the room. Does nothing if the grant has ended."""
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(self)

    def __enter__(self) -> "Grant":
        return self

    def __exit__(self, *error: object) -> None:
        self.give_back()
