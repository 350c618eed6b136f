# SPDX-License-Identifier: Apache-2.0
"""Prefetch: makes what a boot profile names local first, in its order, ahead of the guest.

It works whether or not a stream job runs: it is one more reader with copy on read, at a
priority between a guest's own reads and the job's. What is local is passed over; what
the guest asks for meanwhile is fetched once, by the one that comes first.

A boot jumps about, so a profile names many small ranges. Those that lie side by side and
are wanted soon after one another are fetched as one (`merged`): each request that is
saved is a turn on the link saved.
"""

import logging
from collections.abc import Iterable, Iterator

import trio

from nbdstream.backing.base import Priority
from nbdstream.disk import StreamedDisk, Unit
from nbdstream.errors import TROUBLE, BackingError, BackingMismatchError
from nbdstream.leaf.base import BackingReference
from nbdstream.streamer.profile import Profile, Range

log = logging.getLogger(__name__)

# How much further down the profile a neighbour may stand to be fetched along, and up to
# what size: what comes before it in the profile waits for it no longer than these take.
LOOK_AHEAD = 4 << 20
MERGE_MOST = 1 << 20
RETRY_INTERVAL = 1.0


class Prefetcher:
    """Fetches one profile over one disk.

    Attributes:
        length: bytes that the profile names within the disk.
        done: how many of these have been dealt with.
    """

    def __init__(self, disk: StreamedDisk, profile: Profile) -> None:
        self._disk = disk
        self._ranges = list(merged(clipped(profile.ranges, disk.size)))
        self._scope = trio.CancelScope()
        self.length = sum(length for _, length in self._ranges)
        self.done = 0
        backing = disk.leaf.backing
        if backing is not None and not _is_of(profile, backing):
            log.warning(
                "the boot profile is of another backing: what it names may not be what a boot reads"
            )

    async def run(self) -> None:
        """The prefetcher's task: ends when all has been fetched, or cannot be any more."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                for offset, length in self._ranges:
                    await self._send(nursery, offset, offset + length)

    async def _send(self, nursery: trio.Nursery, offset: int, end: int) -> None:
        """Have fetched what a range lacks, as there is room for it."""
        try:
            while unit := await self._disk.next_unit(offset, end, Priority.PREFETCH):
                self.done += unit.offset - offset
                nursery.start_soon(self._settle, unit)
                offset = unit.end
        except TROUBLE as error:
            self._give_up(error)
        self.done += end - offset

    async def _settle(self, unit: Unit) -> None:
        """Wait until a piece is local, through lost backings; other trouble ends all
        prefetching."""
        work = unit.wait()
        while True:
            try:
                await work
            except BackingMismatchError as error:
                self._give_up(error)
            except BackingError as error:
                # It has waited for the backing timeout already.
                log.info("prefetch: %s; retrying", error)
                await trio.sleep(RETRY_INTERVAL)
                work = self._again(unit)
                continue
            except TROUBLE as error:
                self._give_up(error)
            self.done += unit.length
            return

    async def _again(self, unit: Unit) -> None:
        await self._disk.populate(unit.offset, unit.length, Priority.PREFETCH)

    def _give_up(self, error: Exception) -> None:
        if not self._scope.cancel_called:
            log.warning("no more of the boot profile is fetched: %s", error)
            self._scope.cancel()


def _is_of(profile: Profile, backing: BackingReference) -> bool:
    """Whether it may have been recorded over this backing."""
    pairs = (
        (profile.backing_size, backing.size),
        (profile.backing_identity, backing.identity),
    )
    return all(not ours or not theirs or ours == theirs for ours, theirs in pairs)


def clipped(ranges: Iterable[Range], size: int) -> Iterator[Range]:
    """The parts of the ranges that a disk of ``size`` bytes has."""
    for offset, length in ranges:
        if offset < size:
            yield Range(offset, min(length, size - offset))


def merged(ranges: Iterable[Range]) -> Iterator[Range]:
    """The same bytes, each range together with its neighbours that stand no more than
    `LOOK_AHEAD` bytes further down, up to `MERGE_MOST`.

    ``ranges`` are disjoint.
    """
    upcoming = iter(ranges)
    ahead: dict[int, Range] = {}  # by offset, in order
    by_end: dict[int, Range] = {}
    ahead_bytes = 0
    while True:
        while ahead_bytes < LOOK_AHEAD and (found := next(upcoming, None)) is not None:
            ahead[found.offset] = by_end[found.end] = found
            ahead_bytes += found.length
        if not ahead:
            return
        whole = ahead.pop(next(iter(ahead)))
        del by_end[whole.end]
        ahead_bytes -= whole.length
        while neighbour := ahead.get(whole.end) or by_end.get(whole.offset):
            if whole.length + neighbour.length > MERGE_MOST:
                break
            del ahead[neighbour.offset], by_end[neighbour.end]
            ahead_bytes -= neighbour.length
            offset = min(whole.offset, neighbour.offset)
            whole = Range(offset, whole.length + neighbour.length)
        yield whole
