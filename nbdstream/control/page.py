# SPDX-License-Identifier: Apache-2.0
"""The report: one page that shows a disk, its past and what is to come of it.

The page is a file beside this module, and what it shows is an object in it. It needs nothing
from elsewhere. `nbdstream report` writes it to a file; the metrics' server has the same page at
``/``, where it asks for the object again every second (``/report.json``).
"""

import json
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import trio

import nbdstream
from nbdstream.control.history import History
from nbdstream.control.report import statistics
from nbdstream.control.table import command
from nbdstream.control.web import Page
from nbdstream.disk import StreamedDisk
from nbdstream.errors import ProfileError
from nbdstream.leaf.base import State
from nbdstream.qmp.protocol import JSONObject
from nbdstream.streamer.job import StreamJob
from nbdstream.streamer.profile import Profile, path_beside, read_profile
from nbdstream.streamer.profile_store import ProfileStore
from nbdstream.tasks import in_worker
from nbdstream.text import shown

TEMPLATE = Path(__file__).with_name("page.html")
# The map's cells, and the steps in which a share of one is told.
CELLS = 4096
STEPS = 15
# Extents that are looked at in one step, and in all: a disk in more pieces is shown in part.
EXTENTS_AT_ONCE = 256
EXTENTS_MOST = 1 << 17
# Making a map may take this share of the time.
MAP_SHARE = 0.05
RANGES_SHOWN = 4000


class ReportSource:
    """What the report shows of a disk. ``clients`` counts those of the NBD server; ``profiles``
    is where a boot profile may be found besides at the leaf."""

    def __init__(
        self,
        disk: StreamedDisk,
        job: StreamJob | None,
        device: str,
        history: History,
        clients: Callable[[], int],
        profiles: ProfileStore | None = None,
    ) -> None:
        self._disk = disk
        self._job = job
        self._device = device
        self._history = history
        self._clients = clients
        self._profiles = profiles
        self._map: JSONObject = {}
        self._map_until = -1.0

    @command("x-nbdstream-report")
    async def report(self) -> JSONObject:
        """Everything that the page shows."""
        disk = self._disk
        if trio.current_time() >= self._map_until:
            began = trio.current_time()
            self._map = await cells_of(disk)
            took = trio.current_time() - began
            self._map_until = trio.current_time() + took / MAP_SHARE
        return {
            "version": nbdstream.__version__,
            "generated": time.time(),
            "device": self._device,
            "leaf": shown(disk.leaf.path),
            "format": disk.leaf.format,
            "read-only": disk.read_only,
            "clients": self._clients(),
            "stats": statistics(disk, self._job),
            "latency": self._history.latency,
            "history": self._history.as_json(),
            "map": self._map,
            "profile": await in_worker(self._profile),
        }

    def _profile(self) -> JSONObject | None:
        """Worker: the boot profile of this image, as far as one is known."""
        profile: Profile | None = None
        try:
            profile = read_profile(path_beside(self._disk.leaf.path))
        except (ProfileError, OSError):
            pass  # the recorder says so
        reference = self._disk.leaf.backing
        if profile is None and self._profiles is not None and reference is not None:
            profile = self._profiles.find(reference.identity, reference.size)
        if profile is None:
            return None
        step = -(-len(profile.ranges) // RANGES_SHOWN) or 1
        return {
            "bytes": profile.bytes,
            "seconds": profile.seconds,
            "complete": profile.complete,
            "count": len(profile.ranges),
            "ranges": [
                [each.offset, each.length] for each in islice(profile.ranges, 0, None, step)
            ],
        }


async def cells_of(disk: StreamedDisk) -> JSONObject:
    """The disk as `CELLS` cells at the most: ``local`` and ``zero`` have a hexadecimal digit for
    each, how much of it is that, in `STEPS` steps. ``seen``: up to where it was looked at."""
    size, count = disk.size, min(CELLS, max(1, disk.size // 512))
    weights = {State.DATA: [0.0] * count, State.ZERO: [0.0] * count}
    offset = seen = 0
    while offset < size and seen < EXTENTS_MOST:
        for extent in await disk.leaf_extents(offset, size - offset, EXTENTS_AT_ONCE):
            seen += 1
            offset = extent.end
            if extent.state is State.UNALLOCATED:
                continue
            kind = State.ZERO if extent.state is State.ZERO else State.DATA
            _weigh(weights[kind], extent.offset, extent.end, size)
        await trio.lowlevel.checkpoint()
    return {
        "cells": count,
        "local": _digits(weights[State.DATA]),
        "zero": _digits(weights[State.ZERO]),
        "seen": offset,
    }


def _weigh(cells: list[float], offset: int, end: int, size: int) -> None:
    """Add a range to the shares of the cells in which it lies."""
    count = len(cells)
    first, last = offset * count // size, (end - 1) * count // size
    share = count / size
    if first == last:
        cells[first] += (end - offset) * share
        return
    cells[first] += first + 1 - offset * share
    cells[last] += end * share - last
    cells[first + 1 : last] = [1.0] * (last - first - 1)


def _digits(cells: list[float]) -> str:
    """What is there at all is not shown as nothing, and what is not whole not as whole."""
    digits = []
    for share in cells:
        step = round(share * STEPS)
        if share > 0.0001:
            step = max(step, 1)
        if share < 0.9999:
            step = min(step, STEPS - 1)
        digits.append(f"{step:x}")
    return "".join(digits)


def live_pages(source: ReportSource) -> dict[str, Page]:
    """The page, and what it asks for to go on, by their paths."""

    async def html() -> bytes:
        return page(await source.report(), live=True).encode()

    async def data() -> bytes:
        return json.dumps(await source.report(), separators=(",", ":")).encode()

    return {
        "/": Page("text/html; charset=utf-8", html),
        "/report.json": Page("application/json", data),
    }


def page(report: JSONObject, *, live: bool) -> str:
    """The page as HTML; ``live``: it keeps asking its server for what is new."""
    # Within a script element nothing but "</" and "<!" has a meaning to HTML.
    data = json.dumps(report | {"live": live}, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text().replace("/*DATA*/", data, 1)
