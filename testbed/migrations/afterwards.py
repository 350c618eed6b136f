# SPDX-License-Identifier: Apache-2.0
"""After a migration: servers that have died and are served again, and what the disks hold then."""

from pathlib import Path

import trio

from nbdstream.migrate.destination import Spawned, nbdstream_command
from nbdstream.migrate.plan import DiskPlan
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import JSONObject, QMPConnectionError
from testbed.migrations import arrangement
from testbed.migrations.arrangement import (
    Ends,
    destination,
    last_acknowledged,
    records,
    wait_acknowledged,
)
from testbed.peers import run


def as_raw(image: Path, image_format: str) -> Path:
    """A raw copy of a disk, to look into."""
    raw = image.with_suffix(".look")
    run(["qemu-img", "convert", "-f", image_format, "-O", "raw", image, raw])
    return raw


def serve_again(disk: DiskPlan) -> Spawned:
    """What an operator does when a destination's server has died."""
    command = [*nbdstream_command(), "serve", disk.leaf, "-U", disk.socket]
    return Spawned([*command, "--control", disk.control], Path(disk.leaf + ".log"))


async def wait_local(disk: DiskPlan) -> None:
    """Wait until a destination's disk has no backing."""
    with trio.fail_after(120):
        while not await is_local(disk):  # noqa: ASYNC110 - from another process
            await trio.sleep(0.1)


async def is_local(disk: DiskPlan) -> bool:
    try:
        return "backing" not in await ask(disk.control, "x-nbdstream-stats")
    except QMPConnectionError:
        return False  # its server is being started


async def ask(control: str | Path | None, command: str) -> JSONObject:
    assert control is not None
    async with QMPClient.connect(control) as qmp:
        answer: JSONObject = await qmp.execute(command)
        return answer


async def finish(ends: Ends, leaf: str, seen: int, *, pivoted: bool = False) -> None:
    """The guest goes on writing at the destination; all that it acknowledged is in the leaf,
    which needs no backing any more. ``pivoted``: there is no server even now."""
    async with destination(ends):
        await wait_acknowledged(ends, seen + 3)
    last = last_acknowledged(Path(ends.path("there.console")).read_text())  # noqa: ASYNC240
    control = ends.path("there0.control")
    assert Path(control).exists() is not pivoted  # noqa: ASYNC240
    if not pivoted:
        await arrangement.end_server(control)
    path = Path(leaf)
    assert records(as_raw(path, path.suffix[1:])) >= last > seen
