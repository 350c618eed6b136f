# SPDX-License-Identifier: Apache-2.0
"""Metrics: what they say of a disk, and what the small HTTP server does with its clients."""

import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from nbdstream.control import web
from nbdstream.control.metrics import DiskCollector, metrics_page
from nbdstream.control.web import listen_web, serve_web
from nbdstream.errors import UsageError
from nbdstream.server.traffic import Traffic
from tests.control_room import DEVICE, Room, control_room
from tests.small_disk import SIZE


class Scraped:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}

    def value(self, name: str, **labels: str) -> float:
        wanted = {"device": DEVICE} | labels
        (value,) = (
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and sample.labels == wanted
        )
        return value


@asynccontextmanager
async def scraped_room(
    tmp_path: Path, *, backing: bool = True, gated: bool = False
) -> AsyncIterator[tuple[Room, int]]:
    """A room whose metrics are served; with the port."""
    async with control_room(tmp_path, backing=backing, gated=gated) as room:
        listeners = listen_web("127.0.0.1:0")
        port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            collector = DiskCollector(room.disk, room.job, Traffic(), DEVICE)
            nursery.start_soon(serve_web, listeners, {"/metrics": metrics_page(collector)})
            yield room, port
            nursery.cancel_scope.cancel()


async def scrape(port: int) -> Scraped:
    def fetch() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as response:
            assert response.status == 200
            assert response.headers["Content-Type"].startswith("text/plain")
            return str(response.read().decode())

    return Scraped(await trio.to_thread.run_sync(fetch))


