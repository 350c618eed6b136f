# SPDX-License-Identifier: Apache-2.0
"""A domain of libvirt moves between two libvirtd, by the script that docs/libvirt.md shows."""

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.testing

from nbdstream.guest.console import Console
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import JSONObject
from nbdstream.tasks import open_background_nursery
from testbed.migrations import arrangement, libvirt
from testbed.migrations.arrangement import (
    SMALL,
    Ends,
    last_acknowledged,
    records,
    wait_acknowledged,
)
from testbed.migrations.heartbeat import LOOP, Heartbeat
from testbed.migrations.libvirt import DOMAIN, Host, domain_xml, host
from testbed.peers import Peer, nbdkit, nbdstream_serve, run, temporary_directory

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(libvirt.missing()), reason=libvirt.missing()),
]

PAGE = Path(__file__).parent.parent / "docs/libvirt.md"
FULL_SPEED = ("--bandwidth", "1000")
MOVE_TIMEOUT = 180.0


@dataclass(frozen=True)
class Site:
    """Two hosts, the source's nbdstream, and the sockets and files of both ends."""

    here: Host
    there: Host
    ends: Ends
    server: Peer

    async def move(self, *options: str) -> "subprocess.CompletedProcess[bytes]":
        """Run the documented script; what it says is shown if the test fails."""
        ends = self.ends
        script = ends.path("migrate-domain")
        write(script, documented_script())
        settings = {
            "FROM": self.here.uri,
            "TO": self.there.uri,
            "SOURCE": str(self.server.control),
            "OFFER": f"unix:{ends.path('offer')}",
            "LEAF": ends.path("there.qcow2"),
            "SOCKET": ends.path("there.nbd"),
            "CONTROL": ends.path("there.control"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        with trio.fail_after(MOVE_TIMEOUT):
            done = await trio.run_process(
                ["bash", script, DOMAIN, xml_file("there", ends), *options],
                cwd=ends.directory,
                env=os.environ | settings,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        print(done.stdout.decode(), done.stderr.decode())
        return done

    async def ask_source(self, command: str) -> JSONObject:
        async with QMPClient.connect(str(self.server.control)) as qmp:
            answer: JSONObject = await qmp.execute(command)
            return answer


def write(path: str, text: str) -> None:
    Path(path).write_text(text)


def exists(path: str) -> bool:
    return Path(path).exists()


def remove(path: str) -> None:
    Path(path).unlink()


def xml_file(end: str, ends: Ends) -> str:
    """The path of the domain's XML as it is at one end."""
    path = ends.path(f"{end}.xml")
    write(path, domain_xml(end, ends.directory, ends.system))
    return path


def documented_script() -> str:
    (script,) = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    return str(script)


@pytest.fixture
def site(busybox_image: Path, busybox_disk: Path) -> Iterator[Site]:
    """The source's leaf is itself still remote: nothing is streamed there."""
    with ExitStack() as stack:
        directory = stack.enter_context(temporary_directory())
        remote = stack.enter_context(nbdkit("file", busybox_disk, readonly=True))
        server = stack.enter_context(
            nbdstream_serve(
                directory / "here.qcow2",
                remote.uri,
                "--stream",
                "off",
                socket_path=directory / "here.nbd",
            )
        )
        ends = Ends(directory, busybox_image, SMALL)
        stack.enter_context(ended(ends.path("there.control")))
        here = stack.enter_context(host("here", directory / "h"))
        there = stack.enter_context(host("there", directory / "t"))
        yield Site(here, there, ends, server)


@contextmanager
def ended(control: str) -> Iterator[None]:
    """Afterwards, end the nbdstream at *control* if there still is one."""
    try:
        yield
    finally:
        if Path(control).is_socket():
            trio.run(arrangement.end_server, control)


@asynccontextmanager
async def running_domain(site: Site) -> AsyncIterator[Console]:
    """The domain boots at the source, and its writer and its heartbeat begin."""
    await libvirt.ready(site.here, site.there)
    async with libvirt.running_domain(site.here, site.ends, xml_file("here", site.ends)) as console:
        yield console


async def end_source(site: Site) -> None:
    """End the source's server. Where the domain is still defined, both are started once more: the
    server holds what the domain writes, so the disk does not change."""
    await arrangement.end_server(str(site.server.control))
    if not await site.here.state():
        return
    leaf, socket = (Path(site.ends.path(name)) for name in ("here.qcow2", "here.nbd"))
    with nbdstream_serve(leaf, socket_path=socket) as server:
        await site.here.virsh("start", DOMAIN)
        async with QMPClient.connect(str(server.control)) as qmp:
            report = await qmp.execute("x-nbdstream-stats")
        assert not report["owner"] and "sealed" in report["frozen"]
        await site.here.virsh("destroy", DOMAIN)


async def finish(site: Site, seen: int) -> None:
    """The source is gone for good, the guest writes on, and all that it acknowledged is in
    the destination's leaf."""
    ends = site.ends
    await end_source(site)
    remove(ends.path("here.qcow2"))
    await wait_acknowledged(ends, last_acknowledged(said(ends)) + 3)
    await site.there.virsh("destroy", DOMAIN)
    last = last_acknowledged(said(ends))
    await arrangement.end_server(ends.path("there.control"))
    raw = ends.directory / "look.raw"
    run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", ends.path("there.qcow2"), raw])
    assert records(raw) >= last > seen


def said(ends: Ends) -> str:
    """What the guest has printed at the destination."""
    return Path(ends.path("there.console")).read_text(errors="replace")


@pytest.mark.parametrize(
    "way", [(), ("--p2p", "--persistent", "--undefinesource")], ids=["client", "p2p"]
)
async def test_a_domain_moves(site: Site, way: tuple[str, ...]) -> None:
    """Where its definition stays behind, it cannot be used any more."""
    heartbeat, ends = Heartbeat(), site.ends
    async with open_background_nursery() as nursery, running_domain(site) as console:
        # Its first beat must not be missed.
        nursery.start_soon(
            heartbeat.listen, ends.path("here.heartbeat"), ends.path("there.heartbeat")
        )
        await trio.testing.wait_all_tasks_blocked()
        await console.send(f"{LOOP}\n")
        with trio.fail_after(60):
            await heartbeat.wait_here(50)
        done = await site.move("--migrateuri", "tcp://127.0.0.1:49300", *FULL_SPEED, *way)
        assert done.returncode == 0
        seen = last_acknowledged(console.transcript)
        with trio.fail_after(60):
            await heartbeat.wait_there()
        print(heartbeat.pause(), await site.there.virsh("domjobinfo", "--completed", DOMAIN))
        assert await site.there.state() == "running"
        if way:
            assert await site.here.state() == ""
            assert DOMAIN in await site.there.virsh("list", "--name", "--persistent")
        else:
            assert await site.here.state() == "shut off"
        source = await site.ask_source("x-nbdstream-stats")
        assert not source["owner"] and "sealed" in source["frozen"]
        await finish(site, seen)


async def test_a_destination_that_dies_leaves_the_domain_where_it_is(site: Site) -> None:
    """Then another destination comes up, and it moves after all."""
    ends = site.ends
    async with running_domain(site) as console, open_background_nursery() as nursery:
        nursery.start_soon(crash_under_way, site)
        # So slow that it would take minutes.
        done = await site.move("--migrateuri", "tcp://127.0.0.1:49301", "--bandwidth", "1")
        assert done.returncode == 1
        assert b"goes on at the source" in done.stderr
        assert await site.here.state() == "running"
        seen = last_acknowledged(console.transcript)
        await console.wait_for(f"ACK {seen + 3}\\b", 60)
        assert await site.ask_source("x-nbdstream-export-query") == {}
        assert (await site.ask_source("x-nbdstream-stats"))["owner"]
        assert not exists(ends.path("there.qcow2"))

        with host("there", ends.directory / "t2") as there:
            await libvirt.ready(there)
            again = Site(site.here, there, ends, site.server)
            done = await again.move("--migrateuri", "tcp://127.0.0.1:49302", *FULL_SPEED)
            assert done.returncode == 0
            seen = last_acknowledged(console.transcript)
            await finish(again, seen)


async def crash_under_way(site: Site) -> None:
    """End the destination's host once some of the guest's memory is there."""
    while True:
        info = await site.here.virsh("domjobinfo", DOMAIN)
        if re.search(r"Memory processed: +[1-9]", info):
            site.there.crash()
            return
        await trio.sleep(0.1)
