# SPDX-License-Identifier: Apache-2.0
"""The reads of a guest that boots, recorded once, and replayed by clients that cost less."""

import re
import time
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from nbdstream.guest.disks import Disk
from testbed.guests.systems import System, start
from testbed.hosts import client
from testbed.peers import nbdkit

_READ = re.compile(r"^(\S+ \S+) .*?\bRead .*?offset=0x([0-9a-f]+) count=0x([0-9a-f]+)", re.M)
# A guest that computes for longer between two reads is not waited for.
_PAUSE_MOST = 0.5


@dataclass(frozen=True)
class Read:
    """``pause``: seconds between the read before and this one."""

    pause: float
    offset: int
    length: int


async def record(system: System, image: Path, directory: Path) -> list[Read]:
    """Boot a guest from an image, which is not changed, up to its login; its reads in order."""
    log = directory / "reads.log"
    plugin = ["file", str(image), f"logfile={log}"]
    with nbdkit(*plugin, filters=["log", "cow"]) as server:
        async with start(system, Disk.nbd(server.uri)) as guest:
            await guest.wait_login()
            reads = _parse(log.read_text())
            await guest.guest.kill()
    return reads


def _parse(log: str) -> list[Read]:
    found = [
        (datetime.fromisoformat(when).timestamp(), int(offset, 16), int(length, 16))
        for when, offset, length in _READ.findall(log)
    ]
    times = [at for at, _, _ in found]
    pauses = [0.0, *(min(b - a, _PAUSE_MOST) for a, b in pairwise(times))]
    return [Read(pause, *rest) for pause, (_, *rest) in zip(pauses, found, strict=True)]


@dataclass
class Replay:
    """``done``: reads that were answered so far; ``asked``: when the one that waits was asked
    (`time.monotonic`), 0.0 for none."""

    reads: list[Read]
    done: int = 0
    asked: float = 0.0

    def run(self, uri: str) -> None:
        """Read as the guest did. Raises nbd.Error."""
        with client(uri) as handle:
            for read in self.reads:
                time.sleep(max(read.pause, 0.0))
                self.asked = time.monotonic()
                handle.pread(read.length, read.offset)
                self.asked = 0.0
                self.done += 1

    @property
    def waits(self) -> float:
        """Seconds for which the present read has waited."""
        return time.monotonic() - self.asked if self.asked else 0.0
