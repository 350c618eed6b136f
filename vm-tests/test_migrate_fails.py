# SPDX-License-Identifier: Apache-2.0
"""A migration that fails before the destination runs: the guest goes on at the source."""

import os
import signal
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from nbdstream.errors import BackingError
from nbdstream.guest.disks import Disk
from nbdstream.handover.seal import read_seal
from nbdstream.migrate import memory
from nbdstream.migrate import run as run_module
from nbdstream.migrate.destination import Spawned, qemu_command
from nbdstream.migrate.memory import Settings
from nbdstream.migrate.plan import MigrationError
from nbdstream.migrate.run import Migration
from nbdstream.migrate.switchover import Phase
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import JSONObject, QMPConnectionError
from testbed.link.control import link_process
from testbed.link.model import Shape
from testbed.migrations import arrangement
from testbed.migrations.afterwards import ask, finish
from testbed.migrations.arrangement import (
    Ends,
    last_acknowledged,
)
from testbed.peers import Peer, nbdstream_serve

pytestmark = pytest.mark.timeout(300)


class InjectedError(BackingError):
    """What goes wrong on purpose."""


@pytest.mark.parametrize("kind", ["file", "nbdstream"])
async def test_whatever_fails_before_the_destination_runs(
    ends: Ends, busybox_disk: Path, remote: Peer, tmp_path: Path, kind: str
) -> None:
    """Five attempts that fail, one in each phase, and the guest goes on writing; then it
    moves after all."""
    with nbdstream_serve(tmp_path / "here.qcow2", remote.uri) as server:
        if kind == "file":
            disk = Disk.file(busybox_disk)
            plan = ends.plan(ends.disk("qcow2", node="disk0"))
        else:
            disk = Disk.nbd(server.uri)
            plan = ends.plan(ends.disk("qcow2", control=str(server.control)))
        async with arrangement.source(ends, disk) as guest:
            for fatal in (
                Phase.MEMORY,
                Phase.STOPPED,
                Phase.SEALING,
                Phase.ACTIVATING,
                Phase.HANDING,
            ):

                def fail(phase: Phase, _facts: JSONObject, fatal: Phase = fatal) -> None:
                    if phase is fatal:
                        raise InjectedError(f"no luck in {phase.name}")

                with pytest.raises(MigrationError, match=rf"{fatal.name}; the guest stays at"):
                    await Migration(plan, fail).run()
                assert not os.path.lexists(plan.disks[0].leaf)  # noqa: ASYNC240
                seen = last_acknowledged(guest.console.transcript)
                await guest.console.wait_for(rf"ACK {seen + 3}\b", 60)
            await Migration(plan).run()
            seen = last_acknowledged(guest.console.transcript)
    await finish(ends, plan.disks[0].leaf, seen)


@pytest.mark.parametrize(
    ("victim", "at"),
    [
        ("qemu", Phase.MEMORY),
        ("qemu", Phase.STOPPED),
        ("qemu", Phase.SEALING),
        ("qemu", Phase.ACTIVATING),
        ("qemu", Phase.HANDING),
        # While it takes over, QEMU does not need its disk.
        ("nbdstream", Phase.MEMORY),
        ("nbdstream", Phase.STOPPED),
        ("nbdstream", Phase.SEALING),
        ("nbdstream", Phase.ACTIVATING),
    ],
)
async def test_the_destination_dies_before_it_runs(
    ends: Ends, remote: Peer, tmp_path: Path, victim: str, at: Phase
) -> None:
    """Killed for real: in the last phase the source's QEMU finds out by itself, and lets its
    guest go on while the disk is still sealed; not a single write may fail."""
    leaf = tmp_path / "here.qcow2"
    with nbdstream_serve(leaf, remote.uri) as server:
        plan = ends.plan(ends.disk("qcow2", control=str(server.control)))
        async with arrangement.source(ends, Disk.nbd(server.uri)) as guest:

            def kill(phase: Phase, facts: JSONObject) -> None:
                if phase is at and not facts:
                    process = move.qemu if victim == "qemu" else move.disks[0].process
                    assert process is not None
                    os.kill(process.pid, signal.SIGKILL)

            odd = {"max-bandwidth": 3 << 20, "downtime-limit": 123}
            await guest.guest.qmp.execute("migrate-set-parameters", odd)
            before = await Settings.of(guest.guest.qmp)
            move = Migration(plan, kill)
            with pytest.raises(MigrationError, match="the guest stays at the source"):
                await move.run()
            assert before.parameters.items() >= odd.items()
            assert await Settings.of(guest.guest.qmp) == before
            seen = last_acknowledged(guest.console.transcript)
            await guest.console.wait_for(rf"ACK {seen + 3}\b", 60)
            assert "I/O error" not in guest.console.transcript
            assert read_seal(str(leaf)) is None
            assert (await ask(server.control, "x-nbdstream-stats"))["owner"]


