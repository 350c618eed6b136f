# SPDX-License-Identifier: Apache-2.0
"""The process of an image, from inside: classes of reads, promotion, a full disk, its end."""

import errno
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from nbdstream.backing.base import Priority
from nbdstream.errors import StoreError
from nbdstream.export import Export
from nbdstream.leaf.base import BackingReference
from nbdstream.net.address import UnixAddress
from nbdstream.net.connect import open_socket
from nbdstream.qmp.client import QMPClient
from nbdstream.service import ServeOptions, open_stream
from nbdstream.store.exports import export_name, image_exports
from nbdstream.store.layout import Image, Store
from nbdstream.store.process import IDLE_TIME, serve_image
from nbdstream.store.register import join
from nbdstream.store.resolve import resolve
from nbdstream.store.upkeep import make_room
from nbdstream.streamer.room import RESERVE, Space
from testbed.hosts import client, store_host
from testbed.peers import Peer, Qmp, make_image, nbdkit, temporary_directory

MIB = 1 << 20
SIZE = 8 * MIB

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    make_image(path, SIZE, sparse=False)
    return path


@pytest.fixture
def content(source: Path) -> bytes:
    return source.read_bytes()


@pytest.fixture
def far(source: Path) -> Iterator[Peer]:
    with nbdkit("file", source, readonly=True) as peer:
        yield peer


@pytest.fixture
def store() -> Iterator[Store]:
    with temporary_directory() as directory:
        yield Store(directory / "s")


@asynccontextmanager
async def exports(store: Store, far: Peer) -> AsyncIterator[dict[str, Export]]:
    """The exports of the far end's image, by class."""
    image = await resolve(store, far.uri)
    options = ServeOptions(
        str(image.leaf), backing=far.uri, format="raw", stream="off", shared=True
    )
    async with open_stream(options) as opened:
        found = image_exports(
            opened.disk, image.record.identity, Space(lambda: opened.disk.leaf.fd)
        )
        yield dict(zip(["demand", "readahead", "prefetch", "stream"], found, strict=True))


async def read(export: Export, offset: int, length: int) -> bytes:
    data = bytearray(length)
    await export.read(memoryview(data), offset)
    return bytes(data)


async def test_each_class_has_its_export(store: Store, far: Peer, content: bytes) -> None:
    async with exports(store, far) as found:
        for number, (name, export) in enumerate(found.items()):
            priority = Priority[name.upper()]
            assert export.name.endswith(export_name("", priority))
            offset = number * MIB
            assert await read(export, offset, 4096) == content[offset : offset + 4096]


