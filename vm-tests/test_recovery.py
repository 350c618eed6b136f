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

from nbdstream.qmp.client import QMPClient
from testbed.backups import PLUGIN, back_up, file_xml, network_xml, running_domain
from testbed.migrations import arrangement, libvirt
from testbed.migrations.arrangement import SMALL, WRITER, last_acknowledged, records
from testbed.migrations.libvirt import Host, host
from testbed.peers import run, temporary_directory

pytestmark = pytest.mark.timeout(400)

PAGE = Path(__file__).parent.parent / "docs/recovery.md"


@pytest.fixture
def here() -> Iterator[Host]:
    with temporary_directory() as directory, host("here", directory / "h") as one:
        yield one


@asynccontextmanager
async def recovered(directory: Path, backup: Path) -> AsyncIterator[str]:
    """The page's script serves the disk from its backup; yields the control socket."""
    (script,) = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    control = str(directory / "vm.control")
    environment = os.environ | {
        "PLUGIN": str(PLUGIN),
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
    async with running_domain(here, file_xml(directory, SMALL, disk), directory, SMALL) as console:
        await console.send(f"{WRITER}\n")
        await console.wait_for("ACK 3\\b", 60)
        await back_up(here, "full", backup)
        await console.wait_for(f"ACK {last_acknowledged(console.transcript) + 3}\\b", 60)
        seen = last_acknowledged(console.transcript)
        await back_up(here, "inc", backup)
    disk.unlink()

    async with recovered(directory, backup) as control, QMPClient.connect(control) as qmp:
        xml = network_xml(directory, SMALL)
        async with running_domain(here, xml, directory, SMALL) as console:
            with trio.fail_after(120):
                while await qmp.execute("query-block-jobs"):
                    await qmp.wait_event("BLOCK_JOB_COMPLETED")
            shutil.rmtree(backup)
            await console.send("echo still here | md5sum; sync\n")
            await console.wait_for(r"-\r?\n", 60)
    raw = directory / "look.raw"
    run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", directory / "new.qcow2", raw])
    assert records(raw) >= seen
