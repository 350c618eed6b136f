# SPDX-License-Identifier: Apache-2.0
"""From an open leaf and its backing to a disk with the tasks that belong to it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import trio

from nbdstream.backing.base import Backing
from nbdstream.disk.changes import DetectZeroes
from nbdstream.disk.disk import StreamedDisk
from nbdstream.disk.flush import run_checkpoints
from nbdstream.disk.writeback import Writeback
from nbdstream.health import Health
from nbdstream.leaf.base import Leaf
from nbdstream.tasks import start_contained, surely


@asynccontextmanager
async def open_disk(
    leaf: Leaf,
    backing: Backing | None,
    *,
    copy_on_read: bool = True,
    thin: bool = False,
    detect_zeroes: DetectZeroes = DetectZeroes.OFF,
    health: Health | None = None,
) -> AsyncIterator["StreamedDisk"]:
    """A disk over an open leaf and its backing, and the tasks that belong to it.

    ``thin``: copy nothing into the leaf. ``health`` is where failures are reported that end
    nothing else.

    At the end, fetches under way are dropped, and what the leaf has is flushed; leaf and
    backing stay open, they are the caller's, but for a leaf that was taken back
    (`StreamedDisk.take_back`). Raises OSError if that last flush fails.
    """
    with closing(Writeback(leaf.fd)) as writeback:
        async with trio.open_nursery() as nursery:
            disk = StreamedDisk(
                leaf,
                backing,
                nursery,
                copy_on_read=copy_on_read,
                thin=thin,
                detect_zeroes=detect_zeroes,
                health=health or Health(),
                writeback=writeback,
            )
            if not leaf.read_only:
                report = disk.health.report
                start_contained(nursery, "checkpoints", report, run_checkpoints, disk)
                start_contained(nursery, "writeback", report, writeback.run)
            try:
                yield disk
            finally:
                nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            try:
                await disk.flush()
            finally:
                if disk.leaf is not leaf:
                    await surely(disk.leaf.close)