async def test_a_full_disk_stops_background_reads_and_no_guest(
    store: Store, far: Peer, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with exports(store, far) as found:
        assert await read(found["stream"], 0, 4096) == content[:4096]
        full = SimpleNamespace(f_bavail=RESERVE // 4096 - 1, f_frsize=4096, f_blocks=1 << 40)
        monkeypatch.setattr(os, "fstatvfs", lambda _fd: full)
        monkeypatch.setattr("nbdstream.streamer.room.LOOK_INTERVAL", 0.0)
        space: Any = found["stream"]
        space._space._look_at = 0.0
        for name in ("stream", "prefetch", "readahead"):
            with pytest.raises(OSError, match="kept for guests") as caught:
                await read(found[name], 4 * MIB, 4096)
            assert caught.value.errno == errno.ENOSPC
            assert await read(found[name], 0, 4096) == content[:4096]  # what is local is there
        assert await read(found["demand"], 4 * MIB, 4096) == content[4 * MIB :][:4096]
        monkeypatch.undo()
        space._space._look_at = 0.0
        assert await read(found["stream"], 5 * MIB, 4096) == content[5 * MIB :][:4096]


@pytest.mark.parametrize("tight", [False, True])
async def test_the_process_reads_ahead_for_all_guests_while_there_is_space(
    store: Store, far: Peer, monkeypatch: pytest.MonkeyPatch, tight: bool
) -> None:
    async with exports(store, far) as found:
        demand: Any = found["demand"]
        monkeypatch.setattr(Space, "tight", tight)
        for offset in range(0, MIB, 128 << 10):
            await demand.cache(offset, 128 << 10)
        assert (demand._streamed.statistics()["readahead_bytes"] > 0) is not tight


async def connected(image: Image) -> None:
    sock = await open_socket(UnixAddress(str(image.socket)))
    sock.close()


@asynccontextmanager
async def serving(
    image: Image, uri: str, idle_time: float = IDLE_TIME
) -> AsyncIterator[trio.Event]:
    """The image's process, in this one; it is told to end by the event."""
    ready, stop = trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await serve_image(image, uri, idle_time=idle_time, ready=ready.set, stop=stop)

        nursery.start_soon(serve)
        await ready.wait()
        yield stop


async def test_the_process_ends_when_it_is_unused(store: Store, far: Peer) -> None:
    image = await resolve(store, far.uri)
    async with serving(image, far.uri, idle_time=0.05):
        await connected(image)
    assert not image.served
    assert not image.socket.exists()


async def test_a_second_process_is_refused(
    store: Store, far: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdstream.store.process.PREDECESSOR_TIME", 0.0)
    image = await resolve(store, far.uri)
    async with serving(image, far.uri) as stop:
        with pytest.raises(StoreError, match="another process holds this lock"):
            await serve_image(image, far.uri, ready=lambda: None, stop=stop)
        await connected(image)
        stop.set()


async def test_pulling_pauses_while_there_is_little_space(
    store: Store, far: Peer, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdstream.streamer.room.LOOK_INTERVAL", 0.0)
    full = SimpleNamespace(f_bavail=0, f_frsize=4096, f_blocks=1 << 40)
    roomy = os.fstatvfs
    monkeypatch.setattr(os, "fstatvfs", lambda _fd: full)
    image = await resolve(store, far.uri)
    async with serving(image, far.uri) as stop:
        async with QMPClient.connect(str(image.control)) as qmp:
            await qmp.execute("block-stream", {"device": image.id, "speed": 1 << 20})
            await qmp.wait_event("JOB_STATUS_CHANGE", data={"status": "paused"})
            monkeypatch.setattr(os, "fstatvfs", roomy)
            await qmp.execute("block-job-set-speed", {"device": image.id, "speed": 0})
            await qmp.wait_event("BLOCK_JOB_COMPLETED")
        stop.set()
    assert image.complete


async def test_unused_images_make_room_the_longest_unused_first(
    store: Store,
    far: Peer,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own, old, newer, newest, used, pulled = [
        store.create(BackingReference(far.uri, "raw", SIZE, f"s1:{number:064x}"))
        for number in range(6)
    ]
    for age, image in enumerate((used, pulled, own, old, newer, newest)):
        image.use()
        os.utime(image.directory / "used", (0, 1000 + age))
    user = join(used, str(source.with_name("leaf.raw")), temporary=False)
    pulled.pull.touch()
    images_that_fit = 5

    def free_space(_fd: int) -> SimpleNamespace:
        roomy = len(store.images()) < images_that_fit
        return SimpleNamespace(
            f_bavail=2 * RESERVE // 4096 - (not roomy), f_frsize=4096, f_blocks=1 << 40
        )

    monkeypatch.setattr(os, "fstatvfs", free_space)
    await make_room(store, Space(lambda: 0), own)
    left = {image.id for image in store.images()}
    assert left == {image.id for image in (own, newest, used, pulled)}
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" (")[0] for line in lines] == [
        f"removed image {image.id}" for image in (old, newer)
    ]
    images_that_fit = 0  # what is left stays, whatever the need
    await make_room(store, Space(lambda: 0), own)
    assert {image.id for image in store.images()} == left - {newest.id}
    user.leave()


async def test_a_leafs_own_stream_leaves_room_for_guests(
    far: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdstream.streamer.room.LOOK_INTERVAL", 0.01)
    roomy = os.fstatvfs
    full = SimpleNamespace(f_bavail=RESERVE // 4096 - 1, f_frsize=4096, f_blocks=1 << 40)
    monkeypatch.setattr(os, "fstatvfs", lambda _fd: full)
    options = ServeOptions(str(tmp_path / "leaf.qcow2"), backing=far.uri, speed=1 << 16)
    async with open_stream(options) as opened:
        job = opened.job
        assert job is not None
        while job.running:  # noqa: ASYNC110
            await trio.sleep(0.01)
        assert (job.io_status, opened.disk.backing is None) == ("nospace", False)
        assert "kept for guests' writes" in job.error
        job.set_speed(0)
        monkeypatch.setattr(os, "fstatvfs", roomy)
        await job.completed.wait()


def test_a_guest_that_waits_for_a_streamed_range_is_demand_at_the_far_end(
    source: Path, tmp_path: Path
) -> None:
    with store_host(source, tmp_path, "--filter=delay", "rdelay=1", threads=16) as place:
        with place.guest("leaf.qcow2", "--stream", "off") as server:
            assert server.control

            def stream() -> None:
                with Qmp(server.control or Path()) as qmp:
                    qmp.execute("x-nbdstream-stream", device="disk0", offset=4 * MIB)

            before = len(place.fetched())
            thread = threading.Thread(target=stream)
            thread.start()
            place.wait_for_read(4 * MIB, before)
            with client(server.uri) as handle:
                assert handle.pread(4096, 4 * MIB) == source.read_bytes()[4 * MIB :][:4096]
            thread.join()
            with Qmp(Path(place.the_image()["control"])) as qmp:
                requests = qmp.execute("x-nbdstream-stats")["backing"]["requests"]
            assert requests["demand"] > 0
            assert requests["stream"] == 0
