# SPDX-License-Identifier: Apache-2.0
"""The progress line: how much is local, how fast the rest comes, what guests had to wait for.

On a terminal this is one line that is redrawn, below all other output. Elsewhere it is a line
of text every few seconds. It is made from reports as `x-nbdstream-stats` returns them, so that
``serve`` shows the same of itself as ``watch`` does from another process.
"""

import logging
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TextIO

import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from nbdstream.qmp.protocol import JSONObject
from nbdstream.text import shown
from nbdstream.units import format_count, format_duration, format_rate, format_size

# Seconds between two looks, and between two lines where there is no terminal.
REDRAW_INTERVAL = 0.25
LINE_INTERVAL = 5.0


@dataclass(frozen=True)
class Snapshot:
    """What a progress line tells.

    ``state`` is the job's status by QEMU's names, or "complete" (nothing is remote any
    more) or "off" (something is, but no job fetches it). Sizes are bytes, times seconds.
    ``trouble`` says what is wrong, "" if nothing is.
    """

    state: str
    length: int
    local: int
    rate: float
    eta: float | None
    demand_misses: int
    trouble: str

    @classmethod
    def of(cls, report: JSONObject) -> "Snapshot":
        """From what `nbdstream.control.report.statistics` returns."""
        job, backing = report.get("job", {}), report.get("backing")
        state = job.get("status", "null")
        if state == "null":
            state = "off" if backing else "complete"
        return cls(
            state=state,
            length=report["size"],
            local=job.get("offset", 0) if backing else report["size"],
            rate=job.get("rate", 0.0),
            eta=job.get("eta"),
            demand_misses=report["disk"]["demand-misses"],
            trouble=_trouble(job, backing),
        )

    @property
    def ended(self) -> bool:
        """Whether no job is at work."""
        return self.state in ("complete", "off")

    def __str__(self) -> str:
        parts = []
        if self.state != "off":  # without a job, what is local was not counted
            percent = 100 * self.local / self.length if self.length else 100.0
            parts.append(f"{percent:.1f} % local")
            parts.append(f"{format_size(self.local)} of {format_size(self.length)}")
        if self.state == "running":
            parts.append(format_rate(self.rate))
            parts.append("ETA " + ("unknown" if self.eta is None else format_duration(self.eta)))
        else:
            parts.append(self.state)
        parts.append(format_count(self.demand_misses, "demand miss", "demand misses"))
        return ", ".join(parts + ([self.trouble] if self.trouble else []))


def _lateness(deadline: JSONObject | None) -> str:
    if deadline is None or deadline["on-time"]:
        return ""
    if "late" not in deadline:
        return "will miss its deadline"
    return f"will miss its deadline by {format_duration(deadline['late'])}"


def _trouble(job: JSONObject, backing: JSONObject | None) -> str:
    if error := job.get("error"):
        return str(error)
    if backing is None or backing["connected"]:
        return _lateness(job.get("finish-in"))
    lost = f"backing lost for {format_duration(max(time.time() - backing['since'], 0))}"
    return lost + (f": {shown(backing['last-error'])}" if backing["last-error"] else "")


class ProgressLine:
    """Shows snapshots on ``stream`` (standard error) while the ``with`` block lasts."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False)
        self._progress: Progress | None = None
        self._exits = ExitStack()

    def __enter__(self) -> "ProgressLine":
        if self._console.is_terminal:
            progress = Progress(
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}", markup=False),
                console=self._console,
                auto_refresh=False,  # by us, from the event loop: no thread
                redirect_stdout=False,  # what a program may read must not move to stderr
            )
            self._progress = self._exits.enter_context(progress)
            self._task = progress.add_task("", total=1, text="")
            self._exits.callback(_log_to(sys.stderr))
        return self

    def __exit__(self, *exc: object) -> None:
        self._exits.close()

    @property
    def interval(self) -> float:
        """Seconds until it is worth while to `show` the next snapshot."""
        return REDRAW_INTERVAL if self._progress is not None else LINE_INTERVAL

    def show(self, snapshot: Snapshot) -> None:
        """Redraw the line, or print another."""
        if self._progress is None:
            print(snapshot, file=self._console.file, flush=True)
            return
        self._progress.update(
            self._task,
            completed=snapshot.local,
            total=max(snapshot.length, 1),
            text=str(snapshot),
            refresh=True,
        )


def _log_to(stream: TextIO) -> Callable[[], None]:
    """Have log messages printed above the line instead of into it: while there is one,
    sys.stderr is rich's stand-in. Returns what undoes that."""
    undo = ExitStack()
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__:
            undo.callback(handler.setStream, handler.stream)
            handler.setStream(stream)
    return undo.close


async def show_progress(report: Callable[[], Awaitable[JSONObject]]) -> None:
    """Show progress on standard error until no job is at work any more, or cancelled."""
    with ProgressLine() as line:
        while True:
            snapshot = Snapshot.of(await report())
            line.show(snapshot)
            if snapshot.ended:
                return
            await trio.sleep(line.interval)
