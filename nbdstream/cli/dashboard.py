# SPDX-License-Identifier: Apache-2.0
"""What ``watch`` shows on a terminal: a disk that fills up, and how that goes.

Pure: reports, maps and events of the control socket go in, lines of text come out, made for a
given size. Nothing here waits, and nothing looks at a clock.
"""

import math
import time
from collections import deque
from collections.abc import Iterable
from itertools import groupby

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from nbdstream.cli.cells import LOCAL, REMOTE, ZERO, weigh
from nbdstream.cli.progress import Snapshot
from nbdstream.qmp.protocol import Event, JSONObject
from nbdstream.text import shown
from nbdstream.units import format_count, format_duration, format_rate, format_size

# How many looks the graphs remember, and how many events.
HISTORY = 400
EVENTS_KEPT = 50
# Cells of the map that are drawn at the most.
ROWS_MOST = 32
_BARS = "▁▂▃▄▅▆▇█"
# Each kind of cell has a character of its own: colours are not for everyone.
_CELLS = {
    "local": ("█", "green"),
    "some": ("▓", "yellow"),
    "zero": ("·", "green"),
    "remote": ("░", "bright_black"),
}


def cell_kind(weights: list[float]) -> str:
    """What a cell is shown as."""
    if weights[REMOTE] == 0:
        return "local" if weights[LOCAL] else "zero"
    return "some" if weights[LOCAL] or weights[ZERO] else "remote"


def _cell_run(kind: str, count: int) -> tuple[str, str]:
    """Cells of one kind: characters and their style."""
    character, style = _CELLS[kind]
    return character * count, style


def sparkline(values: Iterable[float], width: int) -> str:
    """The last ``width`` values as bars; the highest of them is the full height."""
    last = list(values)[-width:]
    top = max(last, default=0.0)
    if top <= 0:
        return " " * (width - len(last)) + _BARS[0] * len(last)
    bars = (_BARS[min(int(value / top * len(_BARS)), len(_BARS) - 1)] for value in last)
    return " " * (width - len(last)) + "".join(bars)


def title_line(title: str, right: str, width: int) -> Text:
    """A title, and on the right, if there is room, something else."""
    line = Text(shown(title), Style(bold=True))
    gap = width - len(line) - len(right)
    return line.append(" " * gap + right, Style(dim=True, bold=False)) if gap > 1 else line


def render(lines: Iterable[Text], console: Console, options: ConsoleOptions) -> RenderResult:
    """Lines, one below the other, for rich."""
    for number, line in enumerate(lines):
        if number:
            yield Segment.line()
        yield from console.render_lines(line, options.update(height=1))[0]


