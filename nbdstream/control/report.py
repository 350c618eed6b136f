# SPDX-License-Identifier: Apache-2.0
"""One look at everything that is counted: what `x-nbdstream-stats` returns.

The progress line, ``nbdstream status`` and the metrics are all made from this. Names are
spelled as QMP spells them; sizes are bytes, rates bytes per second, times seconds.
"""

import math
from dataclasses import asdict

from nbdstream.backing.base import BackingStatistics
from nbdstream.disk import StreamedDisk
from nbdstream.qmp.protocol import JSONObject
from nbdstream.streamer.deadline import Deadline
from nbdstream.streamer.job import JobStatus, StreamJob


def statistics(disk: StreamedDisk, job: StreamJob | None) -> JSONObject:
    """The disk, its job and its backing as they are now.

    ``owner`` is false, and ``frozen`` says why, where another server owns the disk
    (docs/migration.md). ``problems`` lists what has failed for good, where something has.
    ``thin`` is there where the leaf is, with whether all of the image below it is local.
    ``backing`` is missing once there is none
    (everything is local), ``job`` where there never was anything to stream; it describes the
    last run where its status is "null".
    """
    report: JSONObject = {
        "size": disk.size,
        "copy-on-read": disk.copy_on_read,
        "owner": not disk.gate.reason,
        "disk": {_spell(name): value for name, value in disk.statistics().items()},
    }
    if disk.thin:
        local = disk.backing.local if disk.backing is not None else None
        report["thin"] = {"complete": local is None or local.complete.is_set()}
    if disk.gate.reason:
        report["frozen"] = disk.gate.reason
    if disk.health.problems:
        report["problems"] = list(disk.health.problems)
    if job is not None:
        report["job"] = _job(disk, job)
    if disk.backing is not None:
        report["backing"] = _backing(disk.backing.uri, disk.backing.statistics())
    return report


def _job(disk: StreamedDisk, job: StreamJob) -> JSONObject:
    report: JSONObject = {
        "id": job.id,
        "status": job.status.value,
        "length": job.length,
        # A disk without a backing is local as a whole, whether or not a job made it so.
        "offset": job.offset if disk.backing is not None else disk.size,
        "remaining": job.remaining if disk.backing is not None else 0,
        "speed": job.speed,
        "rate": job.rate if job.status is JobStatus.RUNNING else 0.0,
        "io-status": job.io_status,
    }
    if job.status is JobStatus.RUNNING and job.eta is not None:
        report["eta"] = job.eta
    if job.deadline.left is not None and disk.backing is not None:
        report["finish-in"] = _deadline(job.deadline)
        report["finish-by"] = report["finish-in"]  # the old name, until version 0.2
    if job.error:
        report["error"] = job.error
    return report


def _deadline(deadline: Deadline) -> JSONObject:
    """``late`` is missing if the deadline will be kept, and if the delay is not known."""
    report: JSONObject = {
        "left": deadline.left,
        "speed": deadline.needed if math.isfinite(deadline.needed) else 0.0,
        "on-time": deadline.late == 0,
    }
    return report | ({"late": deadline.late} if 0 < deadline.late < math.inf else {})


def _backing(uri: str, statistics: BackingStatistics) -> JSONObject:
    return {"uri": uri} | {_spell(name): value for name, value in asdict(statistics).items()}


def _spell(name: str) -> str:
    return name.replace("_", "-")
