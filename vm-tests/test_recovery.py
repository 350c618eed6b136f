# SPDX-License-Identifier: Apache-2.0
"""A domain of libvirt is lost, and starts again from its backup, by docs/recovery.md's script."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from nbdstream.guest.console import Console
from nbdstream.qmp.client import QMPClient
from nbdstream.tasks import open_background_nursery
from testbed.guests import systems
from testbed.migrations import arrangement, libvirt
from testbed.migrations.arrangement import SMALL, WRITER, last_acknowledged, records
from testbed.migrations.libvirt import DOMAIN, Host, domain_xml, host
from testbed.peers import run, temporary_directory

pytestmark = pytest.mark.timeout(400)

TOP = Path(__file__).parent.parent
NETWORK_DISK = re.compile(r"<disk type='network'.*?</source>", re.S)


@pytest.fixture
def here() -> Iterator[Host]:
    with temporary_directory() as directory, host("here", directory / "h") as one:
        yield one


def file_xml(directory: Path, disk: Path) -> str:
    """The domain, with a file as its disk."""
    driver = "<driver name='qemu' type='qcow2'/>"
    element = f"<disk type='file' device='disk'>{driver}<source file='{disk}'/>"
    return NETWORK_DISK.sub(element, domain_xml("vm", directory, SMALL))


@asynccontextmanager
async def running(here: Host, xml: str, directory: Path) -> AsyncIterator[Console]:
    """The domain boots up to its prompt; it is destroyed with the block."""
    file = directory / "vm.xml"
    file.write_text(xml)
    await here.virsh("define", str(file))
    await here.virsh("start", "--paused", DOMAIN)
    stream = await trio.open_unix_socket(str(directory / "vm.serial"))
    async with stream, open_background_nursery() as nursery:
        console = Console(stream)
        nursery.start_soon(console.pump)
        await here.virsh("resume", DOMAIN)
        await console.wait_for(SMALL.login, systems.BOOT_TIMEOUT)
        await console.wait_for(SMALL.prompt, systems.BOOT_TIMEOUT)
        yield console
        await here.virsh("destroy", DOMAIN)


async def back_up(here: Host, level: str, directory: Path) -> None:
    # virtnbdbackup takes a URI with a transport in it for another host's.
    uri = here.uri.replace("qemu+unix:", "qemu:")
    command = ["virtnbdbackup", "-U", uri, "-d", DOMAIN, "-l", level, "-o", str(directory)]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


@asynccontextmanager
async def recovered(directory: Path, backup: Path) -> AsyncIterator[str]:
    """The page's script serves the disk from its backup; yields the control socket."""
    (script,) = re.findall(
        r"^```bash\n(.*?)^```", (TOP / "docs/recovery.md").read_text(), re.S | re.M
    )
    control = str(directory / "vm.control")
    environment = os.environ | {
        "PLUGIN": str(TOP / "plugins/virtnbdbackup_plugin.py"),
        "BACKUP": str(backup),
        "DISK": str(directory / "new.qcow2"),
        "SOCKET": str(directory / "vm.nbd"),
        "CONTROL": control,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    process = await trio.lowlevel.open_process(
        ["bash", "-c", script], env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        with trio.fail_after(30):
            assert (await process.stdout.receive_some()).startswith(b"nbd+unix://")
        yield control
        await arrangement.end_server(control)
        assert await process.wait() == 0
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def test_a_domain_continues_from_its_backup(here: Host, busybox_disk: Path) -> None:
    directory = here.directory.parent
    disk, backup = directory / "vm.qcow2", directory / "backup"
    run(["qemu-img", "convert", "-O", "qcow2", busybox_disk, disk])
    await libvirt.ready(here)
    async with running(here, file_xml(directory, disk), directory) as console:
        await console.send(f"{WRITER}\n")
        await console.wait_for("ACK 3\\b", 60)
        await back_up(here, "full", backup)
        await console.wait_for(f"ACK {last_acknowledged(console.transcript) + 3}\\b", 60)
        seen = last_acknowledged(console.transcript)
        await back_up(here, "inc", backup)
    disk.unlink()

    async with recovered(directory, backup) as control, QMPClient.connect(control) as qmp:
        xml = domain_xml("vm", directory, SMALL)
        async with running(here, xml, directory) as console:
            with trio.fail_after(120):
                while await qmp.execute("query-block-jobs"):
                    await qmp.wait_event("BLOCK_JOB_COMPLETED")
            shutil.rmtree(backup)
            await console.send("echo still here | md5sum; sync\n")
            await console.wait_for(r"-\r?\n", 60)
    raw = directory / "look.raw"
    run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", directory / "new.qcow2", raw])
    assert records(raw) >= seen
