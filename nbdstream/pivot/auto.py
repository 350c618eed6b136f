# SPDX-License-Identifier: Apache-2.0
"""A pivot that a server makes of itself, once its disk is complete."""

import logging

import trio

from nbdstream.disk import StreamedDisk
from nbdstream.errors import NbdstreamError
from nbdstream.pivot.leftovers import PivotDisk
from nbdstream.pivot.run import pivot
from nbdstream.pivot.servers import Monitor, OwnServer
from nbdstream.service import Service

log = logging.getLogger(__name__)

# Seconds until the next attempt after one that was refused: the first time, and at the most. Each
# attempt that gets far stops the guest for a moment.
RETRY_FIRST = 5.0
RETRY_MOST = 300.0
# Seconds that a guest which has just connected, or disconnected, gets to be ready.
_SETTLE = 1.0


async def pivot_when_complete(service: Service, monitor: Monitor) -> float:
    """Wait until all is local, in the leaf or (of a thin one) in the store, and then for the
    pivot to succeed.

    An attempt that is refused is logged in one line, and made again: after a growing pause, or
    when a client comes or goes (a guest that was started only now, say). The caller stops the
    service afterwards.

    Returns:
        Seconds for which the guest was stopped.
    """
    await _wait_independent(service.opened.disk)
    delay, said = RETRY_FIRST, ""
    while True:
        try:
            return await pivot(monitor, [PivotDisk(OwnServer(service))])
        except (NbdstreamError, OSError) as error:
            if str(error) != said:
                log.warning("no pivot yet: %s", error)
            said = str(error)
        with trio.move_on_after(delay) as waiting:
            await service.clients_changed.park()
        delay = min(2 * delay, RETRY_MOST)
        if not waiting.cancelled_caught:
            delay = RETRY_FIRST
            await trio.sleep(_SETTLE)


async def _wait_independent(disk: StreamedDisk) -> None:
    """Return when QEMU could have the leaf without us."""
    backing = disk.backing
    if disk.thin and backing is not None and backing.local is not None:
        await backing.local.complete.wait()
    elif backing is not None:
        await disk.completed.wait()
