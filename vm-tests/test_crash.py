# SPDX-License-Identifier: Apache-2.0
"""Trouble under a running guest: the server is killed, the remote is cut off, the disk is
handed to QEMU half-way. The guest's synced files must be there, its file system whole."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from nbdstream.guest.disks import Disk
from nbdstream.guest.qemu import Machine, run_qemu
from testbed.demo.ways import slow_remote
from testbed.guests.systems import BUSYBOX, RunningGuest, boot, check_filesystem
from testbed.link.model import Shape
from testbed.peers import Peer, binary, nbdkit, nbdstream_serve, run

LINK = Shape(rate=200e6, delay=0.010)
CHECK = "cd /data && sha256sum -c SHA256SUMS"
# QEMU's NBD client waits so long for a server to come back before the guest sees an error.
RECONNECT = 60


def write_record(number: int) -> str:
    """A command that writes a file that checks itself, synced."""
    return (
        f"dd if=/dev/urandom of=/root/{number} bs=3k count=7 2>/dev/null && cd /root && "
        f"sha256sum {number} >> SUMS && sync"
    )


async def records_are_there(guest: RunningGuest, count: int) -> None:
    """All records written so far are whole."""
    await guest.run("cd /root && sha256sum -c SUMS")
    assert (await guest.run("wc -l < /root/SUMS")).strip() == str(count)


def plain_copy(leaf: Path, leaf_format: str, tmp_path: Path) -> Path:
    """The leaf's content as a raw image."""
    raw = tmp_path / "plain.raw"
    run(["qemu-img", "convert", "-f", leaf_format, "-O", "raw", leaf, raw])
    return raw


@pytest.mark.parametrize("leaf_format", ["raw", "qcow2", "qed"])
async def test_a_guest_outlives_the_servers_crashes(
    leaf_format: str, busybox_image: Path, tmp_path: Path
) -> None:
    """kill -9, three times, while the guest writes and the disk is streamed; each time the
    server is started again on the same socket, and the guest goes on."""
    leaf = tmp_path / f"leaf.{leaf_format}"
    socket = tmp_path / "nbd.sock"
    with nbdkit("file", busybox_image / "disk.raw", readonly=True) as backing:
        with ExitStack() as servers:

            def serve(*arguments: str) -> Peer:
                uri = backing.uri if not leaf.exists() else None
                server = nbdstream_serve(leaf, uri, *arguments, socket_path=socket)
                return servers.enter_context(server)

            server = serve("--speed", "8M")
            async with boot(BUSYBOX, Disk.nbd(server.uri, RECONNECT)) as guest:
                for crash in range(3):
                    await guest.run(write_record(crash))
                    server.kill()
                    server = serve(*(() if crash == 2 else ("--speed", "8M")))
                    await records_are_there(guest, crash + 1)
                await guest.run(CHECK)
                await guest.power_off()
            assert await trio.to_thread.run_sync(server.terminate) == 0
        with nbdstream_serve(leaf, None, "--exit-when-complete") as server:
            assert await trio.to_thread.run_sync(server.wait, 120) == 0
    if leaf_format != "raw":
        run(["qemu-img", "check", "-q", leaf])
    check_filesystem(plain_copy(leaf, leaf_format, tmp_path))


@pytest.mark.parametrize("leaf_format", ["raw", "qcow2", "qed"])
async def test_a_guest_goes_on_after_the_server_was_killed(
    leaf_format: str, busybox_image: Path, tmp_path: Path
) -> None:
    """What the guest has written past its page cache, and did not flush, is there after each
    kill; its file system is whole."""
    leaf = tmp_path / f"leaf.{leaf_format}"
    socket = tmp_path / "nbd.sock"
    with (
        nbdkit("file", busybox_image / "disk.raw", readonly=True) as backing,
        ExitStack() as servers,
    ):

        def serve() -> Peer:
            uri = backing.uri if not leaf.exists() else None
            server = nbdstream_serve(leaf, uri, "--speed", "2M", socket_path=socket)
            return servers.enter_context(server)

        server = serve()
        async with boot(BUSYBOX, Disk.nbd(server.uri, RECONNECT)) as guest:
            await guest.run("dd if=/dev/urandom of=/random bs=64k count=16 2>/dev/null")
            total = await guest.run("sha256sum < /random")
            for kill in range(5):
                await guest.run(f"dd if=/random of=/root/{kill} bs=64k oflag=direct 2>/dev/null")
                server.kill()
                server = serve()
                await guest.run("echo 3 > /proc/sys/vm/drop_caches")
                assert await guest.run(f"sha256sum < /root/{kill}") == total
            await guest.run("sync")
            for kill in range(5):
                assert await guest.run(f"sha256sum < /root/{kill}") == total
            await guest.run(CHECK)
            await guest.power_off()
        assert await trio.to_thread.run_sync(server.terminate) == 0
        check_filesystem(plain_copy(leaf, leaf_format, tmp_path))


