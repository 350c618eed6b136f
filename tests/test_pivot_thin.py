# SPDX-License-Identifier: Apache-2.0
"""Pivots of guests on thin leaves: QEMU opens the leaf and the store's image itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from nbdstream.guest.disks import Disk
from nbdstream.pivot.servers import PivotError
from nbdstream.qmp.client import QMPClient
from testbed.hosts import Host, host_of_random_data, image
from testbed.peers import PeerError, assert_same, run
from tests.pivot_support import (
    SIZE,
    ask,
    disk_of,
    is_running,
    pivot,
    qemu,
    qemu_io,
    without_reopening,
)

THIN = ("--thin", "--stream", "off")
CHANGES = ("write -P 0x11 512 512", "write -P 0x22 1M 4k")

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Host]:
    with host_of_random_data(tmp_path, SIZE) as host:
        yield host


async def pull(place: Host) -> None:
    def work() -> None:
        image("pull", place.uri, "--store", place.store, "--wait")

    await trio.to_thread.run_sync(work)


async def test_qemu_opens_leaf_and_image_and_nothing_of_ours_is_left(
    tmp_path: Path, place: Host
) -> None:
    leaf, expected = place.leaves / "leaf.qcow2", tmp_path / "expected"
    run(["cp", place.source, expected])
    run(["qemu-io", "-f", "raw", *(word for text in CHANGES for word in ("-c", text)), expected])
    with place.guest(leaf.name, *THIN) as server, qemu(tmp_path, Disk.nbd(server.uri)) as vm:
        await qemu_io(vm, "d0", CHANGES[0])
        with pytest.raises(PivotError, match="image below it is not wholly local yet"):
            await pivot(vm, [disk_of(server)])
        await pull(place)  # the image's process goes on, and has the image open
        with trio.fail_after(20):
            while not (  # noqa: ASYNC110
                await ask(str(server.control), "x-nbdstream-stats")
            )["thin"]["complete"]:
                await trio.sleep(0.05)
        assert await pivot(vm, [disk_of(server)]) > 0
        assert await is_running(vm)
        assert server.wait(20) == 0
        place.far.kill()
        place.kill_process()
        files = {node["file"] for node in await ask(vm, "query-named-block-nodes", flat=True)}
        assert place.the_image()["leaf"] in files
        for text in (CHANGES[1], "flush", "read 0 2M"):
            await qemu_io(vm, "d0", text)
        with pytest.raises(PeerError, match=r"needed by 1 user .*leaf\."):
            image("rm", place.uri, "--store", place.store)
        (tmp_path / "elsewhere").mkdir()
        moved = leaf.rename(tmp_path / "elsewhere" / leaf.name)  # QEMU has it, wherever it is
        with pytest.raises(PeerError, match="open in another program"):
            image("rm", place.uri, "--store", place.store)
        moved.rename(leaf)
    assert leaf.stat().st_blocks * 512 < SIZE
    raw = tmp_path / "raw"
    run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", leaf, raw])  # QEMU alone can read it
    assert_same(raw, expected)
    with place.guest(leaf.name, *THIN) as server:  # the far end is away, and not needed
        assert_same(server.uri, expected)


@pytest.mark.parametrize("suffix", ["qed", "raw"])
async def test_a_leaf_that_qemu_cannot_use_over_an_image_is_refused(
    tmp_path: Path, place: Host, suffix: str
) -> None:
    await pull(place)
    with place.guest(f"leaf.{suffix}", *THIN) as server, qemu(tmp_path, Disk.nbd(server.uri)) as vm:
        await qemu_io(vm, "d0", CHANGES[0])
        with pytest.raises(PivotError, match="the leaf is thin, and "):
            await pivot(vm, [disk_of(server)])
        assert await is_running(vm)
        await qemu_io(vm, "d0", CHANGES[0].replace("write", "read"))


async def test_a_pivot_that_fails_is_taken_back(
    tmp_path: Path, place: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pull(place)
    with place.guest("leaf.qcow2", *THIN) as server, qemu(tmp_path, Disk.nbd(server.uri)) as vm:
        await qemu_io(vm, "d0", CHANGES[0])
        monkeypatch.setattr(QMPClient, "execute", without_reopening)
        with pytest.raises(PivotError, match="told to fail; the guest goes on as before"):
            await pivot(vm, [disk_of(server)])
        monkeypatch.undo()
        assert await is_running(vm)
        await qemu_io(vm, "d0", CHANGES[1])
        await qemu_io(vm, "d0", "read 0 2M")
        assert await pivot(vm, [disk_of(server)]) > 0
        for text in CHANGES:
            await qemu_io(vm, "d0", text.replace("write", "read"))


async def test_a_thin_guest_pivots_by_itself_when_the_store_has_it_all(
    tmp_path: Path, place: Host
) -> None:
    option = ("--pivot", str(tmp_path / "vm.qmp"))
    with place.guest("leaf.qcow2", "--thin", *option) as server:
        with qemu(tmp_path, Disk.nbd(server.uri)) as vm:
            assert await trio.to_thread.run_sync(server.wait, 60) == 0
            assert await is_running(vm)
            await qemu_io(vm, "d0", "read 0 2M")


async def test_a_pivoted_leaf_is_served_without_the_store_as_well(
    tmp_path: Path, place: Host
) -> None:
    await pull(place)
    leaf = place.leaves / "leaf.qcow2"
    with place.guest(leaf.name, *THIN) as server, qemu(tmp_path, Disk.nbd(server.uri)) as vm:
        await qemu_io(vm, "d0", CHANGES[1])
        assert await pivot(vm, [disk_of(server)]) > 0
    with place.guest(leaf.name, "--exit-when-complete") as server:  # now it is to be whole
        assert server.wait(60) == 0
    assert place.the_image()["users"] == []
    image("rm", place.uri, "--store", place.store)
    run(["qemu-io", "-f", "qcow2", "-c", "read -P 0x22 1M 4k", leaf])
