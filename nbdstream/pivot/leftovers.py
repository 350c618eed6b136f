# SPDX-License-Identifier: Apache-2.0
"""What a pivot leaves behind when its tool is killed, and how the next one goes on from there.

QEMU itself remembers: nodes of leaves have names of our own, and while the guest is stopped by a
pivot, there is a node `STOPPED`, which no disk uses.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from nbdstream.pivot.connected import wait_connected
from nbdstream.pivot.nodes import Graph
from nbdstream.pivot.servers import DiskServer, PivotError
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import CommandError, QMPConnectionError

LEAF = "nbdstream-leaf-"
PROBE = "nbdstream-probe"
STOPPED = "nbdstream-stopped"


@dataclass(frozen=True)
class PivotDisk:
    """``leaf_path`` is the leaf as QEMU sees it, "" if that is the path which the server uses."""

    server: DiskServer
    leaf_path: str = ""


async def remember_stop(qemu: QMPClient) -> None:
    """Have QEMU remember that the guest, which will be stopped, is to go on. Raises QMPError."""
    await qemu.execute("blockdev-add", {"driver": "null-co", "node-name": STOPPED, "size": 0})


async def forget_stop(qemu: QMPClient) -> None:
    """The guest goes on. Raises QMPConnectionError."""
    await delete_node(qemu, STOPPED)  # which there is not, if the guest was paused before


async def delete_node(qemu: QMPClient, node: str) -> None:
    """Delete a node that QEMU may have deleted by itself. Raises QMPConnectionError."""
    with suppress(CommandError):
        await qemu.execute("blockdev-del", {"node-name": node})


async def go_on(qemu: QMPClient, served: Sequence[tuple[str, list[str]]]) -> None:
    """Continue the guest, once QEMU reaches the servers that it has: else it sees I/O errors.

    Args:
        served: leaves that are served, and the devices that are on them.

    Raises:
        PivotError: QEMU does not reach one of them. The guest stays stopped.
        QMPError: QEMU does not answer.
    """
    try:
        for leaf, devices in served:
            await wait_connected(qemu, devices, leaf)
    except PivotError as error:
        raise PivotError(
            f"{error}; the guest stays stopped until it does: 'nbdstream pivot' tries again"
        ) from error
    if not (await qemu.execute("query-status"))["running"]:
        await qemu.execute("cont")


async def clear_up(qemu: QMPClient, disks: Sequence[PivotDisk]) -> list[PivotDisk]:
    """Finish, or undo, what a killed pivot of these disks began.

    Returns:
        The disks that are not on their leaves.

    Raises:
        QMPError, NbdstreamError, OSError: something does not answer, a leaf cannot be taken back,
            or QEMU does not reach the server that the guest would go on with.
    """
    graph = await Graph.of(qemu)
    while unused := [*graph.unused(PROBE), *graph.unused(LEAF)]:  # and then those below them
        for node in unused:
            await qemu.execute("blockdev-del", {"node-name": node})
        graph = await Graph.of(qemu)
    rest, pivoted, served, connected = [], [], [], []
    for disk in disks:
        try:
            facts = await disk.server.facts()
        except QMPConnectionError:
            if graph.uses("nbd"):
                raise
            continue  # it has died, and the guest does not use it any more
        nodes = graph.leaves(LEAF, disk.leaf_path or facts["leaf"])
        if facts["let-go"] and any(graph.in_use(node) for node in nodes):
            pivoted.append(disk)
            connected += graph.exports(facts["uris"], used=False)
            continue
        rest.append(disk)
        if facts["let-go"]:
            await disk.server.take_back()
        for node in graph.exports(facts["uris"]):
            served.append((facts["leaf"], graph.devices_over(node)))
    if graph.has(STOPPED):
        await go_on(qemu, served)
        await forget_stop(qemu)
    for node in connected:  # else QEMU would wait for the server when it next flushes all nodes
        await delete_node(qemu, node)
    for disk in pivoted:
        await disk.server.end()
    return rest
