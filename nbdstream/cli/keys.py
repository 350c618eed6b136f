# SPDX-License-Identifier: Apache-2.0
"""Keys of the full-screen display of ``watch``: they steer the stream job of a disk.

space     pause the job, or let it go on
``-``     halve the limit; without one, half of the rate becomes the limit
``+``     double the limit
``0``     lift the limit
``q``     leave, as Ctrl-C does; the jobs go on

Of several disks the arrows (or ``j`` and ``k``) choose one, Enter shows it alone, and Esc all.
"""

import os
import re
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from nbdstream.cli.overview import Key, Overview
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import JSONObject, QMPError

LIMIT_LEAST = 64 << 10
# A key that a terminal sends as several characters comes in one piece.
_KEY = re.compile(r"\x1b[\[O].|.", re.DOTALL)
_MOVES = {
    "\x1b[A": Key.UP,
    "\x1bOA": Key.UP,
    "k": Key.UP,
    "\x1b[B": Key.DOWN,
    "\x1bOB": Key.DOWN,
    "j": Key.DOWN,
    "\r": Key.ENTER,
    "\n": Key.ENTER,
    "\x1b": Key.BACK,
    "\x7f": Key.BACK,
}


def has_keys() -> bool:
    """Whether someone can press keys."""
    return sys.stdin.isatty()


async def follow_keys(overview: Overview, draw: Callable[[], None]) -> None:
    """A task: do what the keys say, and draw. Raises KeyboardInterrupt at ``q``."""
    fd = sys.stdin.fileno()
    with _each_key(fd):
        while True:
            await trio.lowlevel.wait_readable(fd)
            pressed = os.read(fd, 64).decode(errors="replace")
            if not pressed:
                return  # the terminal is gone
            for key in _KEY.findall(pressed):
                if key == "q":
                    raise KeyboardInterrupt
                if key in _MOVES:
                    overview.move(_MOVES[key])
                elif (disk := overview.chosen).qmp is not None:
                    try:
                        await _steer(disk.qmp, disk.job_id, key)
                    except QMPError:
                        pass  # the job has ended or changed meanwhile: the display shows it
            draw()


async def _steer(qmp: QMPClient, job_id: str, key: str) -> None:
    jobs = [job for job in await qmp.execute("query-block-jobs") if job["device"] == job_id]
    if not jobs:
        return
    if key == " ":
        await qmp.execute("job-resume" if jobs[0]["paused"] else "job-pause", {"id": job_id})
    elif key in "-+0":
        speed = _limit(key, (await qmp.execute("x-nbdstream-stats"))["job"])
        await qmp.execute("block-job-set-speed", {"device": job_id, "speed": speed})


def _limit(key: str, job: JSONObject) -> int:
    """What the limit becomes, in bytes per second; 0 is none."""
    speed: int = job["speed"]
    if key == "-":
        return max((speed or int(job["rate"])) // 2, LIMIT_LEAST)
    return speed * 2 if key == "+" else 0


@contextmanager
def _each_key(fd: int) -> Iterator[None]:
    """Get keys as they are pressed, and do not show them; Ctrl-C stays what it is."""
    settings = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, settings)
