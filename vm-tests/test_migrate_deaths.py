# SPDX-License-Identifier: Apache-2.0
"""A server, a host or the tool dies when the guest has been handed over."""

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
from nbdstream.migrate import memory, monitor
from nbdstream.migrate.plan import MigrationError
from nbdstream.migrate.recover import take_back
from nbdstream.migrate.run import Migration
from nbdstream.migrate.switchover import Phase
from nbdstream.qmp.client import EventQueue, QMPClient
from nbdstream.qmp.protocol import JSONObject, QMPConnectionError
from nbdstream.service import describe_backing
from testbed.migrations import arrangement
from testbed.migrations.afterwards import ask, finish, serve_again, wait_local
from testbed.migrations.arrangement import (
    Ends,
    last_acknowledged,
    wait_acknowledged,
)
from testbed.peers import Peer, nbdstream_serve

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy-ram"])
async def test_what_was_told_to_run_is_not_taken_back(
    ends: Ends, busybox_disk: Path, postcopy: bool
) -> None:
    """Whatever the guest at the destination does now; and a later tool, which has a migration
    from there to somewhere else to take back, is not mistaken about where it runs."""
    plan = ends.plan(ends.disk("qcow2", node="disk0"), postcopy_ram=postcopy)
    onward = ends.plan(
        ends.disk("qcow2", number=1, control=ends.path("there0.control")),
        source_qmp=plan.destination_qmp,
        destination_qmp=ends.path("onward.qmp"),
    )
    async with arrangement.source(ends, Disk.file(busybox_disk)) as guest:

        def interrupt(phase: Phase, facts: JSONObject) -> None:
            if phase is Phase.HANDING and postcopy:
                scope.cancel()  # too late for it: there is no way back from what begins now

        with trio.CancelScope() as scope:
            await Migration(plan, interrupt).run(follow=False)
        seen = last_acknowledged(guest.console.transcript)
        seen = await wait_acknowledged(ends, seen + 3)
        async with QMPClient.connect(plan.destination_qmp) as there:
            await there.execute("stop")
        with pytest.raises(MigrationError, match="too late"):
            await take_back(plan)
        async with QMPClient.connect(plan.destination_qmp) as there:
            await there.execute("cont")
        assert "taken back" in await take_back(onward)
        seen = await wait_acknowledged(ends, seen + 3)
        await wait_local(plan.disks[0])
    await finish(ends, plan.disks[0].leaf, seen)


