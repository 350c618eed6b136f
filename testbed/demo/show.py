# SPDX-License-Identifier: Apache-2.0
"""What the demo prints: a timeline, what the guest says, a live line, and a table.

On a terminal the live line is drawn again at the bottom; elsewhere it is printed every few
seconds. All of it goes to standard output through one rich console.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import trio
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nbdstream.units import format_size

LINE_INTERVAL = 10.0
"""Seconds between two live lines where there is no terminal."""
# What Console.run types and has printed around a command's output.
_RUN_MARK = re.compile(r"<.{0,2}/?run-\d+")
_CONTROL_SEQUENCE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|.)")


@dataclass(frozen=True)
class Result:
    """One way of bringing a guest up from a remote image. Seconds count from asking for it."""

    way: str
    login: float
    local: float | None
    """None: it was not waited for, or has been so all along."""
    moved: int
    """Bytes that came over the link."""
    ended: bool = True
    """Whether the disk was local then; else it was given up."""


class Show:
    """Prints the demo; the clock starts again with each ``begin``."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._begun = self._printed = trio.current_time()
        self._line = ""
        self._guest_muted = False

    @property
    def elapsed(self) -> float:
        """Seconds since ``begin``."""
        return trio.current_time() - self._begun

    def begin(self, title: str) -> None:
        """Start a chapter, and the clock."""
        self._console.print()
        self._console.rule(f"[bold]{title}", align="left")
        self._begun = self._printed = trio.current_time()
        self._guest_muted = False

    def note(self, text: str) -> None:
        """Something happened: one line with the time."""
        self._console.print(Text(f"{self.elapsed:7.2f} s  {text}"))

    def guest(self, text: str) -> None:
        """Pass as ``on_console``: prints each line that the guest has finished."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            plain = _CONTROL_SEQUENCE.sub("", line).strip()
            if plain and not self._guest_muted and not _RUN_MARK.search(plain):
                self._console.print(Text(f"{self.elapsed:7.2f} s  │ {plain}", style="dim"))

    def mute_guest(self) -> None:
        """What the guest says from now on is not shown, in this chapter."""
        self._guest_muted = True

    @contextmanager
    def live(self) -> Iterator[None]:
        """While the block lasts ``status`` may be used."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as self._live:
            yield
        self._live = None

    def status(self, text: str) -> None:
        """How things are now; replaces the one before."""
        line = Text(f"{self.elapsed:7.2f} s  ▸ {text}", style="cyan")
        if self._live is not None:
            self._live.update(line, refresh=True)
        elif trio.current_time() - self._printed >= LINE_INTERVAL:
            self._printed = trio.current_time()
            self._console.print(line)

    def watch(self, table: Table, line: str) -> None:
        """How things are now, as a table; where there is no terminal, as a line."""
        if self._live is not None:
            self._live.update(table, refresh=True)
        else:
            self.status(line)

    def print(self, table: Table) -> None:
        """Print any table."""
        self._console.print()
        self._console.print(table)

    def table(self, title: str, results: Sequence[Result]) -> None:
        """Print the results side by side, each time also as a multiple of the first's."""
        table = Table(title=title, title_justify="left")
        table.add_column("way")
        for heading in ("login after", "wholly local after", "over the link"):
            table.add_column(heading, justify="right")
        first = results[0]
        for result in results:
            table.add_row(
                result.way,
                _compare(result.login, first.login, result is first),
                _local(result, first),
                format_size(result.moved),
            )
        self._console.print()
        self._console.print(table)


def _local(result: Result, first: Result) -> str:
    if result.local is None or first.local is None:
        return "-"
    more = "" if result.ended else "> "
    return more + _compare(result.local, first.local, result is first)


def _compare(seconds: float, reference: float, is_reference: bool) -> str:
    text = f"{seconds:.1f} s"
    return text if is_reference else f"{text}  (x {seconds / reference:.2f})"