async def test_a_guest_waits_for_a_lost_remote_and_goes_on(
    busybox_image: Path, tmp_path: Path
) -> None:
    leaf = tmp_path / "leaf.qcow2"
    with slow_remote(busybox_image / "disk.raw", LINK) as link:
        with nbdstream_serve(leaf, link.uri(), "--stream", "off") as server:
            async with boot(BUSYBOX, Disk.nbd(server.uri)) as guest:
                await guest.run(write_record(0))
                await guest.run("sha256sum /data/001.bin")
                link.cut("blackhole")
                # What is local needs no remote.
                await guest.run("echo 3 > /proc/sys/vm/drop_caches; sha256sum /data/001.bin")
                await guest.console.send("sha256sum /data/017.bin && echo GOT $((1+1))\n")
                with pytest.raises(trio.TooSlowError):
                    with trio.fail_after(3):
                        await guest.console.wait_for("GOT 2", 60)
                link.restore()
                await guest.console.wait_for("GOT 2", 60)
                await guest.run(CHECK)
                await records_are_there(guest, 1)
                await guest.power_off()


async def test_qemu_takes_over_half_way_and_finishes_the_job(
    busybox_image: Path, tmp_path: Path
) -> None:
    """Stopped half-way, the leaf is QEMU's to boot from, with its own copy-on-read and
    its own block-stream; the other way round, we finish what QEMU began."""
    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", busybox_image / "disk.raw", readonly=True) as backing:
        # The copy-on-read of QEMU 7.2 dies of extended L2 entries, also of its own.
        run([binary("NBDSTREAM"), "create", leaf, "-b", backing.uri, "--no-extended-l2"])
        with nbdstream_serve(leaf, None, "--speed", "4M") as server:
            async with boot(BUSYBOX, Disk.nbd(server.uri)) as guest:
                await guest.run(write_record(0))
                await guest.power_off()
            assert await trio.to_thread.run_sync(server.terminate) == 0
        run(["qemu-img", "check", "-q", leaf])
        chain = run(["qemu-img", "info", "--backing-chain", leaf])
        assert backing.uri in chain
        own = Disk(
            {
                "driver": "copy-on-read",
                "file": Disk.file(leaf, "qcow2").blockdev,
            }
        )
        async with boot(BUSYBOX, own) as guest:
            await records_are_there(guest, 1)
            await guest.run(write_record(1))
            await guest.power_off()
        run(["qemu-img", "check", "-q", leaf])
        with nbdstream_serve(leaf, None, "--exit-when-complete") as server:
            assert await trio.to_thread.run_sync(server.wait, 120) == 0
    # The remote is gone for good.
    async with boot(BUSYBOX, Disk.file(leaf, "qcow2")) as guest:
        await records_are_there(guest, 2)
        await guest.run(CHECK)
        await guest.power_off()
    check_filesystem(plain_copy(leaf, "qcow2", tmp_path))


async def test_qemus_own_stream_job_finishes_what_we_began(
    busybox_image: Path, tmp_path: Path
) -> None:
    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", busybox_image / "disk.raw", readonly=True) as backing:
        with nbdstream_serve(leaf, backing.uri, "--speed", "4M") as server:
            async with boot(BUSYBOX, Disk.nbd(server.uri)) as guest:
                await guest.run(write_record(0))
                await guest.power_off()
            assert await trio.to_thread.run_sync(server.terminate) == 0
        machine = Machine(disks=(Disk.file(leaf, "qcow2"),), extra=("-S",))
        async with run_qemu(machine) as qemu:
            await qemu.qmp.execute("block-stream", {"job-id": "job", "device": "disk0"})
            await qemu.qmp.wait_event("BLOCK_JOB_COMPLETED")
    assert "backing file" not in run(["qemu-img", "info", leaf])
    with nbdstream_serve(leaf) as server:
        async with boot(BUSYBOX, Disk.nbd(server.uri)) as guest:
            await records_are_there(guest, 1)
            await guest.run(CHECK)
            await guest.power_off()
