# SPDX-License-Identifier: Apache-2.0
"""A server that was away for longer than the disk's reconnect-delay: QEMU fails requests until it
has connected again, and no pivot may have the guest run into that."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nbdstream.guest.disks import Disk
from nbdstream.pivot import connected
from nbdstream.pivot import run as pivot_run
from nbdstream.pivot.servers import PivotError
from nbdstream.qmp.client import QMPClient
from testbed.peers import Peer, nbdkit, nbdstream_serve
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

pytestmark = pytest.mark.timeout(180)

image = pytest.fixture(image_file)


async def disconnect(vm: str, server: Peer) -> None:
    """Kill the server. QEMU has given it up when this returns."""
    server.kill()
    assert "failed" in await try_to_read(vm)


async def try_to_read(vm: str) -> str:
    with pytest.raises(AssertionError) as failed:
        await qemu_io(vm, "d0", "read 0 512")
    return str(failed.value)


@pytest.mark.parametrize(("direct", "delay"), [(False, 1), (True, 0)], ids=["raw", "direct"])
async def test_qemu_connects_again_before_the_pivot(
    tmp_path: Path, image: Path, direct: bool, delay: int
) -> None:
    leaf = tmp_path / "leaf.qcow2"
    with ExitStack() as stack:
        far = stack.enter_context(nbdkit("file", image, readonly=True))
        server = stack.enter_context(nbdstream_serve(leaf, far.uri))
        await wait_local(server)
        disk = Disk.nbd(server.uri, reconnect_delay=delay)
        vm = stack.enter_context(qemu(tmp_path, Disk(disk.blockdev["file"]) if direct else disk))
        await qemu_io(vm, "d0", "write -P 0x11 0 64k")
        await disconnect(vm, server)
        again = stack.enter_context(nbdstream_serve(leaf, socket_path=server.socket))
        await pivot(vm, [disk_of(again)])
        (after,) = await inserted(vm)
        assert str(leaf) in after["image"]["filename"]
        assert await is_running(vm)
        await qemu_io(vm, after["node-name"], "read -P 0x11 0 64k")


async def test_a_qemu_that_does_not_connect_again_is_refused(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leaf is served elsewhere, say; the control socket is that of its server."""
    monkeypatch.setattr(connected, "RECONNECT_SECONDS", 0.5)
    leaf = tmp_path / "leaf.qcow2"
    with ExitStack() as stack:
        far = stack.enter_context(nbdkit("file", image, readonly=True))
        server = stack.enter_context(nbdstream_serve(leaf, far.uri))
        await wait_local(server)
        vm = stack.enter_context(qemu(tmp_path, Disk.nbd(server.uri)))
        await qemu_io(vm, "d0", "write -P 0x11 0 64k")
        await disconnect(vm, server)
        again = stack.enter_context(nbdstream_serve(leaf, socket_path=server.socket))
        assert again.socket is not None
        again.socket.rename(tmp_path / "moved")
        with pytest.raises(PivotError, match="QEMU has lost its connection") as refused:
            await pivot(vm, [disk_of(again)])
        assert "\n" not in str(refused.value)
        assert await is_running(vm)
        assert not (await ask(str(again.control), "x-nbdstream-pivot-query"))["let-go"]


async def test_a_stopped_guest_waits_until_qemu_has_connected(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server dies during a pivot, and is back after the delay: the guest would see I/O errors
    if it went on at once. What it wrote is flushed nowhere yet."""
    execute = QMPClient.execute
    monkeypatch.setattr(pivot_run, "TAKE_BACK_SECONDS", 0.2)
    leaf = tmp_path / "leaf.qcow2"
    continued: list[str] = []
    output = tmp_path / "vm.out"
    with ExitStack() as stack:
        far = stack.enter_context(nbdkit("file", image, readonly=True))
        server = stack.enter_context(nbdstream_serve(leaf, far.uri))
        await wait_local(server)
        vm = stack.enter_context(qemu(tmp_path, Disk.nbd(server.uri, reconnect_delay=1)))
        await qemu_io(vm, "d0", "write -P 0x11 0 64k")

        async def struck(self: QMPClient, name: str, *args: Any, **more: Any) -> Any:
            if name == "x-nbdstream-let-go" and server.process.poll() is None:
                server.kill()
            if name == "cont":
                continued.append(await read_over(self))
            return await execute(self, name, *args, **more)

        async def read_over(qmp: QMPClient) -> str:
            before = output.read_text()
            line = {"command-line": 'qemu-io d0 "read 0 512"'}
            await execute(qmp, "human-monitor-command", line)
            return output.read_text()[len(before) :]

        monkeypatch.setattr(QMPClient, "execute", struck)
        with pytest.raises(PivotError, match="the guest is stopped, because"):
            await pivot(vm, [disk_of(server)])
        assert not await is_running(vm)
        assert "failed" in await try_to_read(vm)
        again = stack.enter_context(nbdstream_serve(leaf, socket_path=server.socket))
        await pivot(vm, [disk_of(again)])
        assert await is_running(vm)
        assert len(continued) == 2  # to go back, then on the leaf
        assert all("read 512/512" in said for said in continued), continued
        await qemu_io(vm, "d0", "read -P 0x11 0 64k")
