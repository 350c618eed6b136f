# SPDX-License-Identifier: Apache-2.0
"""Pivot with a real QEMU, whose disks are written through its monitor instead of by a guest."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from nbdstream.guest.disks import Disk
from nbdstream.leaf import open_leaf
from nbdstream.qmp.client import QMPClient
from testbed.peers import Peer, nbdkit, nbdstream_serve, run
from tests.pivot_support import (
    ask,
    disk_of,
    image_file,
    inserted,
    is_running,
    pivot,
    qemu,
    qemu_io,
    wait_local,
)

image = pytest.fixture(image_file)


@pytest.mark.parametrize("suffix", ["raw", "qcow2", "qed"])
async def test_qemu_goes_on_from_the_leaf(tmp_path: Path, image: Path, suffix: str) -> None:
    leaf = tmp_path / f"leaf.{suffix}"
    with nbdkit("file", image, readonly=True) as far, nbdstream_serve(leaf, far.uri) as server:
        await wait_local(server)
        with qemu(tmp_path, Disk.nbd(server.uri)) as vm:
            await qemu_io(vm, "d0", "write -P 0x11 0 64k")
            pause = await pivot(vm, [disk_of(server)])
            assert 0 < pause < 5
            assert await is_running(vm)
            with trio.fail_after(20):
                while server.process.poll() is None:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            assert server.process.returncode == 0
            await qemu_io(vm, "d0", "read -P 0x11 0 64k")
            await qemu_io(vm, "d0", "write -P 0x22 64k 64k")
            await ask(vm, "quit")
            with trio.fail_after(20):
                while Path(vm).exists():  # noqa: ASYNC110, ASYNC240
                    await trio.sleep(0.01)
        run(["qemu-io", "-f", suffix, "-c", "read -P 0x22 64k 64k", leaf])
        run(["qemu-io", "-f", suffix, "-c", "read -P 0x11 0 64k", leaf])
    open_leaf(str(leaf), format=suffix).close()


async def test_several_disks_in_one_pause(tmp_path: Path, image: Path) -> None:
    with ExitStack() as stack:
        far = stack.enter_context(nbdkit("file", image, readonly=True))
        leaves = [tmp_path / name for name in ("a.raw", "b.qcow2", "c.qed", "d.qcow2")]
        servers = [stack.enter_context(nbdstream_serve(leaf, far.uri)) for leaf in leaves]
        for server in servers:
            await wait_local(server)
        vm = stack.enter_context(qemu(tmp_path, *(Disk.nbd(server.uri) for server in servers)))
        for number in range(4):
            await qemu_io(vm, f"d{number}", f"write -P {number + 1} 0 4k")
        await pivot(vm, [disk_of(server) for server in servers])
        for number in range(4):
            await qemu_io(vm, f"d{number}", f"read -P {number + 1} 0 4k")


DIRECT = Disk.nbd("nbd+unix:///?socket=SOCKET").blockdev["file"]


@pytest.mark.parametrize(
    "attach",
    [
        ("-drive", "file=nbd+unix:///?socket=SOCKET,format=raw,if=virtio,node-name=d0"),
        ("-drive", "file=nbd+unix:///?socket=SOCKET,format=raw,if=virtio"),
        ("-drive", "file=nbd+unix:///?socket=SOCKET,format=raw,if=ide,detect-zeroes=on"),
        ("-blockdev", Disk(DIRECT).named("d0"), "-device", "virtio-blk-pci,drive=d0,id=disk"),
        ("-blockdev", Disk(DIRECT).named("d0"), "-device", "ide-hd,drive=d0"),
        (
            *("-blockdev", Disk(DIRECT).named("d0"), "-device", "virtio-scsi-pci"),
            *("-device", "scsi-hd,drive=d0,id=disk"),
        ),
    ],
    ids=["drive-named", "drive", "drive-ide", "direct-virtio", "direct-ide", "direct-scsi"],
)
async def test_however_the_disk_is_attached(
    tmp_path: Path, image: Path, attach: tuple[str, ...]
) -> None:
    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", image, readonly=True) as far, nbdstream_serve(leaf, far.uri) as server:
        await wait_local(server)
        arguments = tuple(word.replace("SOCKET", str(server.socket)) for word in attach)
        with qemu(tmp_path, arguments=arguments) as vm:
            (before,) = await inserted(vm)
            await pivot(vm, [disk_of(server)])
            assert await is_running(vm)
            (after,) = await inserted(vm)
            assert str(leaf) in after["image"]["filename"]
            for kept in ("detect_zeroes", "ro"):
                assert after[kept] == before[kept]
            for kept in ("direct", "no-flush"):  # "writeback" is the device's, set by the firmware
                assert after["cache"][kept] == before["cache"][kept]
            nodes = await ask(vm, "query-named-block-nodes", flat=True)
            assert not [node for node in nodes if node["drv"] == "nbd"]


async def test_a_guest_that_is_paused_stays_paused(tmp_path: Path, image: Path) -> None:
    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", image, readonly=True) as far, nbdstream_serve(leaf, far.uri) as server:
        await wait_local(server)
        with qemu(tmp_path, Disk.nbd(server.uri)) as vm:
            await ask(vm, "stop")
            assert await pivot(vm, [disk_of(server)]) == 0
            assert not await is_running(vm)


async def test_two_pivots_of_one_guest_take_turns(tmp_path: Path, image: Path) -> None:
    """Each stops and continues the guest: one must not continue it while the other is at work."""
    with ExitStack() as stack:
        far = stack.enter_context(nbdkit("file", image, readonly=True))
        leaves = [tmp_path / name for name in ("a.qcow2", "b.raw")]
        servers = [stack.enter_context(nbdstream_serve(leaf, far.uri)) for leaf in leaves]
        for server in servers:
            await wait_local(server)
        vm = stack.enter_context(qemu(tmp_path, *(Disk.nbd(server.uri) for server in servers)))
        pauses = []

        async def one(server: Peer) -> None:
            pauses.append(await pivot(vm, [disk_of(server)]))

        async with trio.open_nursery() as nursery:
            for server in servers:
                nursery.start_soon(one, server)
        assert len(pauses) == 2 and all(pauses)
        assert await is_running(vm)


async def test_a_node_on_the_export_that_nothing_uses_is_no_disk(
    tmp_path: Path, image: Path
) -> None:
    """A pivot that was killed at its end leaves one, and the next disk may be on that socket."""
    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", image, readonly=True) as far, nbdstream_serve(leaf, far.uri) as server:
        await wait_local(server)
        with qemu(tmp_path, Disk.nbd(server.uri)) as vm:
            old = Disk.nbd(server.uri).blockdev["file"]
            async with QMPClient.connect(vm) as qmp:
                await qmp.execute("blockdev-add", {**old, "node-name": "old"})
            await pivot(vm, [disk_of(server)])
            assert await is_running(vm)
