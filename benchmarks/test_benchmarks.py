# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own parts, against real peers: a wrong ruler measures nothing."""

import io
import math
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.boot import Reads, count
from benchmarks.chart import Band, Chart, Panel, Series
from benchmarks.load import fio, fio_command, run_fio
from benchmarks.picture import END, Recording, draw
from benchmarks.report import Report, judged, median, ratio
from nbdstream.backing.base import Priority
from nbdstream.backing.scheduler import Sample
from testbed.far import far_backing, qemu_leaf
from testbed.link.model import Shape
from testbed.peers import (
    PeerError,
    assert_same,
    make_image,
    make_qcow2,
    nbdkit,
    temporary_directory,
)
from testbed.processes import processor_seconds, resident_bytes

MIB = 1 << 20


def test_a_load_is_counted() -> None:
    with nbdkit("memory", "16M") as peer:
        result = run_fio(fio_command(peer.uri, "randrw", "4k", 4, "--io_size=2M"), 10)
        assert result.operations == 512
        assert result.rate == pytest.approx(result.iops * 4096, rel=0.01)


def test_latency_is_in_milliseconds() -> None:
    with nbdkit("memory", "16M", "rdelay=20ms", filters=["delay"]) as peer:
        result = fio(peer.uri, "randread", "4k", 1, 0.3)
    assert 20 <= result.p50 <= result.p99
    assert result.mean >= 20
    assert result.iops <= 50


def test_a_load_that_cannot_be_put_on_is_an_error() -> None:
    with temporary_directory() as directory:
        with pytest.raises(PeerError, match="fio"):
            fio(f"nbd+unix:///?socket={directory}/absent", "read", "4k", 1, 0.1)


def test_qemu_streams_from_far_away() -> None:
    with temporary_directory() as directory:
        image, leaf = directory / "far.raw", directory / "leaf.qcow2"
        make_image(image, 4 * MIB)
        make_qcow2(leaf, 4 * MIB)
        with far_backing(Shape(delay=0.001), "file", image) as far:
            with qemu_leaf(leaf, far.socket) as qemu:
                before = far.received()
                qemu.stream()
                far.wait_bulk(before)
                while qemu.streamed() is not None:
                    time.sleep(0.005)
        # The backing is gone, and everything is there.
        assert_same(image, leaf, "raw", "qcow2")


def test_what_is_read_more_than_once_is_counted() -> None:
    reads = [(0, 100), (200, 50), (50, 100), (225, 50), (210, 10), (1000, 10), (1000, 10)]
    assert count(reads, []) == Reads(fetched=330, twice=50 + 25 + 10 + 10)
    assert count(reads, [(1000, 10), (200, 40)]) == Reads(fetched=310, twice=50 + 25 + 10)


def test_processes_are_accounted_for() -> None:
    start, used = time.monotonic(), processor_seconds(os.getpid())
    while processor_seconds(os.getpid()) < used + 0.05:
        assert time.monotonic() < start + 30
    assert 0 < resident_bytes(os.getpid()) <= resident_bytes(os.getpid(), peak=True)


def test_figures() -> None:
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(3.0, 0.0) is None
    assert ratio(None, 2.0) is None
    assert median([]) is None
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert judged(1.234, least=1.5) == "1.23 (>= 1.5)"
    assert judged(1.234, most=1.5) == "1.23 (<= 1.5)"


def test_a_table_is_plain_and_whole_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report("A title", ["server", "IOPS"], [["ours", 12345.6], ["theirs", None]])
    report.add_recipe(["/usr/bin/server", Path("/tmp/x/image")], Path("/tmp/x"))
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    report.print()
    lines = output.getvalue()
    assert lines.isascii()
    for words in ("A title", "12,346", "theirs", "$ server DIR/image"):
        assert words in lines
    assert math.isclose(report.as_json()["rows"][0][1], 12345.6)


def test_an_unknown_benchmark_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nonsense"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 2
    assert "no such benchmark: nonsense" in done.stderr


SVG = "{http://www.w3.org/2000/svg}"


def test_a_chart_has_every_point_on_its_scale() -> None:
    dots = Series("reads <slow>", "dots", [(1.0, 5.0), (2.0, 80.0), (11.0, 1.0)])
    line = Series("limit", "limit", [(0.0, 40.0), (10.0, 40.0)])
    chart = Chart("a & b", 10.0, [Panel("ms", [line, dots])], [Band(2.0, 4.0, "busy")])
    root = ElementTree.fromstring(chart.svg())
    texts = {element.text for element in root.iter(f"{SVG}text")}
    assert {"a & b", "ms", "reads <slow>", "limit", "busy", "100", "seconds"} <= texts
    circles = [(float(e.get("cx", "")), float(e.get("cy", ""))) for e in root.iter(f"{SVG}circle")]
    points = circles[:-1]  # the last is the legend's; what is later than the end is not shown
    assert len(points) == 2
    (x_early, y_low), (x_late, y_high) = points
    assert x_late > x_early and y_high < y_low


def test_the_picture_of_the_window_shows_what_was_recorded() -> None:
    recording = Recording(reads=[(7.0, 0.03), (8.0, 0.05)])
    for step in range(int(END * 10)):
        recording.samples.append(
            Sample(
                time=step / 10,
                priority=Priority.STREAM,
                length=1 << 20,
                latency=0.03,
                window=400 << 10,
                in_flight=300 << 10,
                rate=1e7,
                base_rtt=0.02,
                queue_delay=0.002,
            )
        )
    root = ElementTree.fromstring(draw(recording))
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    assert {"delivered, Mbit/s", "bytes, KiB", "a guest's read, ms"} <= set(texts)
    assert len(list(root.iter(f"{SVG}circle"))) == 2 + 1
    curves = [e for e in root.iter(f"{SVG}path") if e.get("d", "").count("L") > 10]
    assert len(curves) == 3  # rate, in flight, window
