# SPDX-License-Identifier: Apache-2.0
"""The report, as a file and live, in a real browser (Debian's Chromium)."""

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from playwright.sync_api import Browser, Page, expect, sync_playwright

from nbdstream.backing.latency import BOUNDS, Latency
from nbdstream.control import history, page
from nbdstream.control.history import History
from nbdstream.control.page import RANGES_SHOWN, cells_of
from nbdstream.leaf.base import State
from nbdstream.streamer.profile import Profile, Range, write_profile
from testbed.peers import Peer, make_image, nbdkit, nbdstream_serve
from tests.control_room import control_room
from tests.serve_support import client, nbdstream
from tests.small_disk import SIZE

MIB = 1 << 20
DISK = 32 * MIB


# -- what it is made of ----------------------------------------------------------------------


def test_a_latency_is_counted_in_the_bucket_that_it_fits() -> None:
    latency = Latency()
    for seconds in (0.0, 0.001, 0.0011, 0.5, 1000.0):
        latency.add(seconds)
    counts = latency.counts()
    assert counts["count"] == 5 and counts["sum"] == pytest.approx(1000.5021)
    by_bound = dict(zip(BOUNDS, counts["buckets"], strict=True))
    assert (by_bound[0.001], by_bound[0.002], by_bound[0.2], by_bound[0.5]) == (2, 3, 3, 4)
    assert by_bound[60.0] == 4


async def test_the_cells_say_what_the_leaf_has(tmp_path: Path) -> None:
    async with control_room(tmp_path) as room:
        room.leaf._mark(0, 2048, State.DATA)
        room.leaf._mark(2048, 512, State.ZERO)
        found = await cells_of(room.disk)
        count = found["cells"]
        assert count == SIZE // 512 and found["seen"] == SIZE
        # The disk is no multiple of a block: cells are a little larger than one.
        assert found["local"].startswith("fff") and found["zero"][4] != "0"
        assert set(found["local"][5:]) == {"0"} and set(found["zero"][6:]) == {"0"}


async def test_history_is_bounded_and_ends_when_all_is_local(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "SAMPLES_MOST", 8)
    async with control_room(tmp_path, gated=True) as room, trio.open_nursery() as nursery:
        record = History(room.disk, room.job)
        nursery.start_soon(record.run)
        await trio.sleep(20.5)
        columns = record.as_json()
        lengths = {len(columns[name]) for name in ("span", "misses", "wait", "local", "window")}
        assert lengths == {len(columns["span"])} and len(columns["span"]) < 8
        assert sum(columns["span"]) == pytest.approx(20.0)
        assert {len(values) for values in columns["rate"].values()} == lengths
        room.backing.gated = False
        room.stream.start()
        await room.stream.completed.wait()
        await trio.sleep(5)
        columns = record.as_json()
        assert columns["local"][-1] == SIZE
        await trio.sleep(5)
        assert record.as_json() == columns


def test_what_strangers_wrote_cannot_end_the_data() -> None:
    text = page.page({"leaf": "</script><script>alert(1)</script><!--"}, live=False)
    assert text.count("</script>") == 2 and "<!--" not in text.partition("/json")[2]


# -- in a browser ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Its sandbox wants user namespaces, and no root.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Peer]:
    make_image(tmp_path / "far.raw", DISK, sparse=False)
    with nbdkit("file", tmp_path / "far.raw", readonly=True) as peer:
        yield peer


def opened(browser: Browser, url: str, troubles: list[str], scheme: str = "light") -> Page:
    """The page, as someone sees it who prefers this colour scheme. ``troubles`` gets its errors,
    and what it asks for elsewhere."""
    context = browser.new_context(
        color_scheme="dark" if scheme == "dark" else "light",
        viewport={"width": 1200, "height": 900},
    )
    tab = context.new_page()
    origin = url.partition("://")[2].partition("/")[0]
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    tab.on(
        "console",
        lambda message: troubles.append(message.text) if message.type == "error" else None,
    )
    tab.on(
        "request",
        lambda request: (
            None
            if request.url == url or (origin and origin in request.url)
            else troubles.append(request.url)
        ),
    )
    tab.goto(url)
    return tab


COLOURS = {
    "local": (0x1F, 0x8A, 0x5B),
    "remote": (0xE4, 0xE7, 0xEC),
    "local in the dark": (0x35, 0xB2, 0x7C),
}


