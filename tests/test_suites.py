# SPDX-License-Identifier: Apache-2.0
"""The stand-in for qemu-nbd by which the peers' suites meet our server, and what is a fault."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.peers import assert_same, make_image, run, temporary_directory
from testbed.suites.result import FAIL, PASS, Comparison, Outcome, environment
from tests.serve_support import MIB, client, wait_for

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    make_image(tmp_path / "disk.raw", MIB)
    return tmp_path / "disk.raw"


@pytest.fixture
def stand_in(tmp_path: Path) -> Call:
    """Calls it; what it started is in ``log``."""

    def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "testbed.suites.qemu_nbd", *map(str, words)]
        # A daemon keeps its standard error: no pipe, whose end would be waited for.
        with open(tmp_path / "out", "w+") as out, open(tmp_path / "err", "w+") as err:
            done = subprocess.run(
                command, env=environment(tmp_path / "log"), stdout=out, stderr=err, timeout=60
            )
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess(command, done.returncode, out.read(), err.read())

    return call


def test_a_daemon_serves_until_it_is_killed(stand_in: Call, image: Path, tmp_path: Path) -> None:
    with temporary_directory() as place:
        socket, pid_file = place / "nbd", tmp_path / "pid"
        words = ("--fork", "-t", "-k", socket, "-x", "disk", "-D", "words", "-f", "raw")
        done = stand_in(*words, "--pid-file", pid_file, image)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        uri = f"nbd+unix:///disk?socket={socket}"
        for _ in range(2):
            assert_same(uri, image)
        assert json.loads(run(["nbdinfo", "--json", uri]))["exports"][0]["description"] == "words"
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
        wait_for(lambda: not socket.exists(), "end of the server")
    assert (tmp_path / "log").read_text().startswith("nbdstream: --fork")


def test_without_t_the_last_client_ends_it(stand_in: Call, image: Path) -> None:
    with temporary_directory() as place:
        assert stand_in("--fork", "-k", place / "nbd", "-f", "raw", image).returncode == 0
        with client(f"nbd+unix:///?socket={place}/nbd") as handle:
            assert handle.pread(512, 0) == image.read_bytes()[:512]
        wait_for(lambda: not (place / "nbd").exists(), "end of the server")


def test_an_error_is_that_of_our_server(stand_in: Call, image: Path, tmp_path: Path) -> None:
    done = stand_in("--fork", "-k", tmp_path / "nowhere" / "nbd", "-f", "raw", image)
    assert done.returncode != 0
    assert done.stderr.startswith("nbdstream: error: ")


def test_what_is_not_ours_goes_to_qemu_nbd(stand_in: Call, tmp_path: Path) -> None:
    assert stand_in("--version").stdout.startswith("qemu-nbd ")
    assert (tmp_path / "log").read_text().startswith("qemu-nbd (")


@pytest.mark.parametrize(
    ("theirs", "ours", "reason", "fault"),
    [
        (Outcome(PASS), Outcome(PASS, ours=1), "", False),
        (Outcome(PASS), Outcome(FAIL, "x", 1), "", True),
        (Outcome(PASS), Outcome(FAIL, "x", 1), "a reason", False),
        (Outcome(FAIL, "x"), Outcome(FAIL, "x", 1), "", False),
        (Outcome(FAIL, "x"), Outcome(FAIL, "y", 1), "", True),
        (Outcome(PASS), Outcome(PASS, ours=1), "a reason that is none any more", True),
    ],
)
def test_a_fault_is_a_difference_without_a_reason_or_a_reason_without_a_difference(
    theirs: Outcome, ours: Outcome, reason: str, fault: bool
) -> None:
    assert Comparison("test", theirs, ours, reason).is_fault is fault
