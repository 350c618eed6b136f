# SPDX-License-Identifier: Apache-2.0
"""Guests move while they write; what they were told is durable is there afterwards."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from nbdstream.errors import BackingError
from nbdstream.guest.disks import Disk
from nbdstream.handover.seal import read_seal
from nbdstream.migrate import memory, monitor
from nbdstream.migrate import run as run_module
from nbdstream.migrate.destination import Spawned, nbdstream_command, qemu_command
from nbdstream.migrate.memory import Settings
from nbdstream.migrate.plan import DiskPlan, MigrationError
from nbdstream.migrate.recover import take_back
from nbdstream.migrate.run import Migration
from nbdstream.migrate.switchover import Phase
from nbdstream.qmp.client import EventQueue, QMPClient
from nbdstream.qmp.protocol import JSONObject, QMPConnectionError
from nbdstream.service import describe_backing
from testbed.link.control import link_process
from testbed.link.model import Shape
from testbed.migrations import arrangement
from testbed.migrations.arrangement import (
    Ends,
    destination,
    last_acknowledged,
    records,
    wait_acknowledged,
)
from testbed.peers import Peer, PeerError, make_image, nbdkit, nbdstream_serve, run

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def ends(tmp_path: Path, busybox_image: Path) -> Ends:
    return Ends(tmp_path, busybox_image)


@pytest.fixture
def remote(busybox_disk: Path) -> Iterator[Peer]:
    """The image from which the source's guest boots, far away."""
    with nbdkit("file", busybox_disk, readonly=True) as server:
        yield server


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
    """Wait until a destination's disk depends on nobody."""
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


async def finish(ends: Ends, leaf: str, seen: int) -> None:
    """The guest goes on writing at the destination; all that it acknowledged is in the leaf,
    which needs nobody any more."""
    async with destination(ends):
        await wait_acknowledged(ends, seen + 3)
    last = last_acknowledged(Path(ends.path("there.console")).read_text())  # noqa: ASYNC240
    await arrangement.end_server(ends.path("there0.control"))
    path = Path(leaf)
    assert records(as_raw(path, path.suffix[1:])) >= last > seen


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy-ram"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_guest_on_a_plain_file(
    ends: Ends, busybox_disk: Path, image_format: str, postcopy: bool
) -> None:
    disk = busybox_disk
    if image_format != "raw":
        disk = busybox_disk.with_suffix(f".{image_format}")
        run(["qemu-img", "convert", "-f", "raw", "-O", image_format, busybox_disk, disk])
    # Too slow to converge by itself, so that post-copy has something to do.
    slow = {"postcopy_ram": True, "max_bandwidth": 20 << 20, "downtime_limit": 0.001}
    plan = ends.plan(ends.disk("qcow2", node="disk0"), **(slow if postcopy else {}))
    async with arrangement.source(ends, Disk.file(disk, image_format)) as guest:
        summary = await Migration(plan).run()
        seen = last_acknowledged(guest.console.transcript)
        assert (await guest.guest.qmp.execute("query-status"))["status"] == "postmigrate"
        ram = (await guest.guest.qmp.execute("query-migrate"))["ram"]
        assert bool(ram["postcopy-bytes"]) == postcopy
        assert await guest.guest.qmp.execute("query-block-exports") == []
    seal = read_seal(str(disk))  # and what QEMU did in ending has not changed the image
    assert seal is not None and seal.format == image_format
    disk.unlink()
    assert summary.disk_bytes < 64 << 20
    await finish(ends, plan.disks[0].leaf, seen)


