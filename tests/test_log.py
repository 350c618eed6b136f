# SPDX-License-Identifier: Apache-2.0
"""The log for machines: JSON lines, and the fields of a real systemd-journald."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbdstream.cli.log import JsonFormatter, journal_entry
from testbed.peers import Peer, binary
from tests.serve_support import far_megabyte

far = pytest.fixture(far_megabyte)


def logged(message: str, **extra: object) -> logging.LogRecord:
    record = logging.LogRecord("nbdstream.x", logging.WARNING, "x.py", 1, message, (), None)
    record.__dict__.update(extra)
    return record


def test_a_line_of_json_holds_a_message_whatever_is_in_it() -> None:
    line = JsonFormatter().format(logged('a "b"\n\x1b[31m nbd://user:secret@host/'))
    assert "\n" not in line and "\x1b" not in line and "secret" not in line
    entry = json.loads(line)
    assert entry["level"] == "warning" and entry["message"].startswith('a "b"\n')


def test_a_line_break_in_a_field_ends_nothing() -> None:
    entry = journal_entry(logged("one\nPRIORITY=0", event="E", data={"last-error": "a\nb"}))
    assert b"MESSAGE\n" + (14).to_bytes(8, "little") + b"one\nPRIORITY=0\n" in entry
    assert b"NBDSTREAM_LAST_ERROR\n" + (3).to_bytes(8, "little") + b"a\nb\n" in entry


def serve(log_format: str, leaf: Path, far: Peer) -> list[str]:
    """The command of a server that completes its disk, serves one client and ends."""
    uri_is_read = 'nbdcopy "$uri" null:'
    command = [binary("NBDSTREAM"), "--log-format", log_format, "serve", str(leaf)]
    return [*command, "-b", far.uri, "--run", uri_is_read]


def check(events: list[tuple[str, Any]]) -> None:
    """What such a server has to tell."""
    names = [name for name, _ in events]
    assert names.index("X_NBDSTREAM_SERVING") < names.index("BLOCK_JOB_COMPLETED")
    statuses = [data for name, data in events if name == "JOB_STATUS_CHANGE"]
    assert statuses[0] == "running" and statuses[-1] == "null"
    clients = [data for name, data in events if name == "X_NBDSTREAM_CLIENTS_CHANGE"]
    assert clients and int(clients[0]) > 0


def member(data: dict[str, Any]) -> Any:
    return data.get("status", data.get("clients"))


def test_each_line_of_a_server_is_an_object(tmp_path: Path, far: Peer) -> None:
    command = serve("json", tmp_path / "leaf.raw", far)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    entries = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"time", "level", "logger", "message"} <= entry.keys() for entry in entries)
    check([(e["event"], member(e["data"])) for e in entries if "event" in e])


def test_a_warning_and_an_event_stand_side_by_side(tmp_path: Path, far: Peer) -> None:
    """And text has neither the events nor another form than before."""
    leaf = tmp_path / "leaf.raw"
    for log_format in ("json", "text"):
        command = serve(log_format, leaf, far)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("nbdstream: warning: ") and "wholly local" in done.stderr


JOURNALD = "/lib/systemd/systemd-journald"
# A journal of its own, in a mount namespace of its own.
IN_JOURNAL = f"""
set -e
mount -t tmpfs none /run
mkdir -p /run/systemd/journal /run/log/journal/$(cat /etc/machine-id)
{JOURNALD} 2>/dev/null & journald=$!
while [ ! -S /run/systemd/journal/socket ]; do kill -0 $journald; sleep 0.05; done
"$@"
journalctl --sync >/dev/null 2>&1 || true
kill $journald; wait $journald || true
journalctl -D /run/log/journal -o json SYSLOG_IDENTIFIER=nbdstream
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a mount namespace")
def test_the_journal_has_the_fields(tmp_path: Path, far: Peer) -> None:
    command = [
        "unshare",
        "-m",
        "sh",
        "-c",
        IN_JOURNAL,
        "sh",
        *serve("journal", tmp_path / "l.raw", far),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in done.stdout.splitlines()]
    assert {entry["PRIORITY"] for entry in entries} <= {"4", "6"}
    events = [entry for entry in entries if "NBDSTREAM_EVENT" in entry]
    values = ("NBDSTREAM_STATUS", "NBDSTREAM_CLIENTS")
    check([(e["NBDSTREAM_EVENT"], next((e[v] for v in values if v in e), None)) for e in events])


def test_no_journal_is_one_clear_line(tmp_path: Path) -> None:
    script = (
        "import nbdstream.cli.log as log; log.JOURNAL = '/nowhere'; log.machine_handler('journal')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert "--log-format journal: no journal at /nowhere (No such file or directory)" in done.stderr