@pytest.mark.parametrize("link", ["memory", "disk"])
async def test_a_link_goes_silent_while_the_guest_stands_still(
    ends: Ends, remote: Peer, tmp_path: Path, link: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TCP would wait for a quarter of an hour. QEMU, in sending the rest of memory, does not
    even listen to its monitor."""
    monkeypatch.setattr(memory, "STALL_SECONDS", 5.0)
    monkeypatch.setattr(run_module, "SWITCH_SECONDS", 5.0)
    with ExitStack() as stack:
        server = stack.enter_context(nbdstream_serve(tmp_path / "here.qcow2", remote.uri))
        disk = ends.disk("qcow2", control=str(server.control))
        links = {
            name: stack.enter_context(link_process("127.0.0.1:0", target, Shape()))
            for name, target in {
                "memory": f"unix:{ends.path('memory')}",
                "disk": disk.listen,
            }.items()
        }
        plan = replace(
            ends.plan(replace(disk, reach=str(links["disk"].address))),
            memory=f"tcp:{links['memory'].address}",
            memory_listen=f"unix:{ends.path('memory')}",
            # So that there is more to send at the end than the sockets' buffers take.
            max_bandwidth=64 << 20,
            downtime_limit=1.0,
        )
        at = Phase.HANDING if link == "memory" else Phase.STOPPED

        def cut(phase: Phase, facts: JSONObject) -> None:
            if phase is at and not facts:
                links[link].cut("blackhole")

        async with arrangement.source(ends, Disk.nbd(server.uri)) as guest:
            words = "nothing of the memory" if link == "memory" else "did not change hands"
            with pytest.raises(MigrationError, match=f"{words}.*; the guest stays at the source"):
                await Migration(plan, cut).run()
            seen = last_acknowledged(guest.console.transcript)
            await guest.console.wait_for(rf"ACK {seen + 3}\b", 60)
            assert "I/O error" not in guest.console.transcript


async def test_a_destination_that_was_not_told_to_wait(ends: Ends, busybox_disk: Path) -> None:
    """Started without -S, it would run its guest as soon as it has it, though the migration
    is being taken back."""
    plan = ends.plan(ends.disk("qcow2", node="disk0"))
    command = [part for part in qemu_command(plan) if part != "-S"]
    plan = replace(plan, command=())
    scope = trio.CancelScope()
    servers: list[Spawned] = []

    def watch(phase: Phase, facts: JSONObject) -> None:
        if phase is Phase.HANDING:
            scope.cancel()

    async def start() -> None:
        while not Path(plan.disks[0].socket).exists():  # noqa: ASYNC110, ASYNC240
            await trio.sleep(0.01)
        servers.append(Spawned(command, Path(ends.path("there.log"))))

    async with arrangement.source(ends, Disk.file(busybox_disk)) as guest:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(start)
            with scope:
                await Migration(plan, watch).run()
        assert scope.cancelled_caught
        assert (await guest.guest.qmp.execute("query-status"))["running"]
        with pytest.raises(QMPConnectionError):
            async with QMPClient.connect(plan.destination_qmp):
                pass
        assert last_acknowledged(Path(ends.path("there.console")).read_text()) == 0  # noqa: ASYNC240
        await servers[0].end()
