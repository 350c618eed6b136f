# SPDX-License-Identifier: Apache-2.0
"""Servers that pivot by themselves once their disk is complete, with a real QEMU."""

import os
import socket
from pathlib import Path

import pytest
import trio

from nbdstream.guest.disks import Disk
from nbdstream.qmp.client import QMPClient
from testbed.peers import nbdkit, nbdstream_serve, run
from tests.pivot_support import SIZE, ask, image_file, inserted, is_running, qemu, qemu_io

pytestmark = pytest.mark.timeout(90)

image = pytest.fixture(image_file)


async def test_a_server_pivots_and_exits_once_the_guest_is_there(
    tmp_path: Path, image: Path
) -> None:
    """The disk is complete before QEMU starts: that is said once, and the guest's first request
    has the server try again."""
    leaf = tmp_path / "leaf.qcow2"
    option = ("--pivot", str(tmp_path / "vm.qmp"))
    with nbdkit("file", image, readonly=True) as far:
        with nbdstream_serve(leaf, far.uri, *option) as server:
            server.wait_until(lambda: "no pivot yet" in server.stderr(), "a refusal", 20)
            with qemu(tmp_path, Disk.nbd(server.uri)) as vm:
                with trio.fail_after(30):
                    while server.process.poll() is None:  # noqa: ASYNC110
                        await trio.sleep(0.01)
                assert server.process.returncode == 0
                (disk,) = await inserted(vm)
                assert str(leaf) in disk["image"]["filename"]
                assert await is_running(vm)
                await qemu_io(vm, "d0", "write -P 0x11 0 64k")
                await qemu_io(vm, "d0", "flush")
            refusal, success = server.stderr().splitlines()
            assert f"no pivot yet: no QMP server at {option[1]}" in refusal
            assert success.startswith(
                "nbdstream: pivoted: QEMU uses the leaf itself; the guest was"
            )
    run(["qemu-io", "-f", "qcow2", "-c", "read -P 0x11 0 64k", leaf])


async def test_a_refusal_is_said_once_and_the_guest_goes_on_until_it_is_over(
    tmp_path: Path, image: Path
) -> None:
    leaf = tmp_path / "leaf.qcow2"
    option = ("--pivot", str(tmp_path / "vm.qmp"))
    with nbdkit("file", image, readonly=True) as far:
        with nbdstream_serve(leaf, far.uri, "--stream", "paused", *option) as server:
            with qemu(tmp_path, Disk.nbd(server.uri)) as vm:
                async with QMPClient.connect(vm) as qmp:
                    target = {"driver": "null-co", "node-name": "copy", "size": SIZE}
                    await qmp.execute("blockdev-add", target)
                    job = {"job-id": "j", "device": "d0", "target": "copy", "sync": "full"}
                    await qmp.execute("blockdev-backup", job | {"speed": 1})
                await ask(str(server.control), "job-resume", id="disk0")
                server.wait_until(lambda: "no pivot yet" in server.stderr(), "a refusal", 20)
                run(["nbdinfo", "--size", server.uri])  # a client comes and goes: it tries again
                # Through the device: the job lets no other program write to the node.
                (device,) = await ask(vm, "query-block")
                await qemu_io(vm, f"-d {device['qdev']}", "write -P 0x11 0 64k")
                assert server.process.poll() is None
                await ask(vm, "job-cancel", id="j")
                with trio.fail_after(30):
                    while server.process.poll() is None:  # noqa: ASYNC110
                        await trio.sleep(0.01)
                assert server.process.returncode == 0
                assert await is_running(vm)
                await qemu_io(vm, "d0", "read -P 0x11 0 64k")
            refusal, _success = server.stderr().splitlines()
            assert "the job j is at work on the disk" in refusal


async def test_a_service_manager_is_told_and_the_unit_ends_well(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd's part: Type=notify, and a unit that is not restarted on success."""
    leaf = tmp_path / "leaf.qcow2"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(20)
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setitem(os.environ, "NOTIFY_SOCKET", str(tmp_path / "notify"))
        with nbdkit("file", image, readonly=True) as far:
            with nbdstream_serve(leaf, far.uri, "--pivot", str(tmp_path / "vm.qmp")) as server:
                assert manager.recv(100) == b"READY=1"
                with qemu(tmp_path, Disk.nbd(server.uri)):
                    while b"STOPPING=1" not in await trio.to_thread.run_sync(manager.recv, 4096):
                        pass  # how the disk does
                    assert server.process.wait(20) == 0


def test_a_read_only_server_has_nothing_to_give(tmp_path: Path, image: Path) -> None:
    with pytest.raises(RuntimeError, match=r"--pivot gives the leaf .* --read-only"):
        run(["nbdstream", "serve", image, "--read-only", "--pivot", tmp_path / "vm.qmp"])
