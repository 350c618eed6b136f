# SPDX-License-Identifier: Apache-2.0
"""`nbdstream watch` on a real terminal: what is on the screen of a tmux of a given size."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdstream.cli.cells import weigh
from nbdstream.cli.dashboard import Dashboard, sparkline
from nbdstream.qmp.protocol import Event
from testbed.peers import (
    Peer,
    Qmp,
    binary,
    make_image,
    nbdkit,
    nbdstream_serve,
    run,
    temporary_directory,
)

MIB = 1 << 20
SIZE = 64 * MIB
PATIENCE = 30.0


# --- without a terminal -----------------------------------------------------------------


def test_cells_share_what_lies_across_their_border() -> None:
    assert weigh([(0, 6, 0), (6, 2, 1), (8, 2, 2)], 10, 2) == [[5, 0, 0], [1, 2, 2]]
    for cell in weigh([(0, 10, 2)], 10, 3):
        assert cell == pytest.approx([0, 0, 10 / 3])


def test_a_graph_is_as_high_as_its_highest_value() -> None:
    assert sparkline([0, 5, 10], 5) == "  ▁▅█"
    assert sparkline([0, 0], 2) == "▁▁"
    assert sparkline(range(100), 3) == "███"
    assert sparkline([], 3) == "   "


def report(**changes: Any) -> dict[str, Any]:
    disk = {"demand-misses": 3, "demand-bytes": 12288, "fetched-bytes": MIB}
    backing = {"uri": "nbd://store/", "connected": True, "connections": 4, "window": MIB}
    backing |= {"base-rtt": 0.05, "queue-delay": 0.01, "since": 0, "last-error": ""}
    job = {"status": "running", "offset": SIZE // 4, "rate": 2 * MIB, "eta": 24.0}
    return {"size": SIZE, "disk": disk, "backing": backing, "job": job} | changes


def shown(dashboard: Dashboard, width: int, height: int) -> list[str]:
    lines = [line.plain for line in dashboard.lines(width, height)]
    assert len(lines) <= height and max(map(len, lines)) <= width
    return lines


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (40, 10), (10, 3)])
def test_every_size_of_terminal(width: int, height: int) -> None:
    dashboard = Dashboard("disk0: leaf", SIZE)
    assert shown(dashboard, width, height)[0].startswith("waiting f")
    for second in range(100):
        dashboard.look(report(), second)
    dashboard.map([{"start": 0, "length": SIZE, "present": True, "zero": False}])
    for _ in range(30):
        dashboard.happened(Event("JOB_STATUS_CHANGE", {"status": "running"}))
    assert shown(dashboard, width, height)[0].startswith("disk0: l")


def test_what_strangers_wrote_is_no_command_to_the_terminal() -> None:
    dashboard = Dashboard("disk0: \x1b[2Jleaf", SIZE)
    dashboard.look(report(problems=["\x1b]0;title\x07"]), 0)
    dashboard.happened(Event("X", {"words": "\x1b[31m"}))
    assert not any("\x1b" in line for line in shown(dashboard, 120, 50))


def test_the_rate_of_misses_and_a_lost_backing() -> None:
    dashboard = Dashboard("x", SIZE)
    dashboard.look(report(), 10.0)
    lost = report()["backing"] | {"connected": False, "last-error": "no route"}
    lost["since"] = time.time()
    disk = report()["disk"] | {"demand-misses": 13}
    dashboard.look(report(disk=disk, backing=lost), 12.0)
    text = "\n".join(shown(dashboard, 100, 30))
    assert "misses/s          5.0" in text
    assert "LOST: no route" in text


# --- in tmux ----------------------------------------------------------------------------


class Terminal:
    """A tmux of its own with one program in it."""

    def __init__(self, directory: Path, command: list[str], width: int, height: int) -> None:
        self._tmux = ["tmux", "-u", "-f", "/dev/null", "-S", str(directory / "tmux")]
        # Behind the program, what a user's shell would be.
        behind = 'trap : INT; "$@"; echo "status $?"; exec sleep 600'
        words = [
            "env",
            "-u",
            "COLUMNS",
            "-u",
            "LINES",
            "LANG=C.UTF-8",
            "sh",
            "-c",
            behind,
            "sh",
            *command,
        ]
        run([*self._tmux, "new-session", "-d", "-x", str(width), "-y", str(height), *words])

    def screen(self) -> str:
        return run([*self._tmux, "capture-pane", "-p"])

    def wait_for(self, what: Callable[[str], object]) -> str:
        """The screen as soon as it is as wanted."""
        deadline = time.monotonic() + PATIENCE
        while True:
            text = self.screen()
            if what(text):
                return text
            assert time.monotonic() < deadline, text
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        run([*self._tmux, "send-keys", *keys])

    def resize(self, width: int, height: int) -> None:
        run([*self._tmux, "resize-window", "-x", str(width), "-y", str(height)])

    def close(self) -> None:
        run([*self._tmux, "kill-server"], check=False)


@contextmanager
def watching(server: Peer, width: int, height: int) -> Iterator[Terminal]:
    with temporary_directory() as directory:
        command = [binary("NBDSTREAM"), "watch", str(server.control)]
        terminal = Terminal(directory, command, width, height)
        try:
            yield terminal
        finally:
            terminal.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Peer]:
    """One whose job waits; 64 MiB of data are remote."""
    make_image(tmp_path / "base.raw", SIZE, sparse=False)
    with nbdkit("file", tmp_path / "base.raw", readonly=True) as far:
        leaf = tmp_path / "leaf.qcow2"
        with nbdstream_serve(leaf, far.uri, "--stream", "paused") as peer:
            yield peer


def test_the_disk_fills_up_and_the_display_ends_with_the_job(server: Peer) -> None:
    assert server.control is not None
    with watching(server, 80, 24) as terminal, Qmp(server.control) as qmp:
        text = terminal.wait_for(lambda text: text.count("░") > 400)
        assert "leaf.qcow2 (qcow2, 64.0 MiB)" in text
        assert "0.0 % local" in text and "paused" in text
        assert "connected (" in text and "rate " in text and "latency " in text
        assert len(text.splitlines()) <= 24
        remote = text.count("░")
        qmp.execute("x-nbdstream-stream", device="disk0", offset=0, length=SIZE // 2)
        text = terminal.wait_for(lambda text: text.count("█") > 100 and text.count("░") < remote)
        filled = [line for line in text.splitlines() if line.startswith("█" * 80)]
        assert filled, text
        qmp.execute("block-job-resume", device="disk0")
        text = terminal.wait_for(lambda text: "status 0" in text)
        # The terminal is as it was, and one line says how it ended.
        assert "100.0 % local" in text and "░" not in text


def test_it_follows_the_size_of_the_terminal(server: Peer) -> None:
    with watching(server, 80, 24) as terminal:
        terminal.wait_for(lambda text: "░" * 80 in text)
        terminal.resize(120, 40)
        text = terminal.wait_for(lambda text: "░" * 120 in text)
        assert text.count("░" * 120) > 10
        terminal.resize(50, 15)
        terminal.wait_for(lambda text: "░" * 50 in text and "░" * 51 not in text)


def test_ctrl_c_ends_it_and_leaves_the_server_alone(server: Peer) -> None:
    with watching(server, 80, 24) as terminal:
        terminal.wait_for(lambda text: "░" * 80 in text)
        terminal.press("C-c")
        assert "░" not in terminal.wait_for(lambda text: "status 130" in text)
    assert server.process.poll() is None


def test_events_are_shown(server: Peer) -> None:
    assert server.control is not None
    with watching(server, 100, 40) as terminal, Qmp(server.control) as qmp:
        terminal.wait_for(lambda text: "░" * 100 in text)
        qmp.execute("block-job-set-speed", device="disk0", speed=1000)
        qmp.execute("job-resume", id="disk0")
        terminal.wait_for(lambda text: "JOB_STATUS_CHANGE" in text and "running" in text)


def test_a_server_that_goes_away_is_an_error(server: Peer) -> None:
    with watching(server, 80, 24) as terminal:
        terminal.wait_for(lambda text: "░" * 80 in text)
        server.kill()
        assert "nbdstream: error:" in terminal.wait_for(lambda text: "status 1" in text)


def test_keys_steer_the_job_and_leave(server: Peer) -> None:
    assert server.control is not None
    with watching(server, 100, 24) as terminal, Qmp(server.control) as qmp:
        terminal.wait_for(lambda text: "space pause" in text and "paused" in text)
        terminal.press("-")
        terminal.wait_for(lambda text: "limit 64.0 KiB/s" in text)
        terminal.press("+")
        terminal.wait_for(lambda text: "limit 128.0 KiB/s" in text)
        terminal.press("x", "Space")
        terminal.wait_for(lambda text: "ETA" in text)
        (job,) = qmp.execute("query-block-jobs")
        assert job["status"] == "running" and job["speed"] == 128 << 10
        terminal.press("Space")
        terminal.wait_for(lambda text: ", paused" in text)
        terminal.press("0")
        terminal.wait_for(lambda text: "limit 1" not in text)
        (job,) = qmp.execute("query-block-jobs")
        assert job["status"] == "paused" and job["speed"] == 0
        terminal.press("q")
        text = terminal.wait_for(lambda text: "status 130" in text)
        assert "░" not in text
    assert server.process.poll() is None
