# SPDX-License-Identifier: Apache-2.0
"""A guest that 'boot --print-xml' describes, with the real libvirtd; and a disk that is plugged in
and out while it runs."""

import hashlib
import os
import re
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from nbdstream.guest.console import Console
from nbdstream.tasks import open_background_nursery
from testbed.guests.systems import BOOT_TIMEOUT, BUSYBOX
from testbed.migrations import libvirt
from testbed.migrations.libvirt import Host, host
from testbed.peers import binary, nbdkit, nbdstream_serve, run, temporary_directory

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.skipif(bool(libvirt.missing()), reason=libvirt.missing()),
]

PAGE = Path(__file__).parent.parent / "docs/libvirt.md"
MIB = 1 << 20
WAITS = ("--stream", "paused", "--exit-when-complete")


@asynccontextmanager
async def console_of(at: Host, domain: str) -> AsyncIterator[Console]:
    """The console of a domain that was started paused, which goes on then."""
    terminal = await at.virsh("ttyconsole", domain)
    stream = trio.lowlevel.FdStream(os.open(terminal, os.O_RDWR | os.O_NOCTTY))
    async with stream, open_background_nursery() as nursery:
        console = Console(stream)
        nursery.start_soon(console.pump)
        await at.virsh("resume", domain)
        await console.wait_for(BUSYBOX.login, BOOT_TIMEOUT)
        await console.wait_for(BUSYBOX.prompt, BOOT_TIMEOUT)
        yield console


def plugged(socket: Path) -> str:
    """The documented element for a disk, as a second one."""
    found = re.search(r"^```xml\n(<disk .*?)^```", PAGE.read_text(), re.S | re.M)
    assert found is not None
    return found[1].replace("/run/vm/vm.nbd", str(socket)).replace("vda", "vdb")


async def test_a_printed_domain_boots_and_takes_another_disk(
    busybox_disk: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.raw"
    data.write_bytes(os.urandom(8 * MIB))
    with (
        temporary_directory() as directory,
        nbdkit("file", busybox_disk, readonly=True) as far,
        nbdkit("file", data, readonly=True) as far_data,
        host("here", directory / "h") as here,
    ):
        await libvirt.ready(here)
        boot = [binary("NBDSTREAM"), "boot", "--print-xml", "-m", "128M"]
        described = await trio.run_process(
            [*boot, "--leaf", str(directory / "vm.qcow2"), far.uri],
            capture_stdout=True,
            capture_stderr=True,
        )
        xml = directory / "vm.xml"
        xml.write_bytes(described.stdout)
        _, _, leaf, *options = shlex.split(described.stderr.decode().partition("disk: ")[2])
        socket = Path(options[options.index("-U") + 1])
        backing = options[options.index("-b") + 1]
        second = directory / "data.nbd"
        disk = directory / "disk.xml"
        disk.write_text(plugged(second))
        with (
            nbdstream_serve(Path(leaf), backing, socket_path=socket),
            nbdstream_serve(
                directory / "data.qcow2", far_data.uri, *WAITS, socket_path=second
            ) as server,
        ):
            await here.virsh("define", str(xml))
            await here.virsh("start", "--paused", "vm")
            async with console_of(here, "vm") as console:
                await here.virsh("attach-device", "vm", str(disk), "--live")
                assert "vdb" in await here.virsh("domblklist", "vm")
                wait = "until [ -b /dev/vdb ]; do sleep 0.1; done; md5sum </dev/vdb"
                digest = hashlib.md5(data.read_bytes(), usedforsecurity=False).hexdigest()
                assert digest in await console.run(wait, 60)
                await here.virsh("detach-device", "vm", str(disk), "--live")
                await console.run("while [ -b /dev/vdb ]; do sleep 0.1; done", 60)
                run(["nbdstream", "resume", str(server.control)])
                assert await trio.to_thread.run_sync(server.wait, 20) == 0  # it has no client
                assert "vdb" not in await here.virsh("dumpxml", "vm")
                await here.virsh("destroy", "vm")
