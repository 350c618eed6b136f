# SPDX-License-Identifier: Apache-2.0
"""What the tests of ``nbdstream serve`` share: the program, a client, what is checked of a leaf.

A test module makes fixtures: ``image = pytest.fixture(image_file, scope="session")`` and, for a
test per format, ``leaf = pytest.fixture(leaf_path, params=FORMATS)``.
"""

import io
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import nbd
import pytest

from nbdstream.cli import main
from testbed.peers import (
    Peer,
    binary,
    make_image,
    nbdkit,
    run,
)

MIB = 1 << 20
SIZE = 24 * MIB + 4096 + 512  # no multiple of any cluster size, nor of a block
FORMATS = ["raw", "qcow2", "qed"]


def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backing's content, with holes, zeroes and data."""
    path = tmp_path_factory.mktemp("backing") / "image"
    make_image(path, SIZE)
    return path


def leaf_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where a leaf of each format will be."""
    return tmp_path / f"leaf.{request.param}"


def far_megabyte(tmp_path: Path) -> Iterator[Peer]:
    """A backing of 1 MiB."""
    make_image(tmp_path / "far.raw", MIB)
    with nbdkit("file", tmp_path / "far.raw", readonly=True) as peer:
        yield peer


def format_of(leaf: Path) -> str:
    return leaf.suffix.removeprefix(".")


def nbdstream(*args: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    command = [binary("NBDSTREAM"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def nbdstream_here(*args: str | Path, cwd: str | Path = ".") -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which saves half a second of the interpreter's start.

    For commands that end soon: refusals and questions to a server. `nbdstream` runs the program
    as users do; each module of tests should do that too. An exception that the program does not
    report is raised, where the process would print a traceback.
    """
    root = logging.getLogger()
    level = root.level
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["nbdstream", *map(str, args)]),
        mock.patch.object(root, "handlers", []),  # pytest's: the program sets up its own
        chdir(cwd),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    root.setLevel(level)
    status = ended.value.code
    assert isinstance(status, int)
    return subprocess.CompletedProcess(sys.argv, status, out.getvalue(), err.getvalue())


@contextmanager
def client(uri: str) -> Iterator[nbd.NBD]:
    """A libnbd client that sees the three metadata contexts."""
    handle = nbd.NBD()
    for context in ("base:allocation", "qemu:allocation-depth", "nbdstream:local"):
        handle.add_meta_context(context)
    handle.connect_uri(uri)
    yield handle
    handle.shutdown()


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {seconds} s"
        time.sleep(0.01)


def check_clean(leaf: Path) -> None:
    """The leaf is clean by our own check and, where it has one, by QEMU's."""
    result = nbdstream("check", leaf)
    assert result.returncode == 0, result.stdout + result.stderr
    if format_of(leaf) != "raw":
        run([binary("QEMU_IMG"), "check", "-q", leaf])


def fetched_ranges(log: Path) -> list[tuple[int, int]]:
    """What nbdkit's log filter saw being read, in order of offset."""
    reads = re.findall(r"\bRead .*?offset=0x([0-9a-f]+) count=0x([0-9a-f]+)", log.read_text())
    return sorted((int(offset, 16), int(count, 16)) for offset, count in reads)
