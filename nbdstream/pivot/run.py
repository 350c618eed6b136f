# SPDX-License-Identifier: Apache-2.0
"""One pivot from beginning to end, or back to where it began; docs/pivot.md has the table.

All that can be checked is checked while the guest runs. Then the guest is stopped, each server
lets go of its leaf, QEMU opens the leaves and puts them into the place of the exports, and the
guest goes on. Whatever fails is settled by a look at QEMU's block graph: it says which disks are
on the leaves and which on the exports, and with that which way to go.
"""

import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager

import trio

from nbdstream.errors import NbdstreamError
from nbdstream.pivot.connected import RECONNECT_SECONDS, wait_connected
from nbdstream.pivot.leaf import PivotLeaf, backing_node
from nbdstream.pivot.leftovers import (
    LEAF,
    PivotDisk,
    clear_up,
    delete_node,
    forget_stop,
    go_on,
    remember_stop,
)
from nbdstream.pivot.nodes import Graph
from nbdstream.pivot.servers import Monitor, PivotError
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import QMPError

log = logging.getLogger(__name__)

# blockdev-reopen is stable from here on.
QEMU_LEAST = (6, 1)
# Seconds that the checks get, and that the steps get while the guest stands still.
CHECK_SECONDS = 30.0
STEP_SECONDS = 20.0
TAKE_BACK_SECONDS = 3.0
_POLL = 0.1


async def pivot(monitor: Monitor, disks: Sequence[PivotDisk], *, now: bool = False) -> float:
    """Have the guest of this QEMU go on from its leaves; end their servers.

    Args:
        now: also from leaves that are not complete, where QEMU can read the backing itself.

    Returns:
        Seconds for which the guest was stopped; 0 if it was paused already (it stays so), or if
        nothing was left to do.

    Raises:
        PivotError: it did not take place. The message says where the guest is.
        NbdstreamError, OSError: a socket does not answer, or a leaf that an earlier pivot had let
            go of cannot be taken back.
    """
    async with monitor.turn():
        async with monitor.open() as qemu:
            with _in_time(CHECK_SECONDS):
                rest = await clear_up(qemu, disks)
            with _in_time(CHECK_SECONDS):
                prepared = await _prepare(qemu, rest, now=now)
                running = (await qemu.execute("query-status"))["running"]
            if not prepared:
                return 0.0
            # Not to be cancelled: the guest stands still, and each step takes a short time.
            with trio.CancelScope(shield=True):
                began = trio.current_time()
                try:
                    with trio.fail_after(STEP_SECONDS):
                        async with AsyncExitStack() as lines:
                            for disk in prepared:
                                await lines.enter_async_context(disk.server.line())
                            pause = await _switch(qemu, prepared, running=running, now=now)
                except (NbdstreamError, OSError, trio.TooSlowError) as error:
                    failure = error
                else:
                    # Closing the old node, QEMU may wait for a server that has just died.
                    with trio.move_on_after(STEP_SECONDS):
                        await _leave(qemu, prepared)
                    return pause
        with trio.CancelScope(shield=True):
            await _settle(monitor, prepared, failure, running=running)
        return trio.current_time() - began if running else 0.0


@contextmanager
def _in_time(seconds: float) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError as error:
        raise PivotError(f"QEMU or a server gives no answer in {seconds:g} s") from error


# -- before -----------------------------------------------------------------------------------


async def _prepare(qemu: QMPClient, disks: Sequence[PivotDisk], *, now: bool) -> list[PivotLeaf]:
    version = qemu.version["qemu"]
    if (version["major"], version["minor"]) < QEMU_LEAST:
        raise PivotError(
            f"QEMU {version['major']}.{version['minor']} cannot replace a disk's file: "
            f"{QEMU_LEAST[0]}.{QEMU_LEAST[1]} can"
        )
    graph = await Graph.of(qemu)
    prepared = []
    for disk in disks:
        facts = await disk.server.facts(now=now)
        if reason := facts.get("refused"):
            raise PivotError(f"{facts['leaf']}: {reason}")
        attached = graph.find(facts["uris"])
        await wait_connected(qemu, graph.devices_over(attached.nbd), facts["leaf"])
        leaf, node = disk.leaf_path or facts["leaf"], LEAF + secrets.token_hex(4)
        prepared.append(
            PivotLeaf(
                disk.server,
                leaf,
                facts["format"],
                attached,
                node,
                backing_node(facts),
                thin="image" in facts,
            )
        )
        await prepared[-1].probe(qemu)
    if len({one.attached.name for one in prepared}) < len(prepared):
        raise PivotError("the same disk is named twice")
    return prepared


# -- forth ------------------------------------------------------------------------------------


