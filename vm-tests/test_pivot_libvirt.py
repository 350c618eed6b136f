# SPDX-License-Identifier: Apache-2.0
"""A domain of libvirt goes on from its leaf, by the script that docs/pivot.md shows."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import trio

from nbdstream.qmp.client import QMPClient
from testbed.migrations import libvirt
from testbed.migrations.afterwards import as_raw
from testbed.migrations.arrangement import SMALL, Ends, last_acknowledged, records
from testbed.migrations.libvirt import DOMAIN, Host, domain_xml, host
from testbed.peers import nbdkit, nbdstream_serve, temporary_directory

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(libvirt.missing()), reason=libvirt.missing()),
]

PAGE = Path(__file__).parent.parent / "docs/pivot.md"


def write(path: str, text: str) -> str:
    Path(path).write_text(text)
    return path


def failing_virsh(ends: Ends, command: str) -> Path:
    """A directory for PATH. Its virsh fails at a command; "": there is none."""
    directory = Path(ends.path("bin"))
    directory.mkdir(exist_ok=True)
    program = directory / "virsh"
    program.unlink(missing_ok=True)
    if command:
        refuse = f'case " $* " in *" {command} "*) exit 1;; esac; exec {shutil.which("virsh")} "$@"'
        write(str(program), f"#!/bin/sh\n{refuse}\n")
        program.chmod(0o755)
    return directory


async def pivot_domain(at: Host, ends: Ends, control: str, fails: str = "") -> tuple[int, str]:
    """Run the documented script; its status, and what it says. ``fails``: a command of virsh that
    does not succeed. Its commands are shown with their times: one that hangs is the last."""
    (script,) = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    program = write(ends.path("pivot-domain"), script)
    first = failing_virsh(ends, fails)
    settings = {
        "VIRSH_DEFAULT_CONNECT_URI": at.uri,
        "PATH": f"{first}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PS4": r"+ \t ",
    }
    said = ends.path("said")
    command = ["bash", "-c", 'exec bash -x "$@" >"$0" 2>&1', said, program, DOMAIN, "vda", control]
    try:
        with trio.fail_after(120):
            done = await trio.run_process(command, env=os.environ | settings, check=False)
    finally:
        words = await trio.Path(said).read_text()
        print(words)
    return done.returncode, words


@pytest.mark.parametrize("suffix", ["qcow2", "qed", "raw"])
async def test_a_domain_goes_on_from_its_leaf(busybox_image: Path, suffix: str) -> None:
    """Refused while the leaf is not complete, and undone where libvirt fails. Then libvirt names
    the file, makes a snapshot, and starts the domain again from it. Nothing that the guest was told
    is durable is lost."""
    with temporary_directory() as directory:
        ends, leaf = Ends(directory, busybox_image, SMALL), directory / f"leaf.{suffix}"
        with nbdkit("file", busybox_image / "disk.raw", readonly=True) as far:
            with (
                nbdstream_serve(
                    leaf, far.uri, "--stream", "paused", socket_path=directory / "here.nbd"
                ) as server,
                host("here", directory / "h") as here,
            ):
                await libvirt.ready(here)
                xml = write(ends.path("here.xml"), domain_xml("here", directory, SMALL))
                async with libvirt.running_domain(here, ends, xml) as console:
                    control = str(server.control)
                    status, words = await pivot_domain(here, ends, control)
                    assert status == 1 and "not complete" in words
                    assert await here.state() == "running"
                    async with QMPClient.connect(control) as qmp:
                        await qmp.execute("job-resume", {"id": "disk0"})
                        with trio.fail_after(120):
                            await qmp.wait_event("BLOCK_JOB_COMPLETED")
                    step = "blockcopy" if suffix == "raw" else "snapshot-create-as"
                    status, words = await pivot_domain(here, ends, control, fails=step)
                    assert status == 1 and "the domain goes on as before" in words
                    seen = last_acknowledged(console.transcript)
                    await console.wait_for(rf"ACK {seen + 3}\b", 60)
                    assert "nbd" in await here.virsh("dumpxml", DOMAIN, "--xpath", "//source")
                    status, _ = await pivot_domain(here, ends, control)
                    assert status == 0 and server.process.wait(20) == 0
                    for kind in ((), ("--inactive",)):
                        shown = await here.virsh("dumpxml", DOMAIN, *kind, "--xpath", "//disk")
                        assert str(leaf) in shown and "nbd" not in shown.replace("nbds-", "")
                    assert (await here.virsh("domblklist", DOMAIN)).split() == ["vda", str(leaf)]
                    seen = last_acknowledged(console.transcript)
                    await console.wait_for(rf"ACK {seen + 3}\b", 60)
                    await here.virsh("destroy", DOMAIN)
                    last = last_acknowledged(console.transcript)
                assert records(as_raw(leaf, suffix)) >= last
                await here.virsh("start", DOMAIN)
                overlay = f"vda,file={directory}/overlay.qcow2"
                options = ("--disk-only", "--no-metadata", "--diskspec", overlay)
                await here.virsh("snapshot-create-as", DOMAIN, *options)
                assert await here.state() == "running"
