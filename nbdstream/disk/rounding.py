# SPDX-License-Identifier: Apache-2.0
"""Before a leaf is handed on: make whole the clusters that are local in part.

With subclusters, a guest's small write allocates a part of a cluster and waits for
nothing (invariant 9). The image is in order, but QEMU 7.2 dies of an assertion
(``bdrv_co_do_copy_on_readv``) when its own copy-on-read or block-stream meets such a cluster.
After a clean stop QEMU must be able to go on, so the rest of these clusters
is fetched first. It is best effort: a backing that is out of reach does not keep the user from
stopping.
"""

import logging

import trio

from nbdstream.backing.base import Priority
from nbdstream.disk.disk import StreamedDisk
from nbdstream.errors import NbdstreamError
from nbdstream.extents import align_up

log = logging.getLogger(__name__)

# Seconds that it may take, and fetches at a time.
TIMEOUT = 20.0
AT_ONCE = 16


async def round_off(disk: StreamedDisk, within: float = TIMEOUT) -> bool:
    """Fetch what clusters lack that are local in part, if the leaf's other users need that.
    ``within``: seconds that it may take.

    Returns:
        Whether no such cluster is left.
    """
    if not disk.leaf.whole_clusters or disk.backing is None or disk.read_only or disk.gate.reason:
        return True
    done = False
    with trio.move_on_after(within):
        try:
            await _fetch_rests(disk)
            done = True
        except* (NbdstreamError, OSError) as group:
            log.debug("%s: %s", disk.leaf.path, group.exceptions[0])
    if not done:
        log.warning(
            "%s: some clusters are local only in part: serve it again before QEMU 7.2 streams it",
            disk.leaf.path,
        )
    return done


async def _fetch_rests(disk: StreamedDisk) -> None:
    room = trio.Semaphore(AT_ONCE)
    size = disk.leaf.cluster_size

    async def fetch(offset: int) -> None:
        try:
            await disk.populate(offset, min(size, disk.size - offset), Priority.PREFETCH)
        finally:
            room.release()

    async with trio.open_nursery() as nursery:
        offset = 0
        while (gap := await disk.next_unallocated(offset)) is not None:
            # A gap that begins or ends within a cluster leaves that one local in part.
            edges = {at - at % size for at in (gap.offset, gap.end) if at % size and at < disk.size}
            for edge in edges:
                await room.acquire()  # no task that only waits (invariant 10)
                nursery.start_soon(fetch, edge)
            offset = align_up(gap.end, size)
