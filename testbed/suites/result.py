# SPDX-License-Identifier: Apache-2.0
"""How a test of a peer's suite ended, with each of the servers."""

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from testbed.peers import binary
from testbed.processes import python_environment

PASS, FAIL, SKIP = "pass", "fail", "skip"


@dataclass(frozen=True)
class Outcome:
    """``output``: what a failed test printed, without what differs from run to run. ``ours``: how
    often our server was started."""

    result: str
    output: str = ""
    ours: int = 0


def program(server: str, directory: Path) -> Path:
    """The program ``qemu-nbd`` that starts this server, in a directory that has nothing else."""
    place = directory / server / "bin" / "qemu-nbd"
    place.parent.mkdir(parents=True, exist_ok=True)
    real = shutil.which("qemu-nbd")
    assert real is not None
    line = f"{sys.executable} -m testbed.suites.qemu_nbd" if server == "nbdstream" else real
    place.write_text(f'#!/bin/sh\nexec {line} "$@"\n')
    place.chmod(0o755)
    return place


def environment(log: Path) -> dict[str, str]:
    """For the stand-in: where the real programs are, and its log."""
    log.unlink(missing_ok=True)
    return python_environment() | {
        "NBDSTREAM": binary("NBDSTREAM"),
        "QEMU_NBD_REAL": shutil.which("qemu-nbd") or "",
        "NBDSTREAM_STAND_IN_LOG": str(log),
        "XDG_STATE_HOME": str(log.parent / "state"),
        # libnbd's nbdsh wants the Python that Debian's libnbd is built for.
        "PATH": f"/usr/bin:{os.environ['PATH']}",
    }


def ours_in(log: Path) -> int:
    """How many calls our server answered."""
    if not log.exists():
        return 0
    return sum(line.startswith("nbdstream: ") for line in log.read_text().splitlines())


# Places, times, process numbers.
_VARIES = (
    (re.compile(r"/\S*/run/(nbdstream|qemu-nbd)/"), ""),
    (re.compile(r"\[\d\d:\d\d:\d\d\]|\d+\.\d+ ?s\b"), ""),
    (re.compile(r"nbdstream: |qemu-nbd: "), ""),
)


def without_what_varies(output: str) -> str:
    """A test's output, fit to be compared with that of the other server."""
    for pattern, instead in _VARIES:
        output = pattern.sub(instead, output)
    return "\n".join(line.rstrip() for line in output.splitlines())


@dataclass(frozen=True)
class Comparison:
    """A test that was run with both servers. ``reason``: why it may differ, "" if it may not."""

    name: str
    theirs: Outcome
    ours: Outcome
    reason: str

    @property
    def differs(self) -> bool:
        """Whether the test does other than with qemu-nbd."""
        return (self.theirs.result, self.theirs.output) != (self.ours.result, self.ours.output)

    @property
    def is_fault(self) -> bool:
        """Whether it ought not to: a failure of ours alone, or a reason that is none any more."""
        return self.differs != bool(self.reason)

    def line(self) -> str:
        """A row of the table."""
        words = self.reason or ("unexplained" if self.differs else "")
        if self.reason and not self.differs:
            words = f"does not differ any more: {self.reason}"
        starts = self.ours.ours
        return f"| {self.name} | {self.theirs.result} | {self.ours.result} | {starts} | {words} |"


HEAD = """\
| test | qemu-nbd | nbdstream | our servers | difference |
| --- | --- | --- | ---: | --- |"""