async def _switch(
    qemu: QMPClient, disks: Sequence[PivotLeaf], *, running: bool, now: bool
) -> float:
    """Returns for how many seconds the guest was stopped."""
    if running:
        await remember_stop(qemu)
    began = trio.current_time()
    if running:
        await qemu.execute("stop")
    await _for_each(disks, lambda disk: disk.server.let_go(now=now))
    await _for_each(disks, lambda disk: disk.add(qemu))
    await _replace(qemu, disks)
    if running:
        await qemu.execute("cont")
    pause = trio.current_time() - began if running else 0.0
    graph = await Graph.of(qemu)
    for disk in disks:
        if not graph.in_use(disk.node):
            raise PivotError(f"{disk.leaf}: QEMU did not go over to it")
    return pause


async def _for_each(
    disks: Sequence[PivotLeaf], step: Callable[[PivotLeaf], Awaitable[None]]
) -> None:
    """Take a step for all disks at the same time, to keep the pause short. All have ended when
    this does.

    Raises:
        NbdstreamError, OSError: what the first of them raised.
    """
    failures: list[Exception] = []

    async def one(disk: PivotLeaf) -> None:
        try:
            await step(disk)
        except (NbdstreamError, OSError) as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        for disk in disks:
            nursery.start_soon(one, disk)
    if failures:
        raise failures[0]


async def _replace(qemu: QMPClient, disks: Sequence[PivotLeaf]) -> None:
    options = [disk.reopened() for disk in disks if not disk.attached.device]
    if options:
        await qemu.execute("blockdev-reopen", {"options": options})
    for disk in disks:
        if path := disk.attached.device:
            drive = {"path": path, "property": "drive", "value": disk.node}
            await qemu.execute("qom-set", drive)


async def _leave(qemu: QMPClient, disks: Sequence[PivotLeaf]) -> None:
    """These disks are on their leaves: end what they were on before."""
    await forget_stop(qemu)
    for disk in disks:
        await delete_node(qemu, disk.attached.nbd)
    for disk in disks:
        await disk.server.end()


# -- whatever failed ---------------------------------------------------------------------------


async def _settle(
    monitor: Monitor, disks: Sequence[PivotLeaf], failure: Exception, *, running: bool
) -> None:
    """Find out on which side the disks are, and have the guest go on there.

    Raises:
        PivotError: some are on the exports, or that is not known.
    """
    why = str(failure) or "no answer in time"
    try:
        with trio.fail_after(STEP_SECONDS + RECONNECT_SECONDS):
            async with monitor.open() as qemu:
                back = await _go_on(qemu, disks, why, running=running)
    except (QMPError, trio.TooSlowError) as error:
        troubles = await _take_back(disks)
        kept = f"; {'; '.join(troubles)}" if troubles else ""
        silent = str(error) or f"nothing in {STEP_SECONDS:g} s"
        raise PivotError(f"{why}; QEMU does not answer any more ({silent}){kept}") from failure
    if not back:
        log.warning("%s; the guest runs from its leaves nevertheless", why)
        return
    if len(back) < len(disks):
        there = f"{len(disks) - len(back)} of {len(disks)} disks are on their leaves"
        raise PivotError(f"{why}; {there}, the others are as before") from failure
    raise PivotError(f"{why}; the guest goes on as before") from failure


async def _go_on(
    qemu: QMPClient, disks: Sequence[PivotLeaf], why: str, *, running: bool
) -> list[PivotLeaf]:
    """Have the guest go on, each disk on the side where QEMU has it; those on their exports.

    Raises:
        PivotError: it cannot go on.
        QMPError: QEMU does not answer.
    """
    graph = await Graph.of(qemu)
    forth = [disk for disk in disks if graph.in_use(disk.node)]
    back = [disk for disk in disks if disk not in forth]
    for disk in back:
        await disk.remove(qemu)
    if troubles := await _take_back(back):
        raise PivotError(
            f"{why}; the guest is stopped, because {'; '.join(troubles)}. Serve that leaf again on"
            " the same socket, then continue the guest (QMP 'cont')"
        )
    if running:
        try:
            await go_on(qemu, [(disk.leaf, graph.devices_over(disk.attached.nbd)) for disk in back])
        except PivotError as error:
            raise PivotError(f"{why}; {error}") from error
    await _leave(qemu, forth)
    return back


async def _take_back(disks: Sequence[PivotLeaf]) -> list[str]:
    """Have each server open its leaf again; what did not work."""
    troubles = []
    for disk in disks:
        if trouble := await _try_to_take_back(disk):
            troubles.append(f"{disk.leaf} was not taken back: {trouble}")
    return troubles


async def _try_to_take_back(disk: PivotLeaf) -> str:
    """Again and again for a moment: a program that looks at the image has it locked, too."""
    patience = trio.current_time() + TAKE_BACK_SECONDS
    while True:
        try:
            await disk.server.take_back()
        except (NbdstreamError, OSError) as error:
            if trio.current_time() >= patience:
                return str(error)
        else:
            return ""
        await trio.sleep(_POLL)
