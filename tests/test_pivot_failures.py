# SPDX-License-Identifier: Apache-2.0
"""Pivots that fail or are killed at each of their steps, with a real QEMU."""

from pathlib import Path
from typing import Any

import pytest

from nbdstream.guest.disks import Disk, nbd_options
from nbdstream.pivot.leaf import PivotLeaf
from nbdstream.pivot.servers import PivotError
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import GenericError, QMPError
from testbed.peers import PeerError, nbdkit, nbdstream_serve, run
from tests.pivot_support import (
    ask,
    disk_of,
    image_file,
    is_running,
    pivot,
    qemu,
    qemu_io,
    wait_local,
)

STEPS = ("x-nbdstream-let-go", "blockdev-add", "blockdev-reopen", "cont")

image = pytest.fixture(image_file)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", ["stop", *STEPS])
async def test_a_step_that_fails_has_its_way_back(
    tmp_path: Path, image: Path, step: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step fails once, before it is carried out and after it: the guest goes on, on the
    side that the graph shows, and nothing that was written is lost."""
    execute = QMPClient.execute
    failed: list[str] = []

    async def fail(self: QMPClient, name: str, *args: Any, **more: Any) -> Any:
        if name != step or failed:
            return await execute(self, name, *args, **more)
        failed.append(name)
        if after:
            await execute(self, name, *args, **more)
        raise GenericError(f"told to fail at {name}")

    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", image, readonly=True) as far, nbdstream_serve(leaf, far.uri) as server:
        await wait_local(server)
        with qemu(tmp_path, Disk.nbd(server.uri)) as vm:
            await qemu_io(vm, "d0", "write -P 0x11 0 64k")
            monkeypatch.setattr(QMPClient, "execute", fail)
            forth = step == "cont" or (step == "blockdev-reopen" and after)
            if forth:
                await pivot(vm, [disk_of(server)])
            else:
                with pytest.raises(PivotError, match=r"goes on as before|cannot open"):
                    await pivot(vm, [disk_of(server)])
            assert failed
            monkeypatch.undo()
            assert await is_running(vm)
            await qemu_io(vm, "d0", "read -P 0x11 0 64k")
            await qemu_io(vm, "d0", "write -P 0x22 64k 64k")
            if not forth:
                assert (server.process.poll()) is None
                await pivot(vm, [disk_of(server)])  # the next attempt succeeds
            await qemu_io(vm, "d0", "read -P 0x22 64k 64k")


@pytest.mark.parametrize("step", ["blockdev-add", "blockdev-reopen", "cont", "closing", "quit"])
async def test_a_tool_that_is_killed_leaves_what_the_next_one_can_mend(
    tmp_path: Path, image: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest is stopped then; the next one knows by whom, and has it go on. In the end nothing
    in QEMU is connected to the server, which ends: the next 'stop' would wait for it."""
    execute = QMPClient.execute

    class Killed(BaseException):
        pass

    async def die(self: QMPClient, name: str, *args: Any, **more: Any) -> Any:
        killed = name == step and "stopped" not in str(args)
        if killed or (step == "closing" and "export" in str(args)):
            raise Killed
        return await execute(self, name, *args, **more)

    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", image, readonly=True) as far, nbdstream_serve(leaf, far.uri) as server:
        await wait_local(server)
        export = Disk({**nbd_options(server.uri), "reconnect-delay": 60}).named("export")
        disk = Disk({"driver": "raw", "discard": "unmap", "file": "export"})
        with qemu(tmp_path, disk, arguments=("-blockdev", export)) as vm:
            await qemu_io(vm, "d0", "write -P 0x11 0 64k")
            monkeypatch.setattr(QMPClient, "execute", die)
            monkeypatch.setattr(PivotLeaf, "probe", _no_probe)
            with pytest.raises((Killed, BaseExceptionGroup)):
                await pivot(vm, [disk_of(server)])
            monkeypatch.undo()
            assert await is_running(vm) is (step in ("closing", "quit"))
            assert (await ask(str(server.control), "x-nbdstream-pivot-query"))["let-go"]
            await pivot(vm, [disk_of(server)])
            assert await is_running(vm)
            server.process.wait(20)
            await qemu_io(vm, "d0", "read -P 0x11 0 64k")
            nodes = await ask(vm, "query-named-block-nodes")
            assert "nbd" not in {node["drv"] for node in nodes}
            names = [node["node-name"] for node in nodes]
            assert [name.startswith("nbdstream-leaf") for name in names].count(True) == 1
            assert "nbdstream-stopped" not in names


async def _no_probe(*_: object) -> None:
    """Nothing is opened before the guest is stopped."""


async def test_a_server_that_dies_meanwhile_leaves_the_guest_stopped_and_the_leaf_whole(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = QMPClient.execute
    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", image, readonly=True) as far, nbdstream_serve(leaf, far.uri) as server:
        await wait_local(server)
        with qemu(tmp_path, Disk.nbd(server.uri, reconnect_delay=60)) as vm:

            async def kill(self: QMPClient, name: str, *args: Any, **more: Any) -> Any:
                if name == "blockdev-reopen":
                    server.kill()
                    raise GenericError("the server is gone")
                return await execute(self, name, *args, **more)

            await qemu_io(vm, "d0", "write -P 0x11 0 64k")
            monkeypatch.setattr(QMPClient, "execute", kill)
            with pytest.raises(PivotError, match="Serve that leaf again"):
                await pivot(vm, [disk_of(server)])
            monkeypatch.undo()
            with nbdstream_serve(leaf, socket_path=server.socket):
                await ask(vm, "cont")
                await qemu_io(vm, "d0", "read -P 0x11 0 64k")


async def test_tool_and_server_killed_with_the_leaf_open_in_qemu(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU has the leaf locked then, and no process uses it: the next tool closes it there, so that
    it can be served again; the one after that finishes."""
    execute = QMPClient.execute

    async def die(self: QMPClient, name: str, *args: Any, **more: Any) -> Any:
        if name == "blockdev-reopen":
            raise KeyError
        return await execute(self, name, *args, **more)

    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", image, readonly=True) as far, nbdstream_serve(leaf, far.uri) as server:
        await wait_local(server)
        with qemu(tmp_path, Disk.nbd(server.uri, reconnect_delay=60)) as vm:
            monkeypatch.setattr(QMPClient, "execute", die)
            with pytest.raises((KeyError, BaseExceptionGroup)):
                await pivot(vm, [disk_of(server)])
            monkeypatch.undo()
            server.kill()
            with pytest.raises(PeerError, match="is in use"):
                run(["nbdstream", "serve", leaf, "--run", "true"])
            with pytest.raises(QMPError, match="no QMP server"):
                await pivot(vm, [disk_of(server)])
            assert not await is_running(vm)
            with nbdstream_serve(leaf, socket_path=server.socket) as again:
                await pivot(vm, [disk_of(again)])
                assert await is_running(vm)