def colour_at(tab: Page, x: float, y: float) -> str:
    """What a pixel of the map stands for, at a share of its width and height."""
    found: list[int] = tab.evaluate(
        """([x, y]) => { const c = document.getElementById("map");
        return [...c.getContext("2d").getImageData(c.width * x, c.height * y, 1, 1).data]; }""",
        [x, y],
    )
    for name, colour in COLOURS.items():
        if all(abs(a - b) <= 3 for a, b in zip(found, colour, strict=False)):
            return name
    return str(found)


def test_the_report_is_one_file_that_shows_the_disk(
    tmp_path: Path, far: Peer, browser: Browser
) -> None:
    """With a name that would be a script, and a boot profile beside the leaf."""
    leaf = tmp_path / "<img src=x onerror=alert(1)>.qcow2"
    ranges = tuple(Range(index * 8192, 4096) for index in range(RANGES_SHOWN + 1))
    write_profile(f"{leaf}.profile", Profile(DISK, "", 4096, 12.5, True, ranges))
    target, troubles = tmp_path / "page.html", list[str]()
    with nbdstream_serve(leaf, far.uri, "--stream", "paused", export="vm7") as server:
        with client(server.uri) as handle:
            handle.pread(4096, 0)
            handle.pread(4096, 20 * MIB)
            assert server.control is not None
            done = nbdstream("report", server.control, "-o", target)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    text = target.read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text) and "url(" not in text
    tab = opened(browser, target.as_uri(), troubles)
    expect(tab.locator("h1")).to_have_text("vm7")
    expect(tab.locator("#leaf")).to_contain_text("<img src=x onerror=alert(1)>.qcow2 · qcow2")
    expect(tab.locator("#state")).to_have_text("paused")
    expect(tab.locator("#tiles")).to_contain_text("2misses")
    expect(tab.locator("#tiles")).to_contain_text("1client")
    expect(tab.locator("#facts")).to_contain_text(far.uri)
    expect(tab.locator("#quantiles tr").nth(1)).to_contain_text("demand20")  # 18 of the fingerprint
    expect(tab.locator("#proftext")).to_contain_text("4,001 ranges, 13 s")
    assert tab.locator("#profile path").count() == 1
    assert colour_at(tab, 0.001, 0.01) == "local" and colour_at(tab, 0.5, 0.3) == "remote"
    assert troubles == []
    dark = opened(browser, target.as_uri(), troubles, "dark")
    assert colour_at(dark, 0.001, 0.01) == "local in the dark"
    assert dark.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 19, 26)"
    dark.set_viewport_size({"width": 360, "height": 700})
    assert dark.evaluate("document.documentElement.scrollWidth") <= 360
    assert troubles == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_the_live_page_follows_the_disk_to_its_end(
    tmp_path: Path, far: Peer, browser: Browser
) -> None:
    leaf, port, troubles = tmp_path / "leaf.qcow2", free_port(), list[str]()
    metrics = ("--metrics", f"127.0.0.1:{port}")
    with nbdstream_serve(leaf, far.uri, "--stream", "paused", *metrics):
        tab = opened(browser, f"http://127.0.0.1:{port}/", troubles)
        expect(tab.locator("#state")).to_have_text("paused")
        assert colour_at(tab, 0.5, 0.5) == "remote"
        assert nbdstream("resume", leaf).returncode == 0
        expect(tab.locator("#state")).to_have_text("complete: all of it is local", timeout=20_000)
        assert colour_at(tab, 0.5, 0.5) == "local"
        expect(tab.locator("#tiles")).to_contain_text("100 %")
        assert tab.locator("#rates path").count() == 4
        expect(tab.locator("#quantiles")).to_contain_text("stream")
        assert troubles == []
    expect(tab.locator("#state")).to_have_text("the server does not answer")


def test_the_report_on_stdout_and_its_data(tmp_path: Path, far: Peer) -> None:
    leaf = tmp_path / "leaf.raw"
    with nbdstream_serve(leaf, far.uri, "--stream", "off"):
        text = nbdstream("report", leaf, "-o", "-").stdout
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert found
    data = json.loads(found[1])
    assert data["map"]["cells"] == len(data["map"]["local"]) == len(data["map"]["zero"])
    assert data["live"] is False and data["profile"] is None
