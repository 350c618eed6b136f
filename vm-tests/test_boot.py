# SPDX-License-Identifier: Apache-2.0
"""The main job: a guest boots at once from a slow remote image, and ends up local."""

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from nbdstream.guest.disks import Disk
from nbdstream.qmp.client import QMPClient
from testbed.demo.show import Result, Show
from testbed.demo.ways import (
    Task,
    copy_then_boot,
    slow_remote,
    stream_with_nbdstream,
    stream_with_qemu,
)
from testbed.guests.systems import BUSYBOX, boot, check_filesystem
from testbed.link.control import LinkProcess
from testbed.link.model import Shape
from testbed.peers import assert_same, nbdstream_serve

LINK = Shape(rate=200e6, delay=0.010)
CHECK = "cd /data && sha256sum -c SHA256SUMS"
WORK = f"{CHECK} && echo kept > /root/note && sync"


@pytest.fixture
def remote(busybox_image: Path) -> Iterator[LinkProcess]:
    with slow_remote(busybox_image / "disk.raw", LINK) as link:
        yield link


def data_size(image: Path) -> int:
    """Bytes of the guest image that are data."""
    return (image / "disk.raw").stat().st_blocks * 512


@pytest.mark.parametrize("leaf_format", ["raw", "qcow2", "qed"])
async def test_a_guest_boots_at_once_and_again_when_the_remote_is_gone(
    leaf_format: str, busybox_image: Path, tmp_path: Path
) -> None:
    with slow_remote(busybox_image / "disk.raw", LINK) as link:
        task = Task(BUSYBOX, WORK, "verified its files", link, Show())
        leaf = tmp_path / f"leaf.{leaf_format}"
        result = await stream_with_nbdstream(task, leaf, until="local")
        assert result.moved < 1.1 * data_size(busybox_image), "data comes once, holes never"
    with nbdstream_serve(leaf) as server:
        async with boot(BUSYBOX, Disk.nbd(server.uri)) as guest:
            await guest.run(CHECK)
            assert await guest.run("cat /root/note") == "kept\n"
            await guest.power_off()
    check_filesystem(leaf, leaf_format)


async def test_a_guest_boots_by_demand_alone_and_the_rest_streams_later(
    remote: LinkProcess, busybox_image: Path, tmp_path: Path
) -> None:
    """The guest only reads: in the end the leaf must be the remote's equal."""
    leaf = tmp_path / "leaf.raw"
    with nbdstream_serve(leaf, remote.uri(), "--stream", "off") as server:
        disk = Disk({**Disk.nbd(server.uri).blockdev, "read-only": True})
        assert server.control is not None
        async with QMPClient.connect(server.control) as control:
            async with boot(BUSYBOX, disk) as guest:
                await guest.run("sha256sum /data/003.bin")
            stats = await control.execute("x-nbdstream-stats")
            assert stats["disk"]["demand-misses"] > 0
            assert 0 < remote.stats()["down"]["bytes"] < data_size(busybox_image) // 2
            (block,) = await control.execute("query-block")
            await control.execute("block-stream", {"device": block["device"]})
            await control.wait_event("BLOCK_JOB_COMPLETED")
    assert remote.stats()["down"]["bytes"] < 1.1 * data_size(busybox_image), "nothing came twice"
    assert_same(leaf, busybox_image / "disk.raw")


async def patient_qemu(task: Task, directory: Path) -> Result:
    return await stream_with_qemu(task, directory, patience=300)


@pytest.mark.parametrize("way", [copy_then_boot, patient_qemu], ids=lambda way: way.__name__)
async def test_the_peers_do_the_same_job(
    way: Callable[[Task, Path], Awaitable[Result]], remote: LinkProcess, tmp_path: Path
) -> None:
    result = await way(Task(BUSYBOX, WORK, "verified its files", remote, Show()), tmp_path)
    assert result.login > 0 and result.local and result.ended
