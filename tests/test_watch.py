# SPDX-License-Identifier: Apache-2.0
"""`nbdstream watch` on a real terminal: what is on the screen of a tmux of a given size."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdstream.cli.cells import weigh
from nbdstream.cli.dashboard import Dashboard, sparkline
from nbdstream.cli.overview import Key, Overview
from nbdstream.cli.watched import Watched
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
from testbed.terminal import PATIENCE, Terminal

MIB = 1 << 20
SIZE = 64 * MIB


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


def watched(name: str, **changes: Any) -> Watched:
    disk = Watched(f"/run/{name}.qmp")
    disk.name, disk.dashboard = name, Dashboard(f"disk0: {name}", SIZE)
    disk.dashboard.look(report(**changes), 0)
    return disk


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (40, 10), (10, 3), (24, 1)])
@pytest.mark.parametrize("count", [1, 2, 100])
def test_many_disks_on_every_size_of_terminal(count: int, width: int, height: int) -> None:
    disks = [watched(f"vm{number}.qcow2") for number in range(count)]
    overview = Overview(disks, keys=True)
    for key in [*[Key.DOWN] * 70, Key.ENTER, Key.UP, Key.BACK, *[Key.UP] * 5]:
        overview.move(key)
        lines = [line.plain for line in overview.lines(width, height)]
        assert len(lines) <= height and max(map(len, lines)) <= width
        if width >= 40 and height > 2:
            assert overview.chosen.name in "\n".join(lines)
    assert overview.chosen is disks[min(70, count - 1) - 6 if count > 6 else 0]


def test_a_line_for_each_disk() -> None:
    done, failed, new = watched("done"), watched("failed"), Watched("/run/\x1b[31mnew.qmp")
    done.end("")
    failed.end("no space\x1b[2J")
    lost = {"uri": "nbd://far/", "connected": False, "since": 0, "last-error": "no route"}
    cut = watched("cut", backing=report()["backing"] | lost)
    paused = watched("paused", job={"status": "paused", "offset": SIZE // 2})
    overview = Overview([watched("runs"), paused, done, failed, cut, new], keys=False)
    head, _, *lines = [line.plain for line in overview.lines(100, 20)]
    assert head.startswith(
        "6 disks, 45.0 % of 320.0 MiB local, 4.0 MiB/s, 2 running, 1 paused, 1 c"
    )
    assert lines[0].startswith("▸ runs") and lines[0].endswith("25.0 %     2.0 MiB/s       24s")
    assert "50.0 %        paused" in lines[1]
    assert "█" * 30 in lines[2] and "100.0 %      complete" in lines[2]
    assert "no space" in lines[3] and "backing lost" in lines[4] and "connecting" in lines[5]
    assert not any("\x1b" in line for line in lines)


# --- in tmux ----------------------------------------------------------------------------


@contextmanager
def watching(server: Peer, width: int, height: int) -> Iterator[Terminal]:
    with on_terminal(width, height, str(server.control)) as terminal:
        yield terminal


@contextmanager
def on_terminal(width: int, height: int, *controls: str) -> Iterator[Terminal]:
    with temporary_directory() as directory:
        command = [binary("NBDSTREAM"), "watch", *controls]
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


# --- several disks ----------------------------------------------------------------------


@pytest.fixture
def guests(tmp_path: Path) -> Iterator[tuple[Path, list[Peer]]]:
    """Three servers with paused jobs, and a directory with their control sockets, and with sockets
    and files of others."""
    make_image(tmp_path / "base.raw", SIZE, sparse=False)
    with ExitStack() as stack:
        run_ = stack.enter_context(temporary_directory())
        far = stack.enter_context(nbdkit("file", tmp_path / "base.raw", readonly=True))
        servers = [
            stack.enter_context(
                nbdstream_serve(
                    tmp_path / f"vm{number}.qcow2",
                    far.uri,
                    *("--stream", "paused"),
                    socket_path=run_ / f"vm{number}.nbd",
                )
            )
            for number in range(3)
        ]
        for number, server in enumerate(servers):
            assert server.control is not None
            (run_ / f"vm{number}.qmp").symlink_to(server.control)
        (run_ / "notes").write_text("no socket")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(run_ / "dead.qmp"))
        yield run_, servers


def test_several_disks_of_which_one_is_steered(guests: tuple[Path, list[Peer]]) -> None:
    place, _ = guests
    with on_terminal(100, 24, str(place)) as terminal, Qmp(place / "vm1.qmp") as qmp:
        text = terminal.wait_for(lambda text: text.count(" paused") >= 3 and text.count("░") > 90)
        assert "3 disks, 0.0 % of 192.0 MiB local, 3 paused" in text
        assert "▸ vm0.qcow2" in text and "  vm1.qcow2" in text and "  vm2.qcow2" in text
        terminal.press("Down")
        terminal.wait_for(lambda text: "▸ vm1.qcow2" in text)
        terminal.press("-")
        terminal.press("Enter")
        text = terminal.wait_for(lambda text: "limit 64.0 KiB/s" in text)
        assert "disk0: vm1.qcow2" in text and "vm0" not in text and "window" in text
        terminal.press("0", "Space")
        qmp.wait_event("BLOCK_JOB_COMPLETED")
        terminal.press("Escape")
        terminal.wait_for(lambda text: "33.3 % of 192.0 MiB local, 2 paused, 1 complete" in text)
        terminal.press("Up", "Space", "Down", "Down", "Space")
        text = terminal.wait_for(lambda text: "status 0" in text)
        for number in range(3):
            assert f"vm{number}.qcow2: complete: the whole disk is local" in text


def test_several_disks_without_a_terminal(guests: tuple[Path, list[Peer]]) -> None:
    """A line for each, and how each ended; a server that dies fails the command."""
    servers = guests[1]
    controls = [str(server.control) for server in servers]
    command = [binary("NBDSTREAM"), "watch", *controls]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = sorted(process.stderr.readline() for _ in range(3))
        assert [line.split(",")[0] for line in first] == [
            f"vm{number}.qcow2: 0.0 % local" for number in range(3)
        ]
        for control in controls[:2]:
            run(["nbdstream", "resume", control])
        servers[2].kill()
        said = process.stderr.read()
        assert process.wait(PATIENCE) == 1
    assert "vm0.qcow2: complete: the whole disk is local" in said
    assert "vm1.qcow2: complete: the whole disk is local" in said
    assert "vm2.qcow2: the QMP server closed the connection" in said
    assert said.endswith("nbdstream: error: 1 of 3 disks are not wholly local\n")


def test_servers_that_start_later_are_shown(
    guests: tuple[Path, list[Peer]], tmp_path: Path
) -> None:
    """In a directory: one that starts, and one that starts again after it was killed."""
    place, servers = guests
    for number in (1, 2):
        (place / f"vm{number}.qmp").unlink()
    with on_terminal(100, 24, str(place)) as terminal, ExitStack() as stack:
        terminal.wait_for(lambda text: "disk0: vm0.qcow2" in text)
        (place / "vm1.qmp").symlink_to(str(servers[1].control))
        terminal.wait_for(lambda text: "2 disks" in text and "vm1.qcow2" in text)
        servers[0].kill()
        terminal.wait_for(lambda text: "1 failed" in text)
        again = stack.enter_context(nbdstream_serve(tmp_path / "vm0.qcow2", "", "--speed", "0"))
        (place / "vm0.qmp").unlink()
        (place / "vm0.qmp").symlink_to(str(again.control))
        terminal.wait_for(lambda text: "2 disks" in text and "1 complete" in text)
        run(["nbdstream", "resume", place / "vm1.qmp"])
        text = terminal.wait_for(lambda text: "status 0" in text)
        assert text.count(": complete: the whole disk is local") == 2


def test_a_directory_without_servers_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [binary("NBDSTREAM"), "watch", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no control socket of a running server is in this directory" in done.stderr
