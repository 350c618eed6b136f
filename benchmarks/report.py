# SPDX-License-Identifier: Apache-2.0
"""What a benchmark hands back: one table, with how it was made.

A cell is a number, a text, or None for what could not be measured. Numbers are printed
with three significant digits and stored in full. `recipe` holds the command lines that
were run, with temporary directories left out, and `versions` who was measured.
"""

import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from testbed.peers import Peer, binary, run

Cell = float | str | None

# Wide enough for every table here, so that a pipe sees the same lines as a terminal.
PLAIN_WIDTH = 160


@dataclass(frozen=True)
class Options:
    """`rounds` alternating rounds, of which the median counts, of `seconds` per load."""

    rounds: int = 3
    seconds: float = 3.0


@dataclass
class Report:
    title: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    ratios: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recipe: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    machine: str = ""

    def add_recipe(self, command: Sequence[str | Path], *directories: Path) -> None:
        """Note a command line once; `directories` in it become `DIR`."""
        line = shlex.join([Path(command[0]).name, *map(str, command[1:])])
        for directory in directories:
            line = line.replace(str(directory), "DIR")
        if line not in self.recipe:
            self.recipe.append(line)

    def add_link(self, *options: str) -> None:
        """Note how the emulated link is started, with such options of `testbed.link`."""
        self.add_recipe(["python", "-m", "testbed.link", *options, "--to", "unix:BACKING"])

    def add_peer(self, peer: Peer, *directories: Path) -> None:
        self.add_recipe(peer.command, peer.directory, *directories)

    def print(self) -> None:
        """The table on standard output; plain characters when that is no terminal."""
        console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
        table = Table(title=self.title, box=box.SIMPLE if console.is_terminal else box.ASCII)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*map(text, row))
        if self.ratios:
            table.add_section()
        for row in self.ratios:
            table.add_row(*map(text, row))
        console.print(table)
        for note in [*self.notes, self.machine, ", ".join(self.versions.values())]:
            console.print(note, markup=False)
        for line in self.recipe:
            console.print(f"  $ {line}", markup=False, soft_wrap=True)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def progress(*what: object) -> None:
    """Say on standard error what is being measured now."""
    print("  ", *what, file=sys.stderr, flush=True)


def text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def judged(value: float | None, *, least: float | None = None, most: float | None = None) -> Cell:
    """A ratio beside its target."""
    if value is None:
        return None
    target = f">= {least:g}" if least is not None else f"<= {most:g}"
    return f"{value:.3g} ({target})"


def median(values: Iterable[float]) -> float | None:
    """None for no values: what was measured failed in every round."""
    known = list(values)
    return statistics.median(known) if known else None


def describe_machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} CPUs, {memory:.0f} GiB memory, Linux {platform.release()}, "
        f"Python {platform.python_version()}, load average at the end {load:.1f}"
    )


def versions() -> dict[str, str]:
    """The first line that each program says of itself."""
    asked = {"NBDSTREAM": "--version", "NBDKIT": "--version", "NBDCOPY": "--version"}
    asked |= {"QEMU_NBD": "--version", "FIO": "--version"}
    found = {}
    for variable, option in asked.items():
        found[variable.lower()] = run([binary(variable), option]).splitlines()[0].strip()
    return found
