# SPDX-License-Identifier: Apache-2.0
"""Migration by TLS: memory and disks, and certificates that are not good enough."""

from dataclasses import replace
from pathlib import Path

import nbd
import pytest
import trio

from nbdstream.guest.disks import Disk
from nbdstream.migrate.memory import Settings
from nbdstream.migrate.plan import MigrationError, MigrationPlan
from nbdstream.migrate.run import Migration
from nbdstream.migrate.switchover import Phase
from nbdstream.qmp.client import QMPClient
from nbdstream.tasks import open_background_nursery
from testbed.certificates import make_authority
from testbed.guests.systems import RunningGuest
from testbed.migrations import arrangement
from testbed.migrations.afterwards import finish
from testbed.migrations.arrangement import Ends, last_acknowledged
from testbed.peers import Peer, nbdstream_serve
from testbed.remotes import free_port

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A directory that is good for both ends at localhost and 127.0.0.1."""
    authority = make_authority(tmp_path / "authority")
    directory = tmp_path / "pki"
    for end in ("server", "client"):
        authority.issue(directory, end)
    return directory


def secure(plan: MigrationPlan, directory: Path) -> MigrationPlan:
    """The plan over TCP with TLS. The source's memory goes by way of `relay`."""
    listen = f"127.0.0.1:{free_port()}"
    disks = tuple(replace(disk, listen=listen) for disk in plan.disks)
    return replace(
        plan,
        disks=disks,
        memory=f"tcp:localhost:{free_port()}",
        memory_listen=f"tcp:127.0.0.1:{free_port()}",
        tls=str(directory),
    )


async def relay(
    plan: MigrationPlan, heard: bytearray, *, task_status: trio.TaskStatus[None]
) -> None:
    """Pass memory on, and keep what its first bytes were."""
    port, target = (int(uri.rpartition(":")[2]) for uri in (plan.memory, plan.memory_listen))

    async def carry(source: trio.SocketStream, to: trio.SocketStream, keep: bool) -> None:
        async for data in source:
            if keep and len(heard) < 4096:
                heard.extend(data)
            await to.send_all(data)
        await to.send_eof()

    async def pass_on(here: trio.SocketStream) -> None:
        there = await trio.open_tcp_stream("127.0.0.1", target)
        async with there, trio.open_nursery() as nursery:
            nursery.start_soon(carry, here, there, True)
            nursery.start_soon(carry, there, here, False)

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_tcp, pass_on, port)
        task_status.started()


def refused_in_clear(plan: MigrationPlan) -> bool:
    """Whether the offer of the first disk answers nothing without TLS."""
    host, _, port = plan.disks[0].listen.rpartition(":")
    client = nbd.NBD()
    client.set_opt_mode(True)
    client.connect_tcp(host, port)
    with pytest.raises(nbd.Error, match="Operation not supported"):
        client.opt_list(lambda *_names: 0)
    client.opt_abort()
    return True


async def migrate(plan: MigrationPlan) -> tuple[bytes, list[bool]]:
    """Migrate; what memory's connection began with, and whether disks were refused in clear."""
    heard, asked = bytearray(), list[bool]()

    def watch(phase: Phase, _facts: object) -> None:
        if phase is Phase.MEMORY and not asked:
            asked.append(refused_in_clear(plan))

    async with open_background_nursery() as nursery:
        await nursery.start(relay, plan, heard)
        await Migration(plan, watch).run()
    return bytes(heard), asked


async def test_memory_and_a_disk_of_qemu(
    ends: Ends, busybox_disk: Path, certificates: Path
) -> None:
    plan = secure(ends.plan(ends.disk("qcow2", node="disk0")), certificates)
    async with arrangement.source(ends, Disk.file(busybox_disk)) as guest:
        heard, asked = await migrate(plan)
        seen = last_acknowledged(guest.console.transcript)
        assert asked == [True]
        assert heard[:2] == b"\x16\x03"  # a TLS record with a handshake
    async with QMPClient.connect(plan.destination_qmp) as qmp:
        assert (await qmp.execute("query-migrate-parameters"))["tls-creds"] == ""
    await finish(ends, plan.disks[0].leaf, seen)


async def test_a_disk_of_nbdstream(
    ends: Ends, remote: Peer, tmp_path: Path, certificates: Path
) -> None:
    leaf = tmp_path / "here.qcow2"
    with nbdstream_serve(leaf, remote.uri, "--stream", "off") as server:
        disk = ends.disk("qcow2", control=str(server.control))
        plan = secure(ends.plan(disk), certificates)
        async with arrangement.source(ends, Disk.nbd(server.uri)) as guest:
            heard, asked = await migrate(plan)
            seen = last_acknowledged(guest.console.transcript)
        assert asked == [True]
        assert heard[:2] == b"\x16\x03"
    await finish(ends, plan.disks[0].leaf, seen)


async def unharmed(guest: RunningGuest, before: Settings) -> None:
    """The guest goes on writing at the source, whose QEMU is as it was."""
    assert (await guest.guest.qmp.execute("query-status"))["running"]
    assert await Settings.of(guest.guest.qmp) == before
    assert await guest.guest.qmp.execute("query-block-exports") == []
    seen = last_acknowledged(guest.console.transcript)
    await guest.console.wait_for(f"ACK {seen + 3}\\b", 60)


async def test_certificates_that_are_not_good_enough(
    ends: Ends, busybox_disk: Path, tmp_path: Path, certificates: Path
) -> None:
    """The disk's client is of another authority; then memory's server is of another name."""
    stranger = tmp_path / "stranger"
    make_authority(tmp_path / "other").issue(stranger, "client")
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        (stranger / name).write_bytes((certificates / name).read_bytes())
    good = secure(ends.plan(ends.disk("qcow2", node="disk0")), certificates)
    port = good.memory_listen.rpartition(":")[2]
    misnamed = replace(good, memory=f"tcp:127.0.0.2:{port}", memory_listen=f"tcp:0.0.0.0:{port}")
    async with arrangement.source(ends, Disk.file(busybox_disk)) as guest:
        before = await Settings.of(guest.guest.qmp)
        with pytest.raises(MigrationError, match="the guest stays at the source, which is as"):
            await Migration(replace(good, tls=str(stranger))).run()
        await unharmed(guest, before)
        with pytest.raises(MigrationError, match=r"127\.0\.0\.2.*the guest stays at the source"):
            await Migration(misnamed).run()
        await unharmed(guest, before)
        await migrate(good)
        seen = last_acknowledged(guest.console.transcript)
    await finish(ends, good.disks[0].leaf, seen)
