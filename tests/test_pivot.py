# SPDX-License-Identifier: Apache-2.0
"""Pivot with a real QEMU, whose disks are written through its monitor instead of by a guest."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from nbdstream.guest.accelerator import qemu_binary
from nbdstream.guest.disks import Disk
from nbdstream.leaf import open_leaf
from nbdstream.pivot import run as pivot_run
from nbdstream.pivot.nodes import PivotError
from nbdstream.pivot.run import PivotDisk, pivot
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import GenericError
from testbed.peers import Peer, make_image, nbdkit, nbdstream_serve, run

SIZE = 2 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    make_image(path, SIZE)
    return path


@contextmanager
def qemu(directory: Path, *disks: Disk, arguments: tuple[str, ...] = ()) -> Iterator[str]:
    """A QEMU with these disks as nodes d0, d1, …; its QMP socket."""
    path = directory / "vm.qmp"
    command = [qemu_binary(), "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "32"]
    command += ["-qmp", f"unix:{path},server=on,wait=off", *arguments]
    for number, disk in enumerate(disks):
        command += ["-blockdev", disk.named(f"d{number}")]
        command += ["-device", f"virtio-blk-pci,drive=d{number},share-rw=on"]
    process = subprocess.Popen(command)
    try:
        while not listens(path):
            assert process.poll() is None
            time.sleep(0.01)
        yield str(path)
    finally:
        process.kill()
        process.wait()


def listens(path: Path) -> bool:
    with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        return True
    return False


async def ask(path: str, name: str, **arguments: Any) -> Any:
    with trio.fail_after(20):
        async with QMPClient.connect(path) as qmp:
            return await qmp.execute(name, {k.replace("_", "-"): v for k, v in arguments.items()})


async def qemu_io(path: str, node: str, text: str) -> str:
    line = f'qemu-io {node} "{text}"'
    answer: str = await ask(path, "human-monitor-command", command_line=line)
    assert "rror" not in answer and "attern" not in answer, answer
    return answer


async def wait_local(peer: Peer) -> None:
    with trio.fail_after(20):
        while "backing" in await ask(str(peer.control), "x-nbdstream-stats"):  # noqa: ASYNC110
            await trio.sleep(0.01)


def disk_of(peer: Peer) -> PivotDisk:
    return PivotDisk(str(peer.control))


async def is_running(path: str) -> bool:
    return bool((await ask(path, "query-status"))["running"])


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


async def test_a_disk_attached_by_drive(tmp_path: Path, image: Path) -> None:
    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", image, readonly=True) as far, nbdstream_serve(leaf, far.uri) as server:
        await wait_local(server)
        drive = f"file={server.uri},format=raw,if=virtio"
        with qemu(tmp_path, arguments=("-drive", drive)) as vm:
            with pytest.raises(PivotError, match="node-name="):
                await pivot(vm, [disk_of(server)])
        with qemu(tmp_path, arguments=("-drive", f"{drive},node-name=d0")) as vm:
            await pivot(vm, [disk_of(server)])
            assert await is_running(vm)


async def test_a_guest_that_is_paused_stays_paused(tmp_path: Path, image: Path) -> None:
    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", image, readonly=True) as far, nbdstream_serve(leaf, far.uri) as server:
        await wait_local(server)
        with qemu(tmp_path, Disk.nbd(server.uri)) as vm:
            await ask(vm, "stop")
            assert await pivot(vm, [disk_of(server)]) == 0
            assert not await is_running(vm)


async def test_what_cannot_be_pivoted_is_refused_and_goes_on(tmp_path: Path, image: Path) -> None:
    with ExitStack() as stack:
        far = stack.enter_context(nbdkit("file", image, readonly=True))
        partial = stack.enter_context(
            nbdstream_serve(tmp_path / "partial.raw", far.uri, "--stream", "off")
        )
        other = stack.enter_context(nbdstream_serve(tmp_path / "other.raw", far.uri))
        direct = stack.enter_context(nbdstream_serve(tmp_path / "direct.raw", far.uri))
        await wait_local(other)
        await wait_local(direct)
        plain = Disk(Disk.nbd(direct.uri).blockdev["file"])
        vm = stack.enter_context(qemu(tmp_path, Disk.nbd(partial.uri), plain))
        for server, words in ((partial, "not complete"), (other, "no disk on"), (direct, "raw")):
            with pytest.raises(PivotError, match=words):
                await pivot(vm, [disk_of(server)])
            assert not (await ask(str(server.control), "x-nbdstream-pivot-query"))["let-go"]
        assert await is_running(vm)
        await qemu_io(vm, "d0", "write -P 0x11 0 64k")


STEPS = ("x-nbdstream-let-go", "blockdev-add", "blockdev-reopen", "cont")


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


@pytest.mark.parametrize("step", ["blockdev-add", "blockdev-reopen"])
async def test_a_tool_that_is_killed_leaves_what_the_next_one_can_mend(
    tmp_path: Path, image: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest is stopped then; it is paused already when the next one comes, and stays so."""
    execute = QMPClient.execute

    class Killed(BaseException):
        pass

    async def die(self: QMPClient, name: str, *args: Any, **more: Any) -> Any:
        if name == step:
            raise Killed
        return await execute(self, name, *args, **more)

    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", image, readonly=True) as far, nbdstream_serve(leaf, far.uri) as server:
        await wait_local(server)
        with qemu(tmp_path, Disk.nbd(server.uri)) as vm:
            await qemu_io(vm, "d0", "write -P 0x11 0 64k")
            monkeypatch.setattr(QMPClient, "execute", die)
            monkeypatch.setattr(pivot_run, "_probe", _no_probe)
            with pytest.raises((Killed, BaseExceptionGroup)):
                await pivot(vm, [disk_of(server)])
            monkeypatch.undo()
            assert not await is_running(vm)
            assert (await ask(str(server.control), "x-nbdstream-pivot-query"))["let-go"]
            await pivot(vm, [disk_of(server)])
            await ask(vm, "cont")
            await qemu_io(vm, "d0", "read -P 0x11 0 64k")


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
