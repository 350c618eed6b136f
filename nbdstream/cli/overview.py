# SPDX-License-Identifier: Apache-2.0
"""What ``watch`` shows of several disks: a line for each, and one of them alone if asked to.

Pure, as `nbdstream.cli.dashboard` is.
"""

import enum
from collections import Counter
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from nbdstream.cli.dashboard import render, title_line
from nbdstream.cli.progress import Snapshot
from nbdstream.cli.watched import Watched
from nbdstream.text import shown
from nbdstream.units import format_duration, format_rate, format_size

STEER = "space pause  - + 0 limit  q quit"
CHOOSE = "↑ ↓ enter  "
BACK = "esc all  "
# Columns of a line: marker, name, share, state or rate, time left. The map has the rest, if that
# is enough to see something.
_NAME, _SHARE, _STATE, _LEFT, _MAP_LEAST = 24, 8, 14, 10, 8


class Key(enum.Enum):
    """What changes the view."""

    UP = enum.auto()
    DOWN = enum.auto()
    ENTER = enum.auto()
    BACK = enum.auto()


class Overview:
    """The display as it is now; rich can print it. A single disk is always shown alone."""

    def __init__(self, disks: Sequence[Watched], *, keys: bool) -> None:
        self._disks = disks
        self._keys = keys
        self._number = 0
        self._wants_alone = False

    @property
    def chosen(self) -> Watched:
        """The disk that keys steer."""
        return self._disks[self._number]

    @property
    def _alone(self) -> bool:
        return self._wants_alone or len(self._disks) == 1

    def move(self, key: Key) -> None:
        """Choose another disk, or show the chosen one alone, or all."""
        if key in (Key.UP, Key.DOWN):
            step = 1 if key is Key.DOWN else -1
            self._number = min(max(self._number + step, 0), len(self._disks) - 1)
        else:
            self._wants_alone = key is Key.ENTER

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or console.size.height
        yield from render(self.lines(options.max_width, height), console, options)

    def lines(self, width: int, height: int) -> list[Text]:
        """All lines for a terminal of that size, at the most ``height`` of them."""
        if self._alone:
            back = BACK if len(self._disks) > 1 else ""
            self.chosen.dashboard.hint = back + STEER if self._keys else ""
            return self.chosen.dashboard.lines(width, height)
        head = title_line(self._sum(), CHOOSE + STEER if self._keys else "", width)
        rows = max(height - 2, 1)
        first = min(max(self._number - rows // 2, 0), max(len(self._disks) - rows, 0))
        lines = [head, Text()]
        for number in range(first, min(first + rows, len(self._disks))):
            lines.append(_line(self._disks[number], width, chosen=number == self._number))
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return lines[:height]

    def _sum(self) -> str:
        """All disks in one line."""
        known = [disk for disk in self._disks if disk.known]
        length = sum(disk.snapshot.length for disk in known)
        local = sum(map(_local, known))
        states = Counter(_state(disk) for disk in self._disks)
        parts = [f"{len(self._disks)} disks"]
        if length:
            parts.append(f"{100 * local / length:.1f} % of {format_size(length)} local")
        if rate := sum(d.snapshot.rate for d in self._disks if _state(d) == "running"):
            parts.append(format_rate(rate))
        return ", ".join(parts + [f"{count} {state}" for state, count in states.items()])


def _state(disk: Watched) -> str:
    if disk.over:
        return "failed" if disk.trouble else "complete"
    return disk.snapshot.state if disk.known else "connecting"


def _local(disk: Watched) -> int:
    snapshot: Snapshot = disk.snapshot
    return snapshot.length if disk.over and not disk.trouble else snapshot.local


def _line(disk: Watched, width: int, *, chosen: bool) -> Text:
    """One disk: its name, map, and figures, or what is wrong."""
    name = Text(shown(disk.name))
    name.truncate(_NAME, overflow="ellipsis", pad=True)
    line = Text.assemble("▸ " if chosen else "  ", (name.plain, Style(bold=chosen)), " ")
    snapshot = disk.snapshot if disk.known else None
    words = disk.trouble or (snapshot.trouble if snapshot and not disk.over else "")
    if snapshot is None or words:
        return line.append(shown(words or "connecting"), "bold red" if words else "dim")
    state = _state(disk)
    running = state == "running"
    left = format_duration(snapshot.eta) if running and snapshot.eta is not None else ""
    share = 100 * _local(disk) / snapshot.length if snapshot.length else 100.0
    figures = f"{share:.1f} %".rjust(_SHARE)
    figures += (format_rate(snapshot.rate) if running else state).rjust(_STATE) + left.rjust(_LEFT)
    room = width - len(line) - len(figures)
    if room >= _MAP_LEAST:
        line.append_text(disk.dashboard.cells(room, filled=state == "complete"))
    return line.append(figures)
