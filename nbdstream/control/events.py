# SPDX-License-Identifier: Apache-2.0
"""Events of nbdstream's own: what `watch` shows beside the job, told when it changes.

QEMU's events of the job come from the job itself (`nbdstream.streamer.job`).
"""

from collections.abc import Callable, Mapping

import trio

from nbdstream.backing.holding import Holding
from nbdstream.disk import StreamedDisk
from nbdstream.server.server import Server

Emit = Callable[[str, Mapping[str, object]], None]


async def tell_changes(
    emit: Emit,
    disk: StreamedDisk,
    holding: Holding,
    server: Server,
    clients: trio.lowlevel.ParkingLot,
) -> None:
    """A task: emit an event for each change of backing, owner, problems and clients.

    ``clients`` is unparked when the number of clients has changed. A crowd of them that comes at
    once is one event.
    """

    def backing_changed() -> None:
        backing = holding.backing
        assert backing is not None
        now = backing.statistics()
        data = {"uri": backing.uri, "connected": now.connected, "last-error": now.last_error}
        emit("X_NBDSTREAM_BACKING_CHANGE", data)

    def owner_changed() -> None:
        data = {"owner": not disk.gate.reason}
        emit(
            "X_NBDSTREAM_OWNER_CHANGE",
            data | ({"frozen": disk.gate.reason} if disk.gate.reason else {}),
        )

    if holding.backing is not None:
        holding.backing.on_change = backing_changed
    disk.gate.on_change = owner_changed
    disk.health.on_problem = lambda problem: emit("X_NBDSTREAM_PROBLEM", {"problem": problem})
    while True:
        await clients.park()
        emit("X_NBDSTREAM_CLIENTS_CHANGE", {"clients": server.clients})
