# SPDX-License-Identifier: Apache-2.0
"""Whether QEMU reaches the server of a disk.

A QEMU that has lost a server for longer than the disk's ``reconnect-delay`` fails requests at
once, and connects again in the background, every 16 s at most. A guest that goes on before that
sees I/O errors, and QEMU's flush before a pivot fails.
"""

import trio

from nbdstream.pivot.servers import PivotError
from nbdstream.qmp.client import QMPClient

# Seconds that QEMU gets to connect again, and between two looks.
RECONNECT_SECONDS = 20.0
_POLL = 0.02
_AGAIN = 0.2


async def wait_connected(qemu: QMPClient, devices: list[str], leaf: str) -> None:
    """Return when these devices (qdev ids or paths) can read.

    Raises:
        PivotError: they cannot. The message says nothing of the guest.
        QMPError: QEMU does not answer.
    """
    with trio.move_on_after(RECONNECT_SECONDS):
        for device in devices:
            while not await _reads(qemu, device):  # noqa: ASYNC110 - no event
                await trio.sleep(_AGAIN)
        return
    raise PivotError(
        f"{leaf}: QEMU has lost its connection to the server, and does not connect again within"
        f" {RECONNECT_SECONDS:g} s"
    )


async def _reads(qemu: QMPClient, device: str) -> bool:
    """Whether a read succeeds, of the first sector, which each guest has read. It also has QEMU
    connect, or use the connection that it made in the background.

    The result is in the device's statistics only. A read of the guest's own counts just as well.
    """
    before = await _counts(qemu, device)
    line = f'qemu-io -d {device} "aio_read -q 0 512"'
    await qemu.execute("human-monitor-command", {"command-line": line})
    while (now := await _counts(qemu, device)) == before:  # noqa: ASYNC110 - no event
        await trio.sleep(_POLL)
    return now[1] == before[1]


async def _counts(qemu: QMPClient, device: str) -> tuple[int, int]:
    """How many reads succeeded, and how many failed."""
    for one in await qemu.execute("query-blockstats"):
        if one.get("qdev") == device:
            stats = one["stats"]
            return stats["rd_operations"], stats["failed_rd_operations"]
    raise PivotError(f"QEMU has no device {device} any more")
