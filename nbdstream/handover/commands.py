# SPDX-License-Identifier: Apache-2.0
"""The hand-over commands of a disk that is served, for its control socket."""

import trio

from nbdstream.disk import StreamedDisk
from nbdstream.handover.custody import Custody
from nbdstream.handover.let_go import LetGo
from nbdstream.handover.offer import Offering
from nbdstream.handover.seal import Seal
from nbdstream.handover.standby import Standby
from nbdstream.streamer.job import StreamJob


def hand_over_commands(
    disk: StreamedDisk,
    job: StreamJob | None,
    nursery: trio.Nursery,
    *,
    device: str,
    stream: str,
    seal: Seal | None,
    custody: Custody,
    uris: list[str],
) -> tuple[object, ...]:
    """The groups of commands (see `nbdstream.control.table`) by which a disk changes hands.

    Args:
        nursery: runs the offer's server until it is cancelled.
        device: the name under which the disk is offered.
        stream: what becomes of the job once the disk is activated: "on", "off" or "paused".
        seal: the seal on the leaf, if it has one. The sealed content is offered again at once,
            whether or not there is a control socket.
        custody: what clients are served.
        uris: where they are.

    Raises:
        UsageError, OSError: the address that the seal names cannot be listened at.
    """
    offering = Offering(disk, device, nursery)
    if seal is not None:
        offering.resume(seal)
    return offering, Standby(disk, job, stream), LetGo(custody, uris)
