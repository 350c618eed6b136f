# SPDX-License-Identifier: Apache-2.0
"""What happened to a disk over time: samples, taken once a second, for the report.

Memory is bounded. When there are `SAMPLES_MOST`, each two neighbours become one, so the record
always begins with the server, at half the resolution. Once everything is local nothing more is
recorded: what is worth to be seen is how that came about.
"""

import time
from dataclasses import dataclass

import trio

from nbdstream.backing.base import Priority
from nbdstream.backing.latency import Counts
from nbdstream.control.report import statistics
from nbdstream.disk import StreamedDisk
from nbdstream.qmp.protocol import JSONObject
from nbdstream.streamer.job import StreamJob

INTERVAL = 1.0
SAMPLES_MOST = 600
CLASSES = tuple(priority.name.lower() for priority in Priority)


@dataclass(frozen=True)
class Sample:
    """A span of time, in seconds: what was read of the backing, by class, and how long guests
    waited; at its end, how much was local and how large the window was."""

    span: float
    bytes: tuple[int, ...]
    misses: int
    waits: int
    waited: float
    local: int
    window: int

    def plus(self, later: "Sample") -> "Sample":
        """This span and the next one."""
        return Sample(
            self.span + later.span,
            tuple(map(sum, zip(self.bytes, later.bytes, strict=True))),
            self.misses + later.misses,
            self.waits + later.waits,
            self.waited + later.waited,
            later.local,
            later.window,
        )


class History:
    """The record of one disk, from the start of its server on."""

    def __init__(self, disk: StreamedDisk, job: StreamJob | None) -> None:
        self._backing = disk.backing  # also when the disk has let go of it
        self._disk = disk
        self._job = job
        self._began = time.time()
        self._samples: list[Sample] = []
        self._last = self._totals(statistics(disk, job))
        self._at = trio.current_time()

    @property
    def latency(self) -> dict[str, Counts]:
        """The latency of all reads of the backing so far, by class."""
        return self._backing.statistics().latency if self._backing is not None else {}

    async def run(self) -> None:
        """The task that takes samples; it ends when everything is local."""
        while not self._disk.completed.is_set():
            with trio.move_on_after(INTERVAL):
                await self._disk.completed.wait()
            self._take()

    def as_json(self) -> JSONObject:
        """Columns: ``span`` in seconds, ``rate`` by class in bytes per second, ``misses`` per
        second, ``wait`` (what a guest's miss took, on average) in seconds, ``local`` and
        ``window`` in bytes; ``began`` in seconds since the epoch."""
        samples = self._samples
        return {
            "began": self._began,
            "span": [round(each.span, 3) for each in samples],
            "rate": {
                name: [round(each.bytes[index] / each.span) for each in samples]
                for index, name in enumerate(CLASSES)
            },
            "misses": [round(each.misses / each.span, 3) for each in samples],
            "wait": [round(each.waited / each.waits, 6) if each.waits else 0 for each in samples],
            "local": [each.local for each in samples],
            "window": [each.window for each in samples],
        }

    def _take(self) -> None:
        report = statistics(self._disk, self._job)
        now, totals = trio.current_time(), self._totals(report)
        before, span = self._last, now - self._at
        if span <= 0:
            return
        backing = report.get("backing")
        if backing is None:  # what it counted is gone with it
            totals = before[:-1] + totals[-1:]
        *read, waits, waited, misses = (max(a - b, 0) for a, b in zip(totals, before, strict=True))
        local = report["size"] if backing is None else report.get("job", {}).get("offset", 0)
        window = backing["window"] if backing is not None else 0
        sample = Sample(span, tuple(map(int, read)), int(misses), int(waits), waited, local, window)
        self._last, self._at = totals, now
        self._samples.append(sample)
        if len(self._samples) >= SAMPLES_MOST:
            pairs = zip(self._samples[::2], self._samples[1::2], strict=True)
            self._samples = [first.plus(second) for first, second in pairs]

    def _totals(self, report: JSONObject) -> tuple[float, ...]:
        """Counters: bytes by class, a guest's reads of the backing and what they took, misses."""
        backing = report.get("backing")
        read: list[float] = [0] * len(CLASSES)
        waits = waited = 0.0
        if backing is not None:
            read = [backing["bytes"].get(name, 0) for name in CLASSES]
            if demand := backing["latency"].get("demand"):
                waits, waited = demand["count"], demand["sum"]
        return (*read, waits, waited, report["disk"]["demand-misses"])
