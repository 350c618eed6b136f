# SPDX-License-Identifier: Apache-2.0
"""One pivot from beginning to end, or back to where it began; docs/pivot.md has the table.

All that can be checked is checked while the guest runs. Then the guest is stopped, each server
lets go of its leaf, QEMU opens the leaves and puts all of them into the place of the exports
in one transaction, and the guest goes on. Whatever fails is settled by a look at QEMU's block
graph: it says whether the disks are on the leaves or on the exports, and with that which way
to go.
"""

import logging
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio

from nbdstream.errors import NbdstreamError
from nbdstream.pivot.nodes import Attached, Graph, PivotError
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import CommandError, JSONObject, QMPError

log = logging.getLogger(__name__)

# blockdev-reopen is stable from here on.
QEMU_LEAST = (6, 1)
# Seconds that one step gets while the guest stands still, and that a server gets to end.
STEP_SECONDS = 20.0
END_SECONDS = 20.0
_NODE = "nbdstream-leaf-"
_PROBE = "nbdstream-probe"


@dataclass(frozen=True)
class PivotDisk:
    """``control`` is the socket of the disk's server; ``leaf_path`` the leaf as QEMU sees it,
    "" if that is the path which the server uses."""

    control: str
    leaf_path: str = ""


@dataclass(frozen=True)
class _Prepared:
    """A disk that has passed the checks."""

    control: str
    leaf: str
    format: str
    attached: Attached
    node: str  # the leaf's, in QEMU

    def leaf_node(self) -> JSONObject:
        """Arguments of blockdev-add for the leaf."""
        raw = self.attached.raw
        common = {
            "read-only": raw["ro"],
            "cache": {key: raw["cache"][key] for key in ("direct", "no-flush")},
            "discard": "unmap",
        }
        node = {"driver": self.format, "node-name": self.node, **common}
        if self.format != "raw":
            node["backing"] = None  # all is local, whatever the leaf still names
        return {**node, "file": {"driver": "file", "filename": self.leaf, **common}}

    def reopened(self, file: str) -> JSONObject:
        """Options of blockdev-reopen for the guest's disk; those that are not given would be
        set to their defaults."""
        raw = self.attached.raw
        return {
            "driver": "raw",
            "node-name": self.attached.name,
            "read-only": raw["ro"],
            "cache": {key: raw["cache"][key] for key in ("direct", "no-flush")},
            "detect-zeroes": raw["detect_zeroes"],
            "discard": "unmap",
            "file": file,
        }


async def pivot(qmp: str, disks: Sequence[PivotDisk]) -> float:
    """Have the guest of the QEMU at ``qmp`` go on from its leaves; end their servers.

    Returns:
        Seconds for which the guest was stopped; 0 if it was paused already (it stays so).

    Raises:
        PivotError: it did not take place. The message says where the guest is.
        QMPError: a socket does not answer; nothing was changed.
    """
    async with QMPClient.connect(qmp) as qemu:
        await _clean(qemu, disks)
        prepared = await _prepare(qemu, disks)
        running = (await qemu.execute("query-status"))["running"]
        # Not to be cancelled: the guest stands still, and each step takes a short time.
        with trio.CancelScope(shield=True):
            began = trio.current_time()
            try:
                await _switch(qemu, prepared, running=running)
            except (NbdstreamError, OSError, trio.TooSlowError) as error:
                failure = error
            else:
                await _end_servers(prepared)
                return trio.current_time() - began if running else 0.0
    with trio.CancelScope(shield=True):
        await _settle(qmp, prepared, failure, running=running)
    return trio.current_time() - began if running else 0.0


def _new_name() -> str:
    """A name for a leaf's node that QEMU has not given to another one."""
    return _NODE + secrets.token_hex(4)


# -- before -----------------------------------------------------------------------------------


async def _prepare(qemu: QMPClient, disks: Sequence[PivotDisk]) -> list[_Prepared]:
    version = qemu.version["qemu"]
    if (version["major"], version["minor"]) < QEMU_LEAST:
        raise PivotError(
            f"QEMU {version['major']}.{version['minor']} cannot replace a disk's file: "
            f"{QEMU_LEAST[0]}.{QEMU_LEAST[1]} can"
        )
    graph = await Graph.of(qemu)
    prepared = []
    for disk in disks:
        facts = await _ask(disk.control, "x-nbdstream-pivot-query")
        if reason := facts.get("refused"):
            raise PivotError(f"{facts['leaf']}: {reason}")
        attached = graph.find(facts["uris"])
        leaf = disk.leaf_path or facts["leaf"]
        prepared.append(_Prepared(disk.control, leaf, facts["format"], attached, _new_name()))
        await _probe(qemu, prepared[-1])
    if len({one.attached.name for one in prepared}) < len(prepared):
        raise PivotError("the same disk is named twice")
    return prepared


