# SPDX-License-Identifier: Apache-2.0
"""QMP commands for limits that may change while a disk is served.

They follow QEMU's ``migrate-set-parameters``: one command sets any number of them at once, or
none if one is refused, and another one returns them all.
"""

from nbdstream.control.jobs import non_negative
from nbdstream.control.table import command
from nbdstream.disk import StreamedDisk
from nbdstream.qmp.protocol import GenericError, JSONObject
from nbdstream.server.server import Server
from nbdstream.streamer.job import StreamJob


class Parameters:
    """The limits of a disk, its job and the server that serves it."""

    def __init__(self, disk: StreamedDisk, job: StreamJob | None, server: Server) -> None:
        self._disk = disk
        self._job = job
        self._server = server

    @command("x-nbdstream-query-parameters")
    async def query(self) -> JSONObject:
        """Those that there are; ``backing-timeout`` and ``speed`` are 0 for no limit."""
        parameters: JSONObject = {
            "max-clients": self._server.max_clients,
            "copy-on-read": self._disk.copy_on_read,
        }
        if self._disk.backing is not None:
            parameters["backing-timeout"] = self._disk.backing.timeout or 0
        if self._job is not None:
            parameters["speed"] = self._job.speed
        return parameters

    @command("x-nbdstream-set-parameters")
    async def set(
        self,
        max_clients: int | None = None,
        backing_timeout: int | None = None,
        copy_on_read: bool | None = None,
        speed: int | None = None,
    ) -> None:
        """Set those that are given, or none of them. ``backing_timeout`` is in seconds and
        ``speed`` in bytes per second; 0 is no limit.

        Raises:
            GenericError: a value is out of its range, or the disk has nothing that it is for.
        """
        backing, job = self._disk.backing, self._job
        if max_clients is not None and max_clients < 1:
            raise GenericError("Parameter 'max-clients' expects a value of at least 1")
        if backing_timeout is not None:
            non_negative("backing-timeout", backing_timeout)
            if backing is None:
                raise GenericError("the disk has no backing: everything is local")
        if speed is not None:
            non_negative("speed", speed)
            if job is None:
                raise GenericError("there is nothing to stream")
        if copy_on_read and self._disk.thin:
            raise GenericError("the leaf is thin: nothing is copied into it")
        if max_clients is not None:
            self._server.max_clients = max_clients
        if backing_timeout is not None and backing is not None:
            backing.set_timeout(backing_timeout or None)
        if copy_on_read is not None:
            self._disk.copy_on_read = copy_on_read
        if speed is not None and job is not None:
            job.set_speed(speed)