class Dashboard:
    """The display as it is now; rich can print it.

    Attributes:
        hint: what the keys do, "" if there are none.
    """

    def __init__(self, title: str, size: int) -> None:
        self.size = size
        self.hint = ""
        self._title = title
        self._report: JSONObject = {}
        self._extents: list[tuple[int, int, int]] = []
        self._events: deque[str] = deque(maxlen=EVENTS_KEPT)
        self._rates: deque[float] = deque(maxlen=HISTORY)
        self._windows: deque[float] = deque(maxlen=HISTORY)
        self._delays: deque[float] = deque(maxlen=HISTORY)
        self._misses: deque[float] = deque(maxlen=HISTORY)
        self._looked = -math.inf

    def look(self, report: JSONObject, now: float) -> None:
        """Take a report (`nbdstream.control.report.statistics`) at a time, in seconds."""
        misses = report["disk"]["demand-misses"]
        if self._report and now > self._looked:
            before = self._report["disk"]["demand-misses"]
            self._misses.append(max(misses - before, 0) / (now - self._looked))
        backing = report.get("backing") or {}
        self._rates.append(report.get("job", {}).get("rate", 0.0))
        self._windows.append(backing.get("window", 0))
        self._delays.append(backing.get("base-rtt", 0.0) + backing.get("queue-delay", 0.0))
        self._report, self._looked = report, now

    def map(self, extents: list[JSONObject]) -> None:
        """Take the extents of the whole disk, as `x-nbdstream-map` returns them."""
        self._extents = [
            (
                each["start"],
                each["length"],
                REMOTE if not each["present"] else ZERO if each["zero"] else LOCAL,
            )
            for each in extents
        ]

    def happened(self, event: Event) -> None:
        """Take an event of the control socket."""
        clock = time.strftime("%H:%M:%S", time.localtime(event.timestamp))
        facts = ", ".join(f"{name} {value}" for name, value in event.data.items())
        self._events.append(shown(f"{clock} {event.name}: {facts}"))

    @property
    def known(self) -> bool:
        """Whether there was a report."""
        return bool(self._report)

    @property
    def snapshot(self) -> Snapshot:
        """The last report in short; only if `known`."""
        return Snapshot.of(self._report)

    def cells(self, count: int, *, filled: bool = False) -> Text:
        """The disk as a row of so many cells, at the most one for each sector. ``filled``: all is
        local, whatever the last map says."""
        count = min(count, max(self.size // 512, 1))
        if filled:
            return Text(*_cell_run("local", count))
        return self._cells(count, count)[0]

    def lines(self, width: int, height: int) -> list[Text]:
        """All lines for a terminal of that size, at the most ``height`` of them."""
        if not self._report:
            return [Text("waiting for the server"[:width])]
        above = [self._head(width), self._state(width), Text()]
        below = [Text(), *self._graphs(width), Text(), *self._facts()]
        room = height - len(above) - len(below)
        # At least three lines of what happened, more on a large terminal.
        rows = max(min(room - 4, ROWS_MOST), 1)
        lines = [*above, *self._map(width, rows), *below]
        left = height - len(lines) - 1
        if left > 0 and self._events:
            lines += [Text(), *(Text(line, "dim") for line in list(self._events)[-left:])]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return lines[:height]

    def _head(self, width: int) -> Text:
        """The title, and on the right, if there is room, the limit and what the keys do."""
        speed = self._report.get("job", {}).get("speed")
        words = [f"limit {format_rate(speed)}"] if speed else []
        right = "   ".join(words + ([self.hint] if self.hint else []))
        return title_line(self._title, right, width)

    def _state(self, width: int) -> Text:
        snapshot = Snapshot.of(self._report)
        text = str(snapshot)
        room = width - len(text) - 3
        if room < 10:
            return Text(text)
        done = round(room * snapshot.local / snapshot.length) if snapshot.length else room
        bar = Text.assemble(("━" * done, "green"), ("━" * (room - done), "bright_black"), "  ")
        return bar.append(text)

    def _map(self, width: int, rows: int) -> list[Text]:
        """The disk from the top left, and what the characters mean."""
        count = min(width * rows, max(self.size // 512, 1))
        lines = self._cells(count, width)
        per_cell = format_size(self.size / count)
        legend = Text.assemble(
            *(part for name, look in _CELLS.items() for part in (look, f" {name}  ")),
            (f"one cell: {per_cell}", "dim"),
        )
        return [*lines, legend]

    def _cells(self, count: int, columns: int) -> list[Text]:
        """The disk in so many cells, in rows."""
        cells = [cell_kind(each) for each in weigh(self._extents, self.size, count)]
        lines = []
        for start in range(0, count, columns):
            line = Text()
            # A piece of text for each run: one for each cell takes rich five times as long.
            for kind, run in groupby(cells[start : start + columns]):
                line.append(*_cell_run(kind, len(list(run))))
            lines.append(line)
        return lines

    def _graphs(self, width: int) -> list[Text]:
        backing = self._report.get("backing")
        rows = [("misses/s", self._misses, f"{self._misses[-1]:.1f}" if self._misses else "0.0")]
        if backing is not None:
            rows = [
                ("rate", self._rates, format_rate(self._rates[-1])),
                ("window", self._windows, format_size(self._windows[-1])),
                ("latency", self._delays, format_duration(self._delays[-1])),
                *rows,
            ]
        return [
            Text.assemble(
                (f"{name:<9}", "bold"), f"{value:>12}  ", (sparkline(history, width - 24), "cyan")
            )
            for name, history, value in rows
        ]

    def _facts(self) -> list[Text]:
        """The backing, and what guests had to wait for."""
        disk, backing = self._report["disk"], self._report.get("backing")
        waited = (
            f"guests waited for {format_count(disk['demand-misses'], 'read')} "
            f"({format_size(disk['demand-bytes'])}); "
            f"{format_size(disk['fetched-bytes'])} fetched in total"
        )
        facts = [Text(waited)]
        if backing is None:
            return [*facts, Text("backing: none, the whole disk is local")]
        how = f"connected ({format_count(backing['connections'], 'connection')})"
        where = shown(f"backing: {backing['uri']}, ")
        if backing["connected"]:
            facts.append(Text(where + how))
        else:
            facts.append(Text(shown(f"{where}LOST: {backing['last-error']}"), "bold red"))
        problems = self._report.get("problems", [])
        return facts + [Text(shown(f"problem: {problem}"), "bold red") for problem in problems]
