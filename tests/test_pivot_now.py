# SPDX-License-Identifier: Apache-2.0
"""Early pivots: QEMU goes on from a leaf that is not complete, with the backing that it names."""

from pathlib import Path

import pytest
import trio

from nbdstream.guest.disks import Disk
from nbdstream.pivot import run as pivot_run
from nbdstream.pivot.servers import Monitor, PivotError
from nbdstream.qmp.client import QMPClient
from testbed.peers import Peer, assert_same, nbdkit, nbdstream_serve, run
from tests.pivot_support import (
    ask,
    disk_of,
    image_file,
    is_running,
    qemu,
    qemu_io,
    wait_local,
    without_reopening,
)

image = pytest.fixture(image_file)


PAUSED = ("--stream", "paused")


async def pivot_now(vm: str, server: Peer) -> float:
    return await pivot_run.pivot(Monitor.at(vm), [disk_of(server)], now=True)


async def test_qemu_goes_on_with_its_own_copy_on_read(tmp_path: Path, image: Path) -> None:
    """Small writes leave clusters that are local in part; they are made whole first. Then QEMU's
    own job streams the rest, and the backing is not needed any more."""
    leaf, expected = tmp_path / "leaf.qcow2", tmp_path / "expected"
    run(["cp", image, expected])
    changes = ["write -P 0x11 512 512", "write -P 0x22 1M 4k", "write -P 0x33 1500k 6k"]
    run(["qemu-io", "-f", "raw", *(word for text in changes for word in ("-c", text)), expected])
    with nbdkit("file", image, readonly=True) as far:
        with nbdstream_serve(leaf, far.uri, *PAUSED) as server:
            with qemu(tmp_path, Disk.nbd(server.uri)) as vm:
                for text in changes[:2]:
                    await qemu_io(vm, "d0", text)
                assert await pivot_now(vm, server) > 0
                assert await is_running(vm)
                assert server.wait(20) == 0
                await qemu_io(vm, "d0", changes[2])
                await qemu_io(vm, "d0", "read -P 0x11 512 512")
                (node,) = [
                    node["node-name"]
                    for node in await ask(vm, "query-named-block-nodes", flat=True)
                    if node["node-name"].endswith("-image")
                ]
                async with QMPClient.connect(vm) as qmp:
                    await qmp.execute("block-stream", {"job-id": "j", "device": node})
                    with trio.fail_after(30):
                        done = await qmp.wait_event("BLOCK_JOB_COMPLETED")
                    assert "error" not in done.data
                    await qmp.execute("quit")
                with trio.fail_after(20):
                    while Path(vm).exists():  # noqa: ASYNC110, ASYNC240
                        await trio.sleep(0.01)
    raw = tmp_path / "raw"
    run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", leaf, raw])
    assert_same(raw, expected)


async def test_an_early_pivot_that_fails_is_taken_back_and_the_stream_goes_on(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf = tmp_path / "leaf.qcow2"
    slow = ("--speed", "64k")
    with nbdkit("file", image, readonly=True) as far:
        with nbdstream_serve(leaf, far.uri, *slow) as server:
            with qemu(tmp_path, Disk.nbd(server.uri)) as vm:
                await qemu_io(vm, "d0", "write -P 0x11 512 512")
                monkeypatch.setattr(QMPClient, "execute", without_reopening)
                with pytest.raises(PivotError, match="told to fail; the guest goes on as before"):
                    await pivot_now(vm, server)
                monkeypatch.undo()
                assert await is_running(vm)
                await qemu_io(vm, "d0", "write -P 0x22 1M 4k")
                (job,) = await ask(str(server.control), "query-block-jobs")
                assert job["status"] == "running" and job["io-status"] == "ok"
                await ask(str(server.control), "block-job-set-speed", device="disk0", speed=0)
                await wait_local(server)
                await pivot_now(vm, server)  # complete by now: an ordinary one
                await qemu_io(vm, "d0", "read -P 0x11 512 512")
                await qemu_io(vm, "d0", "read -P 0x22 1M 4k")


@pytest.mark.parametrize(
    ("suffix", "scheme", "words"),
    [
        ("raw", "", "only nbdstream can tell what a raw leaf lacks"),
        ("qed", "", "QEMU's driver of QED would show the backing's data"),
        ("qcow2", "file", "QEMU cannot read its backing itself"),
    ],
)
async def test_what_qemu_cannot_go_on_with_is_refused(
    tmp_path: Path, image: Path, suffix: str, scheme: str, words: str
) -> None:
    leaf = tmp_path / f"leaf.{suffix}"
    with nbdkit("file", image, readonly=True) as far:
        uri = f"file://{image}" if scheme else far.uri
        with nbdstream_serve(leaf, uri, *PAUSED) as server:
            with qemu(tmp_path, Disk.nbd(server.uri)) as vm:
                with pytest.raises(PivotError, match=words):
                    await pivot_now(vm, server)
                assert await is_running(vm)
                await qemu_io(vm, "d0", "write -P 0x11 0 64k")
