# SPDX-License-Identifier: Apache-2.0
"""Progress: what a line says of a report, and where it is printed."""

import errno
import io
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from nbdstream.backing.base import BackingStatistics
from nbdstream.cli.progress import ProgressLine, Snapshot, show_progress
from nbdstream.control.report import statistics
from tests.control_room import control_room


def report(**job: Any) -> dict[str, Any]:
    """A report as of a running job with a backing; ``job`` changes details."""
    running = {"status": "running", "offset": 3 << 20, "rate": 2.0 * (1 << 20), "eta": 90.0}
    backing = {"connected": True, "since": 0.0, "last-error": ""}
    disk = {"demand-misses": 7}
    return {"size": 12 << 20, "disk": disk, "job": running | job, "backing": backing}


@pytest.mark.parametrize(
    ("details", "text"),
    [
        ({}, "25.0 % local, 3.0 MiB of 12.0 MiB, 2.0 MiB/s, ETA 1m30s, 7 demand misses"),
        ({"eta": None}, "25.0 % local, 3.0 MiB of 12.0 MiB, 2.0 MiB/s, ETA unknown, 7 demand"),
        ({"status": "paused"}, "25.0 % local, 3.0 MiB of 12.0 MiB, paused, 7 demand misses"),
        ({"status": "null"}, "off, 7 demand misses"),
        ({"status": "paused", "error": "disk full"}, "paused, 7 demand misses, disk full"),
    ],
)
def test_what_a_line_says(details: dict[str, Any], text: str) -> None:
    assert text in str(Snapshot.of(report(**details)))


def test_a_lost_backing_is_told() -> None:
    lost = report()
    lost["backing"] |= {"connected": False, "last-error": "connection reset"}
    assert str(Snapshot.of(lost)).endswith(": connection reset")
    assert "backing lost for" in str(Snapshot.of(lost))


def test_a_disk_without_backing_is_complete() -> None:
    local = {"size": 5 << 20, "disk": {"demand-misses": 0}}
    snapshot = Snapshot.of(local)
    assert snapshot.ended and str(snapshot).startswith("100.0 % local, 5.0 MiB of 5.0 MiB")


def test_an_empty_disk_divides_nothing() -> None:
    assert "100.0 % local" in str(Snapshot.of({"size": 0, "disk": {"demand-misses": 0}}))


async def test_progress_is_shown_until_the_job_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with control_room(tmp_path) as room:
        room.stream.start()
        await room.stream.completed.wait()

        async def look() -> dict[str, Any]:
            return statistics(room.disk, room.job)

        await show_progress(look)
    assert capsys.readouterr().err.startswith("100.0 % local")


def everything(controller: int) -> str:
    """What was written to a terminal that is closed by now."""
    output = b""
    try:
        while data := os.read(controller, 65536):
            output += data
    except OSError as error:
        assert error.errno == errno.EIO  # Linux's way to say so
    return output.decode()


def test_on_a_terminal_it_is_one_line_and_the_log_goes_above_it() -> None:
    handler = logging.StreamHandler(sys.__stderr__)
    logging.getLogger().addHandler(handler)
    controller, terminal = os.openpty()
    try:
        with os.fdopen(terminal, "w") as stream:
            with ProgressLine(stream) as line:
                for offset in range(0, 12 << 20, 1 << 20):
                    line.show(Snapshot.of(report(offset=offset)))
                logging.getLogger("nbdstream.test").warning("the link is down")
                line.show(Snapshot.of(report(offset=12 << 20)))
        output = everything(controller)
        assert handler.stream is sys.__stderr__
    finally:
        os.close(controller)
        logging.getLogger().removeHandler(handler)
    assert output.count("\n") == 2, "one for the log's line, one at the end"
    assert "0.0 % local" in output and "100.0 % local" in output
    assert output.index("the link is down\r\n") < output.index("100.0 % local")


def test_without_a_terminal_each_snapshot_is_a_line() -> None:
    stream = io.StringIO()
    with ProgressLine(stream) as line:
        for _ in range(3):
            line.show(Snapshot.of(report()))
    assert stream.getvalue() == f"{Snapshot.of(report())}\n" * 3


def test_backing_statistics_have_what_status_reads() -> None:
    """`status` and the progress line read these by name."""
    assert {"connected", "since", "last_error", "connections"} <= set(
        BackingStatistics.__dataclass_fields__
    )
