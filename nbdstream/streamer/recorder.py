# SPDX-License-Identifier: Apache-2.0
"""Records the boot profile of a leaf while a guest boots from it.

The disk tells of each read, hits included, by one plain call that may come from any
thread (`Recorder.touched`); it only remembers units not seen before. All else is the
task's (`Recorder.run`), which looks once a second:

- A boot is over when the guest has touched nothing new for `QUIET_TIME`, when
  `RECORD_TIME` has passed, or when it has touched `UNITS_MOST` or `BYTES_MOST`. Then the
  profile is written beside the leaf, and the disk is left in peace.
- Less than `BYTES_LEAST` is not a boot but a look at the disk (``nbdinfo``, a partition
  table being read): that is forgotten, and the recorder waits on.
- A client that reads most of it in order makes a copy. That says nothing about a boot:
  it is forgotten likewise.

When the server is stopped before the end, the profile says that it is not complete. The
next boot then records again; a complete one is never overwritten.
"""

import logging
from itertools import pairwise
from pathlib import Path

import trio

from nbdstream.disk import StreamedDisk
from nbdstream.errors import ProfileError
from nbdstream.streamer.profile import (
    RANGES_MOST,
    UNIT_LEAST,
    UNIT_MOST,
    Profile,
    Range,
    joined,
    path_beside,
    read_profile,
    write_profile,
)
from nbdstream.streamer.profile_store import ProfileStore
from nbdstream.tasks import in_worker

log = logging.getLogger(__name__)

LOOK_INTERVAL = 1.0
QUIET_TIME = 30.0
RECORD_TIME = 600.0
BYTES_MOST = 2 << 30
UNITS_MOST = RANGES_MOST
BYTES_LEAST = 1 << 20
# A copy: of more than this part of the image, this part of the units came in order.
COPY_PART = 0.5
COPY_IN_ORDER = 0.95


async def record_boot(disk: StreamedDisk, store: ProfileStore | None = None) -> None:
    """Record a profile beside the disk's leaf, if it can have one and lacks it, and keep it in
    the store, if there is one. A task; when cancelled, what has been recorded is written."""
    recorder = await in_worker(_recorder_for, disk, store)
    if recorder is not None:
        await recorder.run()


def _recorder_for(disk: StreamedDisk, store: ProfileStore | None) -> "Recorder | None":
    """Worker: look at what there is."""
    if disk.backing is None or disk.read_only:
        return None
    path = path_beside(disk.leaf.path)
    old: Profile | None = None
    try:
        old = read_profile(path)
    except FileNotFoundError:
        pass
    except (ProfileError, OSError) as error:
        log.warning("no boot profile is recorded: %s", error)
        return None
    if old is not None and old.complete:
        return None
    return Recorder(disk, path, store, at_least=old.bytes if old is not None else 0)


class Recorder:
    """Records over one disk, into one file, once."""

    def __init__(
        self,
        disk: StreamedDisk,
        path: str,
        store: ProfileStore | None = None,
        *,
        at_least: int = 0,
    ) -> None:
        """``path``: the profile's file; one that is not complete must have more bytes than
        ``at_least`` to be written. ``store``: where it is kept besides."""
        reference = disk.leaf.backing
        self._disk = disk
        self._path = path
        self._store = store
        self._at_least = max(at_least, BYTES_LEAST)
        self._identity = reference.identity if reference is not None else ""
        self._size = (reference.size if reference is not None else 0) or disk.size
        self._unit = min(max(disk.leaf.cluster_size, UNIT_LEAST), UNIT_MOST)
        self._seconds = 0.0
        # A dict keeps the order, and no thread can see it half changed.
        self._units: dict[int, None] = {}
        self._last = -1

    def touched(self, offset: int, length: int) -> None:
        """A guest reads this range. Any thread; as short as possible."""
        first = offset // self._unit
        last = (offset + length - 1) // self._unit
        if first == last == self._last:
            return
        self._last = last
        for unit in range(first, last + 1):
            if unit not in self._units:
                self._units[unit] = None

    async def run(self) -> None:
        """The recorder's task. Cancelled: writes what there is, if it is worth it."""
        self._disk.on_read = self.touched
        complete = False
        try:
            while not complete:
                await self._until_quiet()
                complete = self._is_boot()
                if not complete:
                    self._units.clear()
                    self._last = -1
        finally:
            self._disk.on_read = None
            if complete or (self._is_boot() and self._bytes() > self._at_least):
                with trio.CancelScope(shield=True):
                    await in_worker(self._write, self._profile(complete))

    async def _until_quiet(self) -> None:
        """Wait until a client reads, and then until that is over."""
        while not self._units:  # noqa: ASYNC110 - a thread that reads can set no event
            await trio.sleep(LOOK_INTERVAL)
        start = changed = trio.current_time()
        count = 0
        while len(self._units) < UNITS_MOST and self._bytes() < BYTES_MOST:
            now = trio.current_time()
            if len(self._units) != count:
                count, changed = len(self._units), now
                self._seconds = now - start
            if now - changed >= QUIET_TIME or now - start >= RECORD_TIME:
                return
            await trio.sleep(LOOK_INTERVAL)

    def _bytes(self) -> int:
        return len(self._units) * self._unit

    def _is_boot(self) -> bool:
        """Whether what was recorded is neither just a look nor a copy."""
        units = list(self._units)
        if self._bytes() < BYTES_LEAST:
            return False
        in_order = sum(second == first + 1 for first, second in pairwise(units))
        is_copy = self._bytes() > COPY_PART * self._size and in_order > COPY_IN_ORDER * len(units)
        return not is_copy

    def _profile(self, complete: bool) -> Profile:
        # A disk may be larger than its backing: what is beyond needs no fetching.
        starts = (unit * self._unit for unit in list(self._units))
        ranges = (
            Range(start, min(self._unit, self._size - start))
            for start in starts
            if start < self._size
        )
        return Profile(
            backing_size=self._size,
            backing_identity=self._identity,
            unit=self._unit,
            seconds=self._seconds,
            complete=complete,
            ranges=tuple(joined(ranges))[:RANGES_MOST],
        )

    def _write(self, profile: Profile) -> None:
        """Worker."""
        try:
            write_profile(self._path, profile)
        except OSError as error:
            log.warning("cannot keep the boot profile %s: %s", self._path, error)
        else:
            log.info("recorded the boot profile %s", Path(self._path))
        if self._store is not None:
            self._store.keep(profile)
