# SPDX-License-Identifier: Apache-2.0
"""Statistics as Prometheus metrics.

Nothing is counted here: each scrape takes one `nbdstream.control.report` and puts Prometheus'
names on it.
"""

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from nbdstream.backing.latency import BOUNDS
from nbdstream.control.report import statistics
from nbdstream.control.web import Page
from nbdstream.disk import StreamedDisk
from nbdstream.qmp.protocol import JSONObject
from nbdstream.server.constants import Command
from nbdstream.server.traffic import Traffic
from nbdstream.streamer.job import JobStatus, StreamJob

# Of the disk's and the backing's statistics, those that go up and down.
_DISK_GAUGES = {"fetches-in-flight"}
_BACKING_GAUGES = {
    "connections": "Connections to the backing's server.",
    "in-flight": "Bytes asked of the backing and not here yet.",
    "window": "Bytes that background reads may have in flight.",
    "rate": "Bytes per second that the backing delivers.",
    "base-rtt": "Mean seconds of a read of the backing without a queue of background reads.",
}
_BACKING_COUNTERS = {
    "reconnects": "Connections made again after a loss.",
    "retries": "Reads of the backing that were sent again.",
}


class DiskCollector(Collector):
    """Describes one disk, labelled with its device name, to a Prometheus registry."""

    def __init__(
        self, disk: StreamedDisk, job: StreamJob | None, traffic: Traffic, device: str
    ) -> None:
        self._disk = disk
        self._job = job
        self._traffic = traffic
        self._device = device

    def collect(self) -> Iterator[Metric]:
        """One metric for each figure."""
        report = statistics(self._disk, self._job)
        yield self._gauge("disk_size_bytes", "Size of the virtual disk.", report["size"])
        yield self._gauge(
            "copy_on_read", "Whether what guests read is kept.", report["copy-on-read"]
        )
        for name, value in report["disk"].items():
            kind = self._gauge if name in _DISK_GAUGES else self._counter
            yield kind(f"disk_{_spell(name)}", f"The disk's {name.replace('-', ' ')}.", value)
        yield from self._clients()
        yield self._gauge(
            "backing_attached", "Whether the disk still has a backing.", "backing" in report
        )
        if "backing" in report:
            yield from self._backing(report["backing"])
        if "job" in report:
            yield from self._stream(report["job"])

    def _clients(self) -> Iterator[Metric]:
        """What clients asked for, by NBD's command."""
        for name, text, counts in (
            ("requests", "Requests of clients that were carried out.", self._traffic.done),
            ("bytes", "Bytes of these requests.", self._traffic.bytes),
            ("failures", "Requests of clients that failed.", self._traffic.failed),
        ):
            metric = CounterMetricFamily(
                f"nbdstream_client_{name}", text, labels=("device", "command")
            )
            for command in Command:
                if command is not Command.DISC:
                    metric.add_metric((self._device, command.name.lower()), counts[command])
            yield metric

    def _stream(self, job: JSONObject) -> Iterator[Metric]:
        yield self._gauge("stream_local_bytes", "Bytes of the disk that are local.", job["offset"])
        yield self._gauge("stream_remaining_bytes", "Bytes still to be fetched.", job["remaining"])
        yield self._gauge("stream_rate_bytes", "Bytes streamed per second.", job["rate"])
        yield self._gauge("stream_speed_limit_bytes", "The cap of that; 0 for none.", job["speed"])
        yield self._gauge("stream_failed", "Whether an error stopped it.", job["io-status"] != "ok")
        status = GaugeMetricFamily(
            "nbdstream_stream_status",
            "1 for the status that the stream job has.",
            labels=("device", "status"),
        )
        for each in JobStatus:
            status.add_metric((self._device, each.value), each.value == job["status"])
        yield status

    def _backing(self, backing: JSONObject) -> Iterator[Metric]:
        yield self._gauge(
            "backing_connected", "Whether the backing can be reached.", backing["connected"]
        )
        for name, text in _BACKING_GAUGES.items():
            yield self._gauge(f"backing_{_spell(name)}", text, backing[name])
        for name, text in _BACKING_COUNTERS.items():
            yield self._counter(f"backing_{_spell(name)}", text, backing[name])
        for name in ("requests", "bytes"):
            reads = CounterMetricFamily(
                f"nbdstream_backing_read_{name}",
                f"Completed reads of the backing, in {name}, by what they were for.",
                labels=("device", "priority"),
            )
            for priority, value in backing[name].items():
                reads.add_metric((self._device, priority), value)
            yield reads
        latency = HistogramMetricFamily(
            "nbdstream_backing_read_seconds",
            "How long reads of the backing took, retries included, by what they were for.",
            labels=("device", "priority"),
        )
        for priority, counts in backing["latency"].items():
            bounds = [*map(str, BOUNDS), "+Inf"]
            buckets = zip(bounds, [*counts["buckets"], counts["count"]], strict=True)
            latency.add_metric((self._device, priority), list(buckets), counts["sum"])
        yield latency

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        metric = GaugeMetricFamily(f"nbdstream_{name}", text, labels=("device",))
        metric.add_metric((self._device,), value)
        return metric

    def _counter(self, name: str, text: str, value: float) -> Metric:
        metric = CounterMetricFamily(f"nbdstream_{name}", text, labels=("device",))
        metric.add_metric((self._device,), value)
        return metric


def _spell(name: str) -> str:
    return name.replace("-", "_")


def metrics_page(collector: Collector) -> Page:
    """What a scrape gets (Prometheus' text format)."""
    registry = CollectorRegistry()
    registry.register(collector)

    async def make() -> bytes:
        return generate_latest(registry)

    return Page(CONTENT_TYPE_LATEST, make)
