# SPDX-License-Identifier: Apache-2.0
"""What the control room asks of a stream job and of a disk.

`nbdstream.streamer.StreamJob` and `nbdstream.disk.StreamedDisk` are what it gets. All
attributes are read, and all methods called, in the event loop.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from nbdstream.backing.base import Backing
from nbdstream.disk import DetectZeroes
from nbdstream.leaf.base import Leaf, LeafExtent
from nbdstream.streamer.deadline import Deadline
from nbdstream.streamer.job import JobStatus

EventListener = Callable[[str, Mapping[str, object]], None]


class ControlledJob(Protocol):
    """The one stream job of a disk. NULL is the status of a job that isn't there."""

    id: str
    io_status: str
    error: str

    @property
    def status(self) -> JobStatus: ...

    @property
    def length(self) -> int: ...

    @property
    def offset(self) -> int: ...

    @property
    def speed(self) -> int: ...

    @property
    def remaining(self) -> int: ...

    @property
    def rate(self) -> float: ...

    @property
    def eta(self) -> float | None: ...

    @property
    def deadline(self) -> Deadline: ...

    def on_event(self, listener: EventListener) -> None: ...

    def start(self, *, paused: bool = False) -> None:
        """Raises ValueError where there is nothing to start."""
        ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def set_speed(self, speed: int) -> None: ...

    def cancel(self) -> None: ...

    async def step(self, offset: int, length: int) -> int:
        """Make one piece local; how many bytes were not before. Raises BackingError, OSError."""
        ...


class ControlledDisk(Protocol):
    """A disk over a leaf and, until everything is local, a backing."""

    size: int
    read_only: bool
    copy_on_read: bool

    @property
    def leaf(self) -> Leaf: ...

    @property
    def backing(self) -> Backing | None: ...

    @property
    def detect_zeroes(self) -> DetectZeroes: ...

    @property
    def frozen(self) -> str:
        """Why guests may not change anything now, or ""."""
        ...

    def statistics(self) -> Mapping[str, int]:
        """Counters since the disk was opened; bytes where the name says so."""
        ...

    async def next_unallocated(self, offset: int) -> LeafExtent | None:
        """The first unallocated extent at or after ``offset``."""
        ...

    async def leaf_extents(self, offset: int, length: int, limit: int) -> list[LeafExtent]:
        """At least one and at most ``limit`` extents from ``offset`` on; may cover less than
        asked. Asks the leaf alone, so that a lost backing is no obstacle."""
        ...