async def talk(port: int, request: bytes) -> bytes:
    """Send bytes, then nothing more; everything that comes back."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(request)
        await stream.send_eof()
        answer = b""
        while data := await stream.receive_some():
            answer += data
    return answer


# -- what they say ---------------------------------------------------------------------------


async def test_a_stream_job_from_its_start_to_its_end(tmp_path: Path) -> None:
    async with scraped_room(tmp_path, gated=True) as (room, port):
        room.stream.set_speed(5000)
        room.stream.start()
        await trio.testing.wait_all_tasks_blocked()
        before = await scrape(port)
        assert before.value("nbdstream_disk_size_bytes") == SIZE
        assert before.value("nbdstream_backing_attached") == 1
        assert before.value("nbdstream_backing_connected") == 1
        assert before.value("nbdstream_stream_speed_limit_bytes") == 5000
        assert before.value("nbdstream_stream_local_bytes") == 0
        assert before.value("nbdstream_stream_status", status="running") == 1
        assert before.value("nbdstream_stream_status", status="null") == 0
        assert before.value("nbdstream_disk_fetches_in_flight") > 0
        room.backing.gated = False
        for read in room.backing.waiting:
            read.gate.set()
        await room.stream.completed.wait()
        after = await scrape(port)
        assert after.value("nbdstream_backing_attached") == 0
        assert "nbdstream_backing_connected" not in after.families
        assert after.value("nbdstream_stream_local_bytes") == SIZE
        assert after.value("nbdstream_stream_remaining_bytes") == 0
        assert after.value("nbdstream_disk_fetched_bytes_total") == SIZE
        assert after.value("nbdstream_stream_status", status="null") == 1


async def test_what_a_guest_waited_for(tmp_path: Path) -> None:
    async with scraped_room(tmp_path) as (room, port):
        for offset in (0, 8192):
            await room.disk.read(memoryview(bytearray(512)), offset)
        found = await scrape(port)
        assert found.value("nbdstream_disk_demand_misses_total") == 2
        assert found.families["nbdstream_disk_demand_misses"].type == "counter"
        assert found.families["nbdstream_disk_fetches_in_flight"].type == "gauge"


async def test_reads_of_the_backing_by_priority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scraped_room(tmp_path) as (room, port):
        now = room.backing.statistics()
        now.requests.update(demand=3, stream=4)
        now.bytes.update(demand=300, stream=400)
        monkeypatch.setattr(room.backing, "statistics", lambda: now)
        found = await scrape(port)
        assert found.value("nbdstream_backing_read_requests_total", priority="demand") == 3
        assert found.value("nbdstream_backing_read_bytes_total", priority="stream") == 400


async def test_a_plain_local_disk(tmp_path: Path) -> None:
    async with scraped_room(tmp_path, backing=False) as (_, port):
        found = await scrape(port)
        assert found.value("nbdstream_backing_attached") == 0
        assert not [name for name in found.families if name.startswith("nbdstream_stream")]


# -- HTTP ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", b"200 OK"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405 Method Not Allowed"),
        (b"GET /metrics HTTP/2\r\n\r\n", b"400 Bad Request"),
        (b"GET /metrics\r\n\r\n", b"400 Bad Request"),
        (b"\xff\x00\r\n\r\n", b"400 Bad Request"),
        (b"GET /metrics HTTP/1.1\r\nHost:", b"400 Bad Request"),
        (b"", b"400 Bad Request"),
    ],
)
async def test_each_request_gets_its_status(tmp_path: Path, request_: bytes, status: bytes) -> None:
    async with scraped_room(tmp_path) as (_, port):
        answer = await talk(port, request_)
        assert answer.startswith(b"HTTP/1.1 " + status + b"\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}\r\n".encode() in head


async def test_head_is_all_of_get_but_the_body(tmp_path: Path) -> None:
    async with scraped_room(tmp_path) as (_, port):
        got = await talk(port, b"GET /metrics HTTP/1.1\r\n\r\n")
        head = await talk(port, b"HEAD /metrics HTTP/1.1\r\n\r\n")
        assert got.startswith(head) and head.endswith(b"\r\n\r\n")


async def test_an_endless_request_is_cut_off(tmp_path: Path) -> None:
    async with scraped_room(tmp_path) as (_, port):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await stream.send_all(b"x" * 1000)
        assert (await scrape(port)).value("nbdstream_disk_size_bytes") == SIZE


async def test_a_silent_client_is_hung_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "REQUEST_SECONDS", 0.05)
    async with scraped_room(tmp_path) as (_, port):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            assert await stream.receive_some() == b""


async def test_only_this_host_gets_in_by_default() -> None:
    listeners = listen_web(":0")
    try:
        addresses = {listener.socket.getsockname()[0] for listener in listeners}
    finally:
        for listener in listeners:
            listener.close()
    assert addresses <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize("address", ["9100", "host:port", ":70000", "no.such.host.invalid:1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(UsageError):
        listen_web(address)


async def test_figures_that_this_does_not_know_are_counters(tmp_path: Path) -> None:
    """The disk may learn to count more: nothing has to change here."""
    async with scraped_room(tmp_path) as (room, port):
        known = room.disk.statistics()

        def more() -> dict[str, Any]:
            return known | {"new_things": 11}

        room.disk.statistics = more  # type: ignore[method-assign]
        assert (await scrape(port)).value("nbdstream_disk_new_things_total") == 11


# --- trouble ------------------------------------------------------------------------------


async def test_a_scrape_that_fails_is_answered_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Collector):
        fails = True

        def collect(self) -> Iterator[Metric]:
            if self.fails:
                raise ZeroDivisionError("oops")
            yield GaugeMetricFamily("fine", "As it should be.", 1)

    collector = Broken()
    listeners = listen_web(":0")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        collector.fails = False  # a registry asks once by itself
        nursery.start_soon(serve_web, listeners, {"/metrics": metrics_page(collector)})
        await trio.testing.wait_all_tasks_blocked()
        collector.fails = True
        for _ in range(3):
            assert b" 500 " in await talk(port, b"GET /metrics HTTP/1.1\r\n\r\n")
        collector.fails = False
        assert b"fine 1.0" in await talk(port, b"GET /metrics HTTP/1.1\r\n\r\n")
        nursery.cancel_scope.cancel()
    assert [record.levelname for record in caplog.records] == ["ERROR"]


async def test_silent_clients_do_not_keep_scrapes_out(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with scraped_room(tmp_path) as (_, port):
        silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(40)]
        began = trio.current_time()
        assert b" 200 " in await talk(port, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert trio.current_time() - began < web.REQUEST_SECONDS
        for each in silent:
            await each.aclose()