@pytest.mark.parametrize("there", ["raw", "qcow2", "qed"])
async def test_a_guest_on_nbdstream_that_still_streams(
    ends: Ends, remote: Peer, tmp_path: Path, there: str
) -> None:
    """The remote image, the source's leaf and the destination's are a chain for a while."""
    leaf = tmp_path / f"here.{there}"
    with nbdstream_serve(leaf, remote.uri, "--stream", "off") as server:
        plan = ends.plan(ends.disk(there, control=str(server.control)))
        async with arrangement.source(ends, Disk.nbd(server.uri)) as guest:
            await Migration(plan).run()
            seen = last_acknowledged(guest.console.transcript)
            report = await ask(server.control, "x-nbdstream-stats")
            assert not report["owner"] and "sealed" in report["frozen"]
    with nbdstream_serve(leaf, None, "--stream", "off") as again:
        with pytest.raises(PeerError, match=r"ead-only|ermission"):
            run(["qemu-io", "-f", "raw", "-c", "write 0 4k", again.uri])
    await finish(ends, plan.disks[0].leaf, seen)


async def test_two_disks(ends: Ends, busybox_disk: Path, remote: Peer, tmp_path: Path) -> None:
    data = tmp_path / "data.raw"
    make_image(data, 16 << 20)
    with nbdstream_serve(tmp_path / "here.qcow2", remote.uri) as server:
        plan = ends.plan(
            ends.disk("qcow2", control=str(server.control)),
            ends.disk("qcow2", number=1, node="disk1"),
        )
        disks = Disk.nbd(server.uri), Disk.file(data)
        async with arrangement.source(ends, *disks) as guest:
            await Migration(plan).run()
            seen = last_acknowledged(guest.console.transcript)
    await finish(ends, plan.disks[0].leaf, seen)
    await arrangement.end_server(plan.disks[1].control)
    run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", data, plan.disks[1].leaf])


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
            assert before.parameters == odd
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


async def test_on_the_command_line(ends: Ends, busybox_disk: Path) -> None:
    """Interrupted once, killed once and taken back, and then done."""
    plan = ends.plan(ends.disk("qcow2", node="disk0"), max_bandwidth=20 << 20, downtime_limit=0.001)
    disk = plan.disks[0]
    values = f"source-node=disk0,listen={disk.listen},leaf={disk.leaf}"
    options = ["--source-qmp", plan.source_qmp, "--destination-qmp", plan.destination_qmp]
    options += ["--disk", f"{values},socket={disk.socket},control={disk.control}"]
    options += ["--memory", plan.memory, "--json"]
    command = [*nbdstream_command(), "migrate", *options]
    slow = ["--max-bandwidth", "4M", "--", *plan.command]
    log = Path(ends.path("tool.log"))
    async with arrangement.source(ends, Disk.file(busybox_disk)) as guest:
        before = await Settings.of(guest.guest.qmp)
        for ending in (signal.SIGINT, signal.SIGKILL):
            log.unlink(missing_ok=True)  # noqa: ASYNC240
            tool = Spawned([*command, *slow], log)
            with trio.fail_after(60):
                while "copying memory" not in log.read_text():  # noqa: ASYNC110, ASYNC240
                    await trio.sleep(0.05)
            os.kill(tool.pid, ending)
            status = await trio.to_thread.run_sync(os.waitpid, tool.pid, 0)
            if ending is signal.SIGINT:
                assert os.waitstatus_to_exitcode(status[1]) == 130, log.read_text()  # noqa: ASYNC240
            else:
                again = [*command, "--max-bandwidth", "4M", "--cancel"]
                result = await trio.run_process(again, capture_stdout=True)
                assert result.stdout == b"taken back: the guest runs at the source\n"
            assert not Path(disk.leaf).exists()  # noqa: ASYNC240
            assert await Settings.of(guest.guest.qmp) == before
            assert await guest.guest.qmp.execute("query-block-exports") == []
            seen = last_acknowledged(guest.console.transcript)
            await guest.console.wait_for(rf"ACK {seen + 3}\b", 60)
        fast = ["--max-bandwidth", "1G", "--", *plan.command]
        done = await trio.run_process([*command, *fast], capture_stdout=True)
        summary = json.loads(done.stdout)
        assert 0 < summary["downtime"] < summary["until_running"] < summary["until_local"]
        seen = last_acknowledged(guest.console.transcript)
    await finish(ends, disk.leaf, seen)
