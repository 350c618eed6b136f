# SPDX-License-Identifier: Apache-2.0
"""Fetches: how unallocated clusters come from the backing, each one once.

A fetch claims whole clusters while it is under way. A request that misses one of them
meanwhile joins the fetch instead of sending another (invariant 4); a guest that joins
one which was sent for the stream job promotes it. What came back is stored only
where the leaf is *still* unallocated at that moment (invariant 1), by plain calls with
no await between looking and storing; a fetch that failed stores nothing (invariant 7).

A fetch is a task of the disk, not of the request that caused it: a client that goes
away takes no data from the others that wait. Those who wait use the leaf for what is
allocated by then, and the fetched bytes for what is not (copy on read is off, the
leaf is full, or it needs a flush before it can take more).

A reader is woken when the data is there, not when it is stored: storing may have to wait for a
flush. So data that waits to be stored outlives the requests for it, and is bounded: beyond
`UNSTORED_MOST` bytes of it, readers wait until theirs is stored.

A fetch may be *parked*: its data is there, but is not stored until a request wants it.
So a guest that reads on towards it does not just hit, unseen, but comes by here; that is
how readahead learns that it is time to go on, at no cost to any hit.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import nullcontext

import trio

from nbdstream.backing.base import Backing, Grant, Priority
from nbdstream.disk.buffers import Buffers
from nbdstream.disk.zeroes import zero_runs
from nbdstream.errors import TROUBLE, BackingError, BackingGoneError, NbdstreamError
from nbdstream.extents import align_up
from nbdstream.leaf.base import ColdMetadata, FlushNeeded, Leaf, State, joined
from nbdstream.tasks import Report, start_contained

log = logging.getLogger(__name__)

# The most that one read of the backing asks for: what a miss within it waits for.
MAX_FETCH = 1 << 20
# A parked fetch that no request wants for so long is stored after all: seconds.
PARK_TIME = 5.0
# Bytes that have come and are not stored yet, up to which no reader waits for that.
UNSTORED_MOST = 32 << 20


class Fetch:
    """One read of the backing, under way or done.

    ``error``: the read failed; ``store_error``: it did not, but the leaf would not take
    the data (it is full or damaged). ``error`` is final once ``arrived`` is set, both are once
    ``done`` is. ``purpose``: why it was sent; ``priority``: the most urgent reason so far;
    ``joined``: another reader waits for it, too.
    """

    def __init__(
        self, offset: int, data: bytearray, priority: Priority, *, store: bool, park: bool
    ) -> None:
        self.offset = offset
        self.length = len(data)
        self.data = data
        self.purpose = priority
        self.priority = priority
        self.store = store
        self.park = park
        self.joined = False
        self.wanted = trio.Event()
        self.arrived = trio.Event()
        self.done = trio.Event()
        self.error: BackingError | None = None
        self.store_error: OSError | NbdstreamError | None = None

    def covers(self, offset: int, length: int) -> bool:
        """Whether the fetched bytes include the range."""
        return self.offset <= offset and offset + length <= self.offset + self.length

    def view(self, offset: int, length: int) -> memoryview:
        """The fetched bytes of a range of the disk."""
        start = offset - self.offset
        return memoryview(self.data)[start : start + length]

    async def wait_data(self) -> None:
        """Wait until the data is in `data`, stored or not. Raises BackingError if the read
        failed."""
        await self.arrived.wait()
        if self.error is not None:
            raise self.error

    async def wait(self) -> None:
        """Wait until it is done. Raises BackingError if the read failed."""
        await self.done.wait()
        if self.error is not None:
            raise self.error

    async def wait_stored(self) -> None:
        """Wait until the leaf has the data. Raises BackingError, and what the leaf raised."""
        await self.wait()
        if self.store_error is not None:
            raise self.store_error


class Fetcher:
    """The fetches of one disk that are under way, by cluster."""

    def __init__(
        self,
        leaf: Leaf,
        backing: Backing,
        nursery: trio.Nursery,
        settle: Callable[[Callable[[], None]], Awaitable[None]],
        report: Report,
        stored: Callable[[int], None],
    ) -> None:
        """``settle`` runs a plain call on the leaf until the leaf has what the call needs;
        ``report`` is told of fetches that failed in a way that nothing accounts for;
        ``stored``, of how many bytes were put into the leaf."""
        self._leaf = leaf
        self._backing = backing
        self._nursery = nursery
        self._settle = settle
        self._report = report
        self._stored = stored
        self._by_cluster: dict[int, Fetch] = {}
        self._buffers = Buffers()
        self._unstored = 0
        self.fetched_bytes = 0
        self.stored_bytes = 0
        self.zero_bytes = 0
        self.store_failures = 0

    @property
    def in_flight(self) -> int:
        """How many fetches are under way."""
        return len(set(self._by_cluster.values()))

    @property
    def demanded(self) -> int:
        """How many of them a guest waits for."""
        fetches = set(self._by_cluster.values())
        return sum(fetch.priority is Priority.DEMAND for fetch in fetches)

    def under_way(self, offset: int) -> Fetch | None:
        """The fetch that has the cluster around ``offset``, if there is one."""
        return self._by_cluster.get(offset // self._leaf.cluster_size)

    def touches(self, offset: int, length: int) -> bool:
        """Whether a fetch is under way that has a cluster of the range."""
        size = self._leaf.cluster_size
        return bool(self._by_cluster) and any(
            cluster in self._by_cluster
            for cluster in range(offset // size, (offset + length - 1) // size + 1)
        )

    def start(
        self,
        offset: int,
        length: int,
        priority: Priority,
        *,
        store: bool,
        park: bool = False,
        grant: Grant | None = None,
    ) -> list[Fetch]:
        """Have every cluster that the range touches fetched; return the fetches to wait for.

        ``store``: put the data into the leaf; ``park``: only when another reader starts a
        fetch of the same clusters, or after `PARK_TIME`. ``grant``: the room for the first
        fetch that has to be sent, in the hands of the fetch from then on.
        """
        size = self._leaf.cluster_size
        fetches: list[Fetch] = []
        missing: list[int] = []
        for cluster in range(offset // size, align_up(offset + length, size) // size):
            fetch = self._by_cluster.get(cluster)
            if fetch is None:
                missing.append(cluster)
            elif not fetches or fetches[-1] is not fetch:
                self._join(fetch, priority, store=store)
                fetches.append(fetch)
        for first, last in _runs(missing, max(MAX_FETCH // size, 1)):
            fetch = self._claim(first, last, priority, store=store, park=park)
            self._send(fetch, grant)
            grant = None
            fetches.append(fetch)
        return fetches

    def disown(self) -> None:
        """No request joins the fetches under way any more: what they bring may be stale."""
        self._by_cluster.clear()

    def _join(self, fetch: Fetch, priority: Priority, *, store: bool) -> None:
        fetch.store = fetch.store or store
        fetch.joined = True
        fetch.wanted.set()
        if priority < fetch.priority:
            fetch.priority = priority
            self._backing.promote(fetch.offset, fetch.length)

    def _claim(
        self, first: int, last: int, priority: Priority, *, store: bool, park: bool
    ) -> Fetch:
        """A fetch of the clusters ``first`` to ``last``, which others can join from now on."""
        size = self._leaf.cluster_size
        offset = first * size
        end = min((last + 1) * size, self._leaf.size)
        data = self._buffers.take(end - offset)
        fetch = Fetch(offset, data, priority, store=store, park=park)
        for cluster in range(first, last + 1):
            self._by_cluster[cluster] = fetch
        return fetch

    def _send(self, fetch: Fetch, grant: Grant | None) -> None:
        name = f"fetch of {fetch.length} bytes at {fetch.offset}"
        held = grant.take() if grant is not None else None
        start_contained(self._nursery, name, self._report, self._run, fetch, held)

    async def _run(self, fetch: Fetch, grant: Grant | None) -> None:
        # If anything but an answer ends this task (shutdown), those who wait must not
        # take the buffer's content for data.
        fetch.error = BackingGoneError("the disk was closed before the backing answered")
        try:
            if grant is not None and grant.priority is not fetch.priority:
                grant.give_back()  # a guest has joined before this task began: demand needs none
                grant = None
            with grant or nullcontext():
                data = memoryview(fetch.data)
                await self._backing.read(data, fetch.offset, fetch.priority, grant)
            fetch.error = None
            self.fetched_bytes += fetch.length
            await self._keep(fetch)
        except BackingError as error:
            fetch.error = error
        except TROUBLE as error:
            fetch.store_error = error
            self.store_failures += 1
            log.warning("%s: cannot keep what was read: %s", self._leaf.path, error)
        except Exception as error:
            fetch.error = BackingError(f"internal error: {error!r}")
            raise
        finally:
            self._forget(fetch)
            self._retire(fetch)
            fetch.arrived.set()
            fetch.done.set()

    async def _keep(self, fetch: Fetch) -> None:
        """Let those who read have the data that has come, and store it."""
        self._unstored += fetch.length
        try:
            if self._unstored <= UNSTORED_MOST:
                fetch.arrived.set()
            if fetch.park:
                with trio.move_on_after(PARK_TIME):
                    await fetch.wanted.wait()
            if fetch.store:
                # A guest may have seen the data: a disk that is closed now keeps it.
                with trio.CancelScope(shield=True):
                    await self._settle(lambda: self._store(fetch))
        finally:
            self._unstored -= fetch.length

    def _forget(self, fetch: Fetch) -> None:
        """No request joins it any more."""
        size = self._leaf.cluster_size
        for cluster in range(
            fetch.offset // size, align_up(fetch.offset + fetch.length, size) // size
        ):
            if self._by_cluster.get(cluster) is fetch:
                del self._by_cluster[cluster]

    def _retire(self, fetch: Fetch) -> None:
        """Use the buffer again, unless a request that joined may still read it, or
        libnbd may still write to it (after a failed read)."""
        if fetch.error is None and fetch.purpose >= Priority.PREFETCH and not fetch.joined:
            self._buffers.give(fetch.data)
        if not self._by_cluster:
            self._buffers.clear()

    def _store(self, fetch: Fetch) -> None:
        """Put into the leaf what it still lacks. One step: no await, a guest write wins."""
        for extent in list(joined(self._leaf.extents(fetch.offset, fetch.length))):
            if extent.state is State.UNALLOCATED:
                self._put(extent.offset, fetch.view(extent.offset, extent.length))

    def put_nowait(self, offset: int, data: memoryview) -> bool:
        """Put into the leaf what came without a fetch. In the step that found the range
        unallocated, and no fetch of it under way. False: not possible without waiting, or only
        with more data. Raises OSError, LeafError."""
        block, end = self._leaf.block_size, offset + len(data)
        if offset % block or (end % block and end != self._leaf.size):
            return False
        try:
            self._put(offset, data)
        except (ColdMetadata, FlushNeeded):
            return False
        return True

    def _put(self, offset: int, data: memoryview) -> None:
        """Put data where the leaf has none."""
        leaf = self._leaf
        for start, length, zero in zero_runs(data, leaf.cluster_size):
            if zero:
                leaf.zero(offset + start, length, unmap=True, as_backing=True)
                self.zero_bytes += length
            else:
                leaf.write(offset + start, data[start : start + length])
                self.stored_bytes += length
                self._stored(length)


def _runs(clusters: Iterable[int], limit: int) -> Iterable[tuple[int, int]]:
    """Sorted numbers as (first, last) runs of consecutive ones, at most ``limit`` long."""
    first = last = -1
    for cluster in clusters:
        if first >= 0 and cluster == last + 1 and cluster - first < limit:
            last = cluster
            continue
        if first >= 0:
            yield first, last
        first = last = cluster
    if first >= 0:
        yield first, last
