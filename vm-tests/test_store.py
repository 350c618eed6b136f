# SPDX-License-Identifier: Apache-2.0
"""Guests of one image on one host, by way of the image store."""

from contextlib import ExitStack
from pathlib import Path

import trio

from nbdstream.backing.identity import sample_ranges
from nbdstream.guest.disks import Disk
from testbed.guests.systems import BUSYBOX, boot
from testbed.hosts import image, store_host
from testbed.link.model import Shape
from testbed.peers import assert_same

LINK = Shape(rate=200e6, delay=0.010)
CHECK = "cd /data && sha256sum -c SHA256SUMS"
GUESTS = 2


async def test_guests_share_an_image_and_outlive_its_process(
    busybox_image: Path, tmp_path: Path
) -> None:
    source = busybox_image / "disk.raw"
    with store_host(source, tmp_path, shape=LINK) as place, ExitStack() as stack:
        servers = [
            stack.enter_context(place.guest(f"leaf{number}.qcow2", "--stream", "off"))
            for number in range(GUESTS)
        ]

        async def use(uri: str) -> None:
            async with boot(BUSYBOX, Disk.nbd(uri)) as guest:
                await guest.run("sha256sum /data/003.bin")
                booted.append(uri)
                await killed.wait()
                await guest.run(CHECK)
                await guest.power_off()

        booted: list[str] = []
        killed = trio.Event()
        async with trio.open_nursery() as nursery:
            for server in servers:
                nursery.start_soon(use, server.uri)
            while len(booted) < GUESTS:  # noqa: ASYNC110 - the guests' pace
                await trio.sleep(0.1)
            samples = set(sample_ranges(source.stat().st_size))
            reads = [read for read in place.fetched() if read not in samples]
            assert len(set(reads)) == len(reads), "a cluster was fetched twice"
            await trio.to_thread.run_sync(place.kill_process)
            killed.set()
        await trio.to_thread.run_sync(
            lambda: image("pull", place.uri, "--store", place.store, "--wait")
        )
        assert_same(place.the_image()["leaf"], source)