async def _probe(qemu: QMPClient, disk: _Prepared) -> None:
    """Whether QEMU can open the leaf's file. It takes no lock and reads nothing of it."""
    node = {"driver": "file", "node-name": _PROBE, "filename": disk.leaf, "locking": "off"}
    try:
        await qemu.execute("blockdev-add", {**node, "read-only": disk.attached.raw["ro"]})
    except CommandError as error:
        raise PivotError(
            f"QEMU cannot open the leaf: {error}. It needs the right to read and write the file,"
            " and its own path of it (--leaf-path)"
        ) from error
    await qemu.execute("blockdev-del", {"node-name": _PROBE})


async def _clean(qemu: QMPClient, disks: Sequence[PivotDisk]) -> None:
    """Undo what a pivot that was killed has left: nodes of leaves that no disk uses, and leaves
    that were let go of."""
    for node in await qemu.execute("query-named-block-nodes", {"flat": True}):
        name = node["node-name"]
        if name == _PROBE or name.startswith(_NODE):
            with suppress(CommandError):  # in use: by a disk that has been pivoted
                await qemu.execute("blockdev-del", {"node-name": name})
    for disk in disks:
        if (await _ask(disk.control, "x-nbdstream-pivot-query"))["let-go"]:
            await _ask(disk.control, "x-nbdstream-take-back")


# -- forth ------------------------------------------------------------------------------------


async def _switch(qemu: QMPClient, disks: Sequence[_Prepared], *, running: bool) -> None:
    with trio.fail_after(STEP_SECONDS):
        if running:
            await qemu.execute("stop")
        for disk in disks:
            await _ask(disk.control, "x-nbdstream-let-go")
        for disk in disks:
            await qemu.execute("blockdev-add", disk.leaf_node())
        options = [disk.reopened(disk.node) for disk in disks]
        await qemu.execute("blockdev-reopen", {"options": options})
        if running:
            await qemu.execute("cont")
        graph = await Graph.of(qemu)
        for disk in disks:
            if graph.file_of(disk.attached.name) != disk.node:
                raise PivotError(f"{disk.leaf}: QEMU did not go over to it")


async def _end_servers(disks: Sequence[_Prepared]) -> None:
    """They are not needed any more. Best effort: one that stays does no harm."""
    for disk in disks:
        with suppress(QMPError), trio.move_on_after(END_SECONDS):
            async with QMPClient.connect(disk.control) as qmp:
                await qmp.execute("quit")
                while True:
                    await qmp.wait_event()


# -- whatever failed ---------------------------------------------------------------------------


async def _settle(
    qmp: str, disks: Sequence[_Prepared], failure: Exception, *, running: bool
) -> None:
    """Find out on which side the disks are, and have the guest go on there.

    Raises:
        PivotError: they are on the exports, or that is not known.
    """
    why = str(failure) or "no answer in time"
    try:
        with trio.fail_after(STEP_SECONDS):
            async with QMPClient.connect(qmp) as qemu:
                if await _forth(qemu, disks, running=running):
                    log.warning("%s; the guest runs from its leaves nevertheless", why)
                    await _end_servers(disks)
                    return
                for disk in disks:
                    with suppress(CommandError):  # it may not have been added
                        await qemu.execute("blockdev-del", {"node-name": disk.node})
                troubles = await _take_back(disks)
                if troubles:
                    raise PivotError(
                        f"{why}; the guest is stopped, because {'; '.join(troubles)}. Serve that"
                        " leaf again on the same socket, then continue the guest (QMP 'cont')"
                    )
                if running:
                    await qemu.execute("cont")
    except (QMPError, trio.TooSlowError) as error:
        troubles = await _take_back(disks)
        kept = f"; {'; '.join(troubles)}" if troubles else ""
        raise PivotError(f"{why}; QEMU does not answer any more ({error}){kept}") from failure
    raise PivotError(f"{why}; the guest goes on as before") from failure


async def _forth(qemu: QMPClient, disks: Sequence[_Prepared], *, running: bool) -> bool:
    """If the disks are on their leaves, let the guest go on there. They are all on one side:
    QEMU replaced them in one transaction."""
    graph = await Graph.of(qemu)
    if not all(graph.file_of(disk.attached.name) == disk.node for disk in disks):
        return False
    if running and not (await qemu.execute("query-status"))["running"]:
        await qemu.execute("cont")
    return True


async def _take_back(disks: Sequence[_Prepared]) -> list[str]:
    """Have each server open its leaf again; what did not work."""
    troubles = []
    for disk in disks:
        try:
            await _ask(disk.control, "x-nbdstream-take-back")
        except QMPError as error:
            troubles.append(f"{disk.leaf} was not taken back: {error}")
    return troubles


async def _ask(control: str, command: str) -> JSONObject:
    async with QMPClient.connect(control) as qmp:
        answer: JSONObject = await qmp.execute(command)
        return answer
