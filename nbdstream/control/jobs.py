# SPDX-License-Identifier: Apache-2.0
"""QMP commands for the stream job: QEMU's own, with QEMU's meaning, replies and errors.

From qapi/block-core.json: block-stream, query-block-jobs, block-job-…; from
qapi/job.json: query-jobs, job-…. There is one disk and one job. What QEMU can do with a
longer chain of images (``base`` and its like), or with jobs that stay when they
are done, is refused as an unknown or unacceptable argument.
"""

import logging
from typing import Literal

from nbdstream.control.table import command
from nbdstream.qmp.protocol import (
    CommandError,
    DeviceNotActive,
    DeviceNotFound,
    GenericError,
    JSONObject,
)
from nbdstream.streamer.job import JobStatus, StreamJob

log = logging.getLogger(__name__)

NOTHING_TO_STREAM = "there is nothing to stream: the disk has no backing or is read-only"


def non_negative(name: str, value: int) -> int:
    """The value. Raises GenericError, which names the argument, if it is negative."""
    if value < 0:
        raise GenericError(f"Parameter '{name}' expects a non-negative value")
    return value


class JobCommands:
    """Starts, steers and describes the stream job of the disk ``device``, if it has one."""

    def __init__(self, job: StreamJob | None, device: str) -> None:
        self._job = job
        self._device = device

    @command("block-stream")
    async def block_stream(
        self,
        device: str,
        job_id: str | None = None,
        speed: int | None = None,
        on_error: Literal["stop"] = "stop",
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
    ) -> None:
        """Start the job. ``speed``: its cap in bytes per second; without it the cap stays.

        Raises:
            DeviceNotFound: no disk has this name.
            GenericError: the job runs already, there is nothing to stream, or an argument has a
                value that is not supported.
        """
        if device != self._device:
            raise DeviceNotFound(f"Cannot find device='{device}'")
        if not auto_finalize or not auto_dismiss:
            raise GenericError("a stream job finalizes and dismisses itself here")
        job = self._job
        if job is None:
            raise GenericError(NOTHING_TO_STREAM)
        if job.status is not JobStatus.NULL:
            raise GenericError(
                f"Node '{device}' is busy: block device is in use by block job: stream"
            )
        if job_id == "":
            raise GenericError("Invalid job ID ''")
        if speed is not None:
            job.set_speed(non_negative("speed", speed))
        job.id = job_id or device
        try:
            job.start()
        except ValueError as error:
            raise GenericError(str(error)) from error

    # -- qapi/block-core.json: by device -----------------------------------------------

    @command("query-block-jobs")
    async def query_block_jobs(self) -> list[JSONObject]:
        job = self._job
        if job is None or job.status is JobStatus.NULL:
            return []
        info: JSONObject = {
            "type": "stream",
            "device": job.id,
            "len": job.length,
            "offset": job.offset,
            "busy": job.status is JobStatus.RUNNING,
            "paused": job.status is JobStatus.PAUSED,
            "speed": job.speed,
            "io-status": job.io_status,
            "ready": False,  # a stream job completes by itself
            "status": job.status.value,
            "auto-finalize": True,
            "auto-dismiss": True,
        }
        return [info | ({"error": job.error} if job.error else {})]

    @command("block-job-set-speed")
    async def block_job_set_speed(self, device: str, speed: int) -> None:
        self._block_job(device).set_speed(non_negative("speed", speed))

    @command("block-job-pause")
    async def block_job_pause(self, device: str) -> None:
        self._pause(self._block_job(device))

    @command("block-job-resume")
    async def block_job_resume(self, device: str) -> None:
        self._resume(self._block_job(device))

    @command("block-job-cancel")
    async def block_job_cancel(self, device: str, force: bool = False) -> None:
        """End the job. Raises GenericError if it is paused, unless ``force`` is set."""
        job = self._block_job(device)
        if job.status is JobStatus.PAUSED and not force:
            raise GenericError(f"The block job for device '{device}' is currently paused")
        self._cancel(job)

    @command("block-job-complete")
    async def block_job_complete(self, device: str) -> None:
        self._verb(self._block_job(device), "complete")

    @command("x-nbdstream-finish-in")
    async def finish_in(self, device: str, seconds: int | None = None) -> None:
        """Set the job's deadline, in seconds from now; without ``seconds``, remove it."""
        if seconds is not None:
            non_negative("seconds", seconds)
        self._block_job(device).deadline.set(seconds)

    @command("x-nbdstream-finish-by")
    async def finish_by(self, device: str, seconds: int | None = None) -> None:
        """The old name of `finish_in`, until version 0.2."""
        log.warning("x-nbdstream-finish-by is deprecated: use x-nbdstream-finish-in")
        await self.finish_in(device, seconds)

    # -- qapi/job.json: by job id ------------------------------------------------------

    @command("query-jobs")
    async def query_jobs(self) -> list[JSONObject]:
        job = self._job
        if job is None or job.status is JobStatus.NULL:
            return []
        info: JSONObject = {
            "id": job.id,
            "type": "stream",
            "status": job.status.value,
            "current-progress": job.offset,
            "total-progress": job.length,
        }
        return [info | ({"error": job.error} if job.error else {})]

    @command("job-pause")
    async def job_pause(self, id: str) -> None:  # noqa: A002 (QMP's name for it)
        self._pause(self._any_job(id))

    @command("job-resume")
    async def job_resume(self, id: str) -> None:  # noqa: A002
        self._resume(self._any_job(id))

    @command("job-cancel")
    async def job_cancel(self, id: str) -> None:  # noqa: A002
        self._cancel(self._any_job(id))

    @command("job-complete")
    async def job_complete(self, id: str) -> None:  # noqa: A002
        self._verb(self._any_job(id), "complete")

    # -- both ---------------------------------------------------------------------------

    def _block_job(self, device: str) -> StreamJob:
        return self._find(device, DeviceNotActive(f"Block job '{device}' not found"))

    def _any_job(self, job_id: str) -> StreamJob:
        return self._find(job_id, GenericError("Job not found"))

    def _find(self, job_id: str, otherwise: CommandError) -> StreamJob:
        job = self._job
        if job is None or job.status is JobStatus.NULL or job.id != job_id:
            raise otherwise
        return job

    def _pause(self, job: StreamJob) -> None:
        if job.status is JobStatus.PAUSED:
            raise GenericError("Job is already paused")
        self._verb(job, "pause", JobStatus.RUNNING)
        job.pause()

    def _resume(self, job: StreamJob) -> None:
        if job.status is not JobStatus.PAUSED:
            raise GenericError("Can't resume a job that was not paused")
        job.resume()

    def _cancel(self, job: StreamJob) -> None:
        self._verb(job, "cancel", JobStatus.RUNNING, JobStatus.PAUSED)
        job.cancel()

    def _verb(self, job: StreamJob, verb: str, *statuses: JobStatus) -> None:
        """Refuse a verb in a status where the job has no use for it."""
        if job.status not in statuses:
            raise GenericError(
                f"Job '{job.id}' in state '{job.status.value}' cannot accept command verb '{verb}'"
            )
