# SPDX-License-Identifier: Apache-2.0
"""Statistics as Prometheus metrics, over a very small HTTP server.

Nothing is counted here: each scrape takes one `nbdstream.control.report` and puts Prometheus'
names on it. The server answers GET and HEAD of ``/metrics``, one request a connection, and
holds clients to a size and a time; whatever else comes in gets the HTTP status for it.
A scrape that fails answers 500 and is logged; it disturbs nothing else.
"""

import logging
import math
from collections.abc import Iterator

import trio
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nbdstream.control.report import statistics
from nbdstream.disk import StreamedDisk
from nbdstream.net.accept import Acceptor, Client, Episode
from nbdstream.net.address import parse_tcp
from nbdstream.net.listeners import Listener, listen_tcp
from nbdstream.qmp.protocol import JSONObject
from nbdstream.streamer.job import JobStatus, StreamJob

log = logging.getLogger(__name__)

REQUEST_LIMIT = 8192
"""Bytes that a request may have, headers included."""
REQUEST_SECONDS = 10.0
"""Time for a whole request and its answer."""
MAX_CLIENTS = 16
"""Connections at any time. One more waits for up to GRACE seconds, then takes the place of
the oldest."""
GRACE = 1.0
PAUSE = 0.05
"""Seconds between two scrapes, however many clients ask."""

# Of the disk's and the backing's statistics, those that go up and down.
_DISK_GAUGES = {"fetches-in-flight"}
_BACKING_GAUGES = {
    "connections": "Connections to the backing's server.",
    "in-flight": "Bytes asked of the backing and not here yet.",
    "window": "Bytes that background reads may have in flight.",
    "rate": "Bytes per second that the backing delivers.",
    "base-rtt": "Seconds that a small read of the backing takes when nothing else is under way.",
}
_BACKING_COUNTERS = {
    "reconnects": "Connections made again after a loss.",
    "retries": "Reads of the backing that were sent again.",
}


class DiskCollector(Collector):
    """Describes one disk, labelled with its device name, to a Prometheus registry."""

    def __init__(self, disk: StreamedDisk, job: StreamJob | None, device: str) -> None:
        self._disk = disk
        self._job = job
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
        yield self._gauge(
            "backing_attached", "Whether the disk still has a backing.", "backing" in report
        )
        if "backing" in report:
            yield from self._backing(report["backing"])
        if "job" in report:
            yield from self._stream(report["job"])

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


# -- over HTTP -----------------------------------------------------------------------------


def listen_metrics(address: str) -> list[Listener]:
    """Open HOST:PORT, to be served later; no host means this host alone.

    Raises UsageError, OSError.
    """
    where = parse_tcp(address)
    return listen_tcp(where.host or "localhost", where.port)


async def serve_metrics(listeners: list[Listener], collector: Collector) -> None:
    """Answer scrapes until cancelled; then close the listeners."""
    registry = CollectorRegistry()
    registry.register(collector)

    scrapes = _Scrapes(registry)

    async def serve(client: Client) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(client.socket))
        try:
            with trio.move_on_after(REQUEST_SECONDS):
                async with stream:
                    head = await _read_head(stream)
                    await stream.send_all(await _answer(head, scrapes))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("a client of the metrics is gone")

    acceptor = Acceptor("metrics client", serve, limit=MAX_CLIENTS, grace=GRACE)
    async with trio.open_nursery() as clients:
        await acceptor.run(listeners, clients)


class _Scrapes:
    """Makes what a scrape returns. One takes about a millisecond, in which no guest is
    served, so there is a pause of `PAUSE` seconds between any two."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._turn = trio.Lock()
        self._next = -math.inf
        self._failures = Episode()

    async def take(self) -> bytes | None:
        """The metrics as text, or None if they cannot be had now; the log says why."""
        async with self._turn:
            await trio.sleep_until(self._next)
            self._next = trio.current_time() + PAUSE
            try:
                return generate_latest(self._registry)
            except Exception:
                if self._failures.begins():
                    log.exception("the metrics cannot be collected")
                return None


async def _read_head(stream: trio.SocketStream) -> bytes:
    """A request up to its empty line; whatever came if it ends or is too long before."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) <= REQUEST_LIMIT:
        data = await stream.receive_some()
        if not data:
            break
        head += data
    return head


async def _answer(head: bytes, scrapes: _Scrapes) -> bytes:
    """The response to a request (RFC 9112), which ends the connection."""
    words = head.partition(b"\r\n")[0].split(b" ")
    if b"\r\n\r\n" not in head or len(words) != 3 or not words[2].startswith(b"HTTP/1."):
        return _response("400 Bad Request", b"not an HTTP/1 request\n")
    method, target, _ = words
    if target.partition(b"?")[0] != b"/metrics":
        return _response("404 Not Found", b"see /metrics\n")
    if method not in (b"GET", b"HEAD"):
        return _response("405 Method Not Allowed", b"GET or HEAD\n")
    body = await scrapes.take()
    if body is None:
        return _response("500 Internal Server Error", b"the server's log says why\n")
    return _response("200 OK", body, CONTENT_TYPE_LATEST, only_head=method == b"HEAD")


def _response(
    status: str, body: bytes, content_type: str = "text/plain", *, only_head: bool = False
) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nAllow: GET, HEAD\r\nConnection: close\r\n\r\n"
    ).encode()
    return head if only_head else head + body
