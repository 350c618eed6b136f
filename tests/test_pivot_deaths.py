# SPDX-License-Identifier: Apache-2.0
"""QEMU and the server killed at each step of a pivot, and a leaf that cannot be left clean."""

import resource
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from nbdstream.errors import NbdstreamError
from nbdstream.guest.disks import Disk
from nbdstream.pivot import run as pivot_run
from nbdstream.pivot import servers as pivot_servers
from nbdstream.pivot.servers import PivotError
from nbdstream.qmp.client import QMPClient
from testbed.peers import Peer, PeerError, nbdkit, nbdstream_serve, run
from tests.pivot_support import (
    ask,
    disk_of,
    image_file,
    inserted,
    is_running,
    pivot,
    qemu_io,
    qemu_process,
    wait_local,
)

pytestmark = pytest.mark.timeout(120)

STEPS = ("stop", "x-nbdstream-let-go", "blockdev-add", "blockdev-reopen", "cont")
PATTERN = "-P 0x11 0 64k"

image = pytest.fixture(image_file)


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not answer after this time has died, in these tests."""
    monkeypatch.setattr(pivot_run, "STEP_SECONDS", 4.0)
    monkeypatch.setattr(pivot_run, "TAKE_BACK_SECONDS", 1.0)
    monkeypatch.setattr(pivot_servers, "CONNECT_SECONDS", 4.0)


def strike(monkeypatch: pytest.MonkeyPatch, step: str, act: Callable[[], None]) -> None:
    """Act before a step of the pivot, once; the checks before the pause do not count."""
    execute = QMPClient.execute
    stopping: list[str] = []

    async def struck(self: QMPClient, name: str, *args: Any, **more: Any) -> Any:
        if "nbdstream-stopped" in str(args):
            stopping.append(name)
        elif name == step and len(stopping) == 1:
            stopping.append(name)
            act()
        return await execute(self, name, *args, **more)

    monkeypatch.setattr(QMPClient, "execute", struck)


@pytest.mark.parametrize("suffix", ["raw", "qcow2", "qed"])
@pytest.mark.parametrize("step", STEPS)
async def test_qemu_dies(
    tmp_path: Path, image: Path, step: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says so. The leaf is whole, and can be served or opened by the next QEMU."""
    leaf = tmp_path / f"leaf.{suffix}"
    with nbdkit("file", image, readonly=True) as far, nbdstream_serve(leaf, far.uri) as server:
        await wait_local(server)
        with qemu_process(tmp_path, Disk.nbd(server.uri)) as (vm, process):

            def kill() -> None:
                process.kill()
                process.wait()

            await qemu_io(vm, "d0", f"write {PATTERN}")
            strike(monkeypatch, step, kill)
            with pytest.raises(PivotError, match="QEMU does not answer any more") as died:
                await pivot(vm, [disk_of(server)])
            assert "\n" not in str(died.value)
        monkeypatch.undo()
        assert not (await ask(str(server.control), "x-nbdstream-pivot-query"))["let-go"]
        run(["qemu-io", "-f", "raw", "-c", f"read {PATTERN}", server.uri])
        assert server.terminate() == 0
    run(["qemu-io", "-f", suffix, "-c", f"read {PATTERN}", leaf])


@pytest.mark.parametrize("step", STEPS)
async def test_the_server_dies(
    tmp_path: Path, image: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest stays stopped until the leaf is served again, or runs from it already; what it
    wrote is there."""
    leaf = tmp_path / "leaf.qcow2"
    with ExitStack() as stack:
        far = stack.enter_context(nbdkit("file", image, readonly=True))
        server = stack.enter_context(nbdstream_serve(leaf, far.uri))
        await wait_local(server)
        disk = Disk.nbd(server.uri, reconnect_delay=5)
        vm, _ = stack.enter_context(qemu_process(tmp_path, disk))
        await qemu_io(vm, "d0", f"write {PATTERN}")
        strike(monkeypatch, step, server.kill)
        if step == "cont":
            await pivot(vm, [disk_of(server)])
        else:
            with pytest.raises(PivotError) as died:
                await pivot(vm, [disk_of(server)])
            assert "\n" not in str(died.value)
            monkeypatch.undo()
            await pivot_again(vm, leaf, server, stack)
        assert str(leaf) in (await inserted(vm))[0]["image"]["filename"]
        assert await is_running(vm)
        await qemu_io(vm, "d0", f"read {PATTERN}")


async def pivot_again(vm: str, leaf: Path, dead: Peer, stack: ExitStack) -> None:
    """What docs/pivot.md says: serve the leaf again on the same socket, then pivot. While QEMU has
    the leaf open without using it, a pivot closes it there, once QEMU has given the server up."""
    with trio.fail_after(60):
        while True:
            try:
                serving = nbdstream_serve(leaf, socket_path=dead.socket)
                served = stack.enter_context(serving)
                break
            except PeerError as error:
                assert "is in use" in str(error)
            with suppress(NbdstreamError):
                await pivot(vm, [disk_of(dead)])
        while True:
            try:
                await pivot(vm, [disk_of(served)])
                break
            except NbdstreamError as error:  # QEMU has not connected again
                print(error)


async def test_of_two_disks_one_cannot_be_left_clean(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No byte can be written any more while the second one is let go of: both go back."""
    execute = QMPClient.execute
    with ExitStack() as stack:
        far = stack.enter_context(nbdkit("file", image, readonly=True))
        leaves = [tmp_path / name for name in ("a.qcow2", "b.qcow2")]
        servers = [stack.enter_context(nbdstream_serve(leaf, far.uri)) for leaf in leaves]
        for server in servers:
            await wait_local(server)
        disks = [Disk.nbd(server.uri) for server in servers]
        vm, _ = stack.enter_context(qemu_process(tmp_path, *disks))

        limit = partial(resource.prlimit, servers[1].pid, resource.RLIMIT_FSIZE)
        letting_go: list[None] = []

        async def full(self: QMPClient, name: str, *args: Any, **more: Any) -> Any:
            if name != "x-nbdstream-let-go":
                return await execute(self, name, *args, **more)
            letting_go.append(None)
            limit((0, resource.RLIM_INFINITY))
            try:
                return await execute(self, name, *args, **more)
            finally:
                letting_go.pop()
                if not letting_go:  # the other server may not be at it yet, or still
                    limit((resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        for number in range(2):
            await qemu_io(vm, f"d{number}", f"write {PATTERN}")
        monkeypatch.setattr(QMPClient, "execute", full)
        with pytest.raises(PivotError, match="the guest goes on as before") as refused:
            await pivot(vm, [disk_of(server) for server in servers])
        assert "File too large" in str(refused.value) and "\n" not in str(refused.value)
        monkeypatch.undo()
        assert await is_running(vm)
        for number in range(2):
            await qemu_io(vm, f"d{number}", f"read {PATTERN}")
        await pivot(vm, [disk_of(server) for server in servers])
        for number in range(2):
            await qemu_io(vm, f"d{number}", f"read {PATTERN}")
