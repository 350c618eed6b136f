# SPDX-License-Identifier: Apache-2.0
"""The control room: a QMP socket to look at and steer a disk and its stream job.

listener = listen_control(Path("leaf.qmp"))
control = control_server(disk, job, device="disk0", stop=service.stop)
nursery.start_soon(control.serve, listener)
"""

from collections.abc import Callable

from nbdstream.control.disks import DiskCommands
from nbdstream.control.jobs import JobCommands
from nbdstream.control.process import ProcessCommands
from nbdstream.control.server import ControlServer, listen_control
from nbdstream.control.table import CommandTable
from nbdstream.disk import StreamedDisk
from nbdstream.streamer.job import StreamJob

__all__ = ["control_server", "listen_control"]


def control_server(
    disk: StreamedDisk,
    job: StreamJob | None,
    *,
    device: str,
    stop: Callable[[], None],
    more: tuple[object, ...] = (),
) -> ControlServer:
    """A control server for one disk and its job, if it has one.

    ``device`` is the name by which clients address the disk; ``stop`` begins the clean
    end of the server when a client says ``quit``; ``more`` are further groups of commands
    (see `nbdstream.control.table`).
    """
    table = CommandTable(
        ProcessCommands(stop),
        JobCommands(job, device),
        DiskCommands(disk, job, device),
        *more,
    )
    server = ControlServer(table)
    if job is not None:
        job.on_event(server.emit)
    return server
