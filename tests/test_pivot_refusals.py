# SPDX-License-Identifier: Apache-2.0
"""What cannot be pivoted is refused in one line, and the guest goes on."""

import fcntl
import os
import struct
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from nbdstream.guest.disks import Disk
from nbdstream.pivot import run as pivot_run
from nbdstream.pivot.leftovers import PivotDisk
from nbdstream.pivot.servers import ControlledServer, PivotError
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import QMPError
from testbed.peers import nbdkit, nbdstream_serve
from tests.pivot_support import (
    SIZE,
    ask,
    disk_of,
    image_file,
    is_running,
    pivot,
    qemu,
    qemu_io,
    wait_local,
)

image = pytest.fixture(image_file)


async def test_what_cannot_be_pivoted_is_refused_and_goes_on(tmp_path: Path, image: Path) -> None:
    with ExitStack() as stack:
        far = stack.enter_context(nbdkit("file", image, readonly=True))
        partial = stack.enter_context(
            nbdstream_serve(tmp_path / "partial.raw", far.uri, "--stream", "off")
        )
        other = stack.enter_context(nbdstream_serve(tmp_path / "other.raw", far.uri))
        busy = stack.enter_context(nbdstream_serve(tmp_path / "busy.raw", far.uri))
        odd = stack.enter_context(nbdstream_serve(tmp_path / "odd.raw", far.uri))
        for server in (other, busy, odd):
            await wait_local(server)
        group = ("-object", "throttle-group,id=slow")
        throttled = {"driver": "throttle", "throttle-group": "slow"}
        throttled["file"] = Disk.nbd(odd.uri).blockdev["file"]
        disks = (Disk.nbd(partial.uri), Disk.nbd(busy.uri), Disk(throttled))
        vm = stack.enter_context(qemu(tmp_path, *disks, arguments=group))
        target = {"driver": "null-co", "node-name": "copy", "size": SIZE, "read-zeroes": True}
        async with QMPClient.connect(vm) as qmp:
            await qmp.execute("blockdev-add", target)
            job = {"job-id": "j", "device": "d1", "target": "copy", "sync": "full", "speed": 1}
            await qmp.execute("blockdev-backup", job)
        for server, words in (
            (partial, "not complete"),
            (other, "no disk on"),
            (busy, "the job j is at work"),
            (odd, "throttle"),
        ):
            with pytest.raises(PivotError, match=words) as refused:
                await pivot(vm, [disk_of(server)])
            assert "\n" not in str(refused.value)
            assert not (await ask(str(server.control), "x-nbdstream-pivot-query"))["let-go"]
        assert await is_running(vm)
        await qemu_io(vm, "d0", "write -P 0x11 0 64k")


@pytest.mark.parametrize("trouble", ["missing", "directory", "denied", "locked", "twice"])
async def test_a_leaf_that_qemu_cannot_open_is_refused_and_the_guest_goes_on(
    tmp_path: Path, image: Path, trouble: str
) -> None:
    """By another path (another mount namespace), without the right to it, or in use."""
    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", image, readonly=True) as far, nbdstream_serve(leaf, far.uri) as server:
        await wait_local(server)
        # Once it has opened its disks, QEMU is another user, who may not write the leaf.
        arguments = ("-runas", "nobody") if trouble == "denied" else ()
        leaf.chmod(0o644)
        with qemu(tmp_path, Disk.nbd(server.uri), arguments=arguments) as vm:
            path = {"missing": "/nowhere/leaf.qcow2", "directory": str(tmp_path)}.get(trouble, "")
            disks = [PivotDisk(ControlledServer(str(server.control)), path)]
            words = "cannot open the leaf: .*--leaf-path"
            if trouble == "locked":
                # As a program that looks at the image for a moment.
                stolen = partial_lock(leaf)
                words = "lock.* the guest goes on as before"
            if trouble == "twice":
                disks, words = 2 * disks, "named twice"
            async with trio.open_nursery() as nursery:
                if trouble == "locked":
                    nursery.start_soon(unlock_once_let_go, stolen, str(server.control))
                with pytest.raises(PivotError, match=words) as refused:
                    await pivot(vm, disks)
            assert "\n" not in str(refused.value)
            assert await is_running(vm)
            await qemu_io(vm, "d0", "write -P 0x11 0 64k")
            leaf.chmod(0o666)
            if trouble != "denied":  # pytest's directory is closed to others
                await pivot(vm, [disk_of(server)])


def partial_lock(leaf: Path) -> int:
    """Hold "no other process may write" of QEMU's locks, by which a server that has the leaf is not
    disturbed. Returns the descriptor that has it."""
    fd = os.open(leaf, os.O_RDWR)
    lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 201, 1, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
    return fd


async def unlock_once_let_go(fd: int, control: str) -> None:
    """When QEMU has been refused the leaf, and the server would be, too."""
    while not (await ask(control, "x-nbdstream-pivot-query"))["let-go"]:  # noqa: ASYNC110
        await trio.sleep(0.01)
    await trio.sleep(0.1)
    os.close(fd)


async def test_a_qemu_that_is_too_old_is_refused(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pivot_run, "QEMU_LEAST", (99, 0))
    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", image, readonly=True) as far, nbdstream_serve(leaf, far.uri) as server:
        await wait_local(server)
        with qemu(tmp_path, Disk.nbd(server.uri)) as vm:
            with pytest.raises(PivotError, match=r"cannot replace a disk's file: 99\.0 can"):
                await pivot(vm, [disk_of(server)])
            assert await is_running(vm)


async def test_a_qmp_socket_that_another_program_uses_is_refused(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU serves one client at a time on a socket; libvirt's is never free."""
    monkeypatch.setattr("nbdstream.pivot.servers.CONNECT_SECONDS", 0.2)
    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", image, readonly=True) as far, nbdstream_serve(leaf, far.uri) as server:
        await wait_local(server)
        with qemu(tmp_path, Disk.nbd(server.uri)) as vm:
            async with QMPClient.connect(vm):
                with pytest.raises(QMPError, match="another program is connected"):
                    await pivot(vm, [disk_of(server)])
            with pytest.raises(QMPError, match="no QMP server"):
                await pivot(str(tmp_path / "none"), [disk_of(server)])
            assert await is_running(vm)
