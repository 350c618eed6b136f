# SPDX-License-Identifier: Apache-2.0
"""Guests move while they write; what they were told is durable is there afterwards."""

import json
import os
import signal
from pathlib import Path

import nbd
import pytest
import trio

from nbdstream.guest.disks import Disk
from nbdstream.handover.seal import read_seal
from nbdstream.migrate.destination import Spawned, nbdstream_command
from nbdstream.migrate.memory import Settings
from nbdstream.migrate.run import Migration
from testbed.migrations import arrangement
from testbed.migrations.afterwards import ask, finish
from testbed.migrations.arrangement import (
    Ends,
    last_acknowledged,
)
from testbed.peers import Peer, make_image, nbdstream_serve, run

pytestmark = pytest.mark.timeout(300)


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
        assert await holds_writes(again)
    await finish(ends, plan.disks[0].leaf, seen)


async def holds_writes(server: Peer) -> bool:
    """Whether a server whose disk was handed over answers reads, and no write."""
    report = await ask(server.control, "x-nbdstream-stats")
    assert not report["owner"] and "sealed" in report["frozen"]
    client = nbd.NBD()
    client.connect_uri(server.uri)
    cookie = client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(4096)), 0)
    client.pread(4096, 0)  # asked for later, and answered
    return not client.aio_command_completed(cookie)


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
        assert summary["pivot"] > 0
        seen = last_acknowledged(guest.console.transcript)
    await finish(ends, disk.leaf, seen, pivoted=True)