@pytest.mark.parametrize("known", [True, False], ids=["known-to-be-dead", "out-of-reach"])
async def test_the_source_dies_when_it_has_handed_everything_over(
    ends: Ends, remote: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """The guest is at the destination alone then. It goes on there; or, where the tool cannot
    know that the source's QEMU is dead, it stays there until its user says so."""
    hand_over = memory.Memory.hand_over

    async def then_die(self: memory.Memory, events: EventQueue) -> None:
        await hand_over(self, events)
        await guest.guest.kill()
        raise QMPConnectionError("the QMP connection was lost")

    monkeypatch.setattr(memory.Memory, "hand_over", then_die)
    if not known:
        monkeypatch.setattr(monitor, "_stat", lambda _pid: ("S", "0", "ssh"))
    with nbdstream_serve(tmp_path / "here.qcow2", remote.uri) as server:
        plan = ends.plan(ends.disk("qcow2", control=str(server.control)))
        async with arrangement.source(ends, Disk.nbd(server.uri)) as guest:
            if known:
                await Migration(plan).run()
            else:
                with pytest.raises(MigrationError, match="has all of the guest"):
                    await Migration(plan).run()
                async with QMPClient.connect(plan.destination_qmp) as qmp:
                    assert (await qmp.execute("query-status"))["status"] == "paused"
                    await qmp.execute("cont")
                await wait_local(plan.disks[0])
            seen = last_acknowledged(guest.console.transcript)
            assert not (await ask(server.control, "x-nbdstream-stats"))["owner"]
    await finish(ends, plan.disks[0].leaf, seen)


async def test_the_destinations_server_is_killed_once_the_guest_is_there(
    ends: Ends, busybox_disk: Path
) -> None:
    plan = ends.plan(ends.disk("raw", node="disk0"))
    async with arrangement.source(ends, Disk.file(busybox_disk)) as guest:
        move = Migration(plan)
        await move.run(follow=False)
        seen = last_acknowledged(guest.console.transcript)
        seen = await wait_acknowledged(ends, seen + 3)
        process = move.disks[0].process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        os.waitpid(process.pid, 0)  # noqa: ASYNC222 - it is dying
        serve_again(plan.disks[0])
        await wait_acknowledged(ends, seen + 3)
        await wait_local(plan.disks[0])
    await finish(ends, plan.disks[0].leaf, seen)


async def test_the_sources_server_is_away_once_the_guest_has_gone(
    ends: Ends, remote: Peer, tmp_path: Path
) -> None:
    """It comes back sealed, under the same name, and the stream goes on; what comes back with
    its seal broken is refused for good."""
    leaf = tmp_path / "here.qcow2"
    with nbdstream_serve(leaf, remote.uri) as server:
        plan = ends.plan(ends.disk("qcow2", control=str(server.control)))
        async with arrangement.source(ends, Disk.nbd(server.uri)) as guest:

            def kill(phase: Phase, facts: JSONObject) -> None:
                if phase is Phase.RUNNING and not facts:
                    server.kill()

            await Migration(plan, kill).run(follow=False)
            seen = last_acknowledged(guest.console.transcript)
    there = plan.disks[0]
    offer = (await ask(there.control, "x-nbdstream-stats"))["backing"]["uri"]
    with pytest.raises(BackingError):
        await describe_backing(offer, "qcow2")
    seal = read_seal(str(leaf))
    assert seal is not None
    Path(f"{leaf}.sealed").rename(f"{leaf}.broken")  # noqa: ASYNC240
    with nbdstream_serve(leaf) as unsealed:
        async with QMPClient.connect(str(unsealed.control)) as qmp:
            new = await qmp.execute("x-nbdstream-export-add", {"listen-at": seal.listen})
            assert new["generation"] != seal.generation
            with pytest.raises(BackingError, match="no export"):
                await describe_backing(offer, "qcow2")
    Path(f"{leaf}.broken").rename(f"{leaf}.sealed")  # noqa: ASYNC240
    with nbdstream_serve(leaf):
        await wait_local(there)
    await finish(ends, there.leaf, seen)


async def test_the_sources_server_dies_while_the_guest_stands_still(
    ends: Ends, remote: Peer, tmp_path: Path
) -> None:
    """Sealed as the disk is then, the operator has to take the migration back."""
    leaf = tmp_path / "here.qcow2"
    with ExitStack() as servers:
        server = servers.enter_context(nbdstream_serve(leaf, remote.uri))
        plan = ends.plan(ends.disk("qcow2", control=str(server.control)))

        def kill(phase: Phase, facts: JSONObject) -> None:
            if phase is Phase.ACTIVATING and not facts:
                server.kill()

        async with arrangement.source(ends, Disk.nbd(server.uri, reconnect_delay=600)) as guest:
            with pytest.raises(MigrationError, match="belongs to the source, but could not end"):
                await Migration(plan, kill).run()
            seen = last_acknowledged(guest.console.transcript)
            with pytest.raises(MigrationError, match=r"may still be sealed.*once more"):
                await take_back(plan)
            assert (await guest.guest.qmp.execute("query-status"))["running"]
            with nbdstream_serve(leaf, socket_path=server.socket) as sealed:
                disk = replace(plan.disks[0], source_control=str(sealed.control))
                assert "taken back" in await take_back(replace(plan, disks=(disk,)))
            assert read_seal(str(leaf)) is None
            with nbdstream_serve(leaf, socket_path=server.socket):
                await guest.console.wait_for(rf"ACK {seen + 3}\b", 60)
                assert "I/O error" not in guest.console.transcript
