# SPDX-License-Identifier: Apache-2.0
"""Hosts with a libvirt of their own, as far as one machine can have several.

Each host is a real ``libvirtd`` with its own configuration, state, host name and UUID, in
namespaces of its own for mounts, host name and processes: neither sees the other's domains
or files of state, and libvirt takes them for two machines. What they share is the kernel,
the network (memory migrates over TCP on the loopback interface) and all other files, so
that a socket can be reached from both. When a host ends, all of its domains end with it.
"""

import os
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from nbdstream.guest import domain
from nbdstream.guest.console import Console
from nbdstream.tasks import open_background_nursery
from testbed.guests import systems
from testbed.guests.systems import System
from testbed.migrations.arrangement import WRITER, Ends

DOMAIN = "vm"
# The same domain at both hosts.
_UUID = "6f1c1c0e-7a55-4a52-9c1c-0d9e4f0d1a11"
_MAC = "52:54:00:0d:1a:11"
START_TIMEOUT = 60.0
COMMAND_TIMEOUT = 60.0

# Runs as the first process of its namespaces. The shell stays, to reap what QEMU's and
# libvirt's daemons leave behind.
_INIT = """
set -e
hostname "$1"
mount -t tmpfs none /run
for place in etc var/lib var/cache var/log; do
    mkdir -p "$2/$place"
    mount --bind "$2/$place" "/$place/libvirt"
done
libvirtd -f "$2/libvirtd.conf" -p "$2/pid" &
wait $!
"""
_LIBVIRTD_CONF = """
unix_sock_dir = "{directory}"
auth_unix_rw = "none"
host_uuid = "{uuid}"
log_outputs = "3:file:{directory}/libvirtd.log"
"""
# Guests run as root, as the tests do, and without what needs systemd.
_QEMU_CONF = """
user = "root"
group = "root"
security_driver = "none"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""


def missing() -> str:
    """Why there can be no such hosts here; empty if there can."""
    for program, package in (
        ("libvirtd", "libvirt-daemon-system"),
        ("virsh", "libvirt-clients"),
        ("unshare", "util-linux"),
    ):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            return f"{program} is not installed ({package})"
    done = subprocess.run([*_NAMESPACES, "true"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"no namespaces for hosts: {done.stderr.strip()}"


_NAMESPACES = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]


@dataclass(frozen=True)
class Host:
    """A running libvirtd, by its name and directory."""

    name: str
    directory: Path
    process: "subprocess.Popen[bytes]"

    @property
    def uri(self) -> str:
        return f"qemu+unix:///system?socket={self.directory}/libvirt-sock"

    def crash(self) -> None:
        """End the host and its domains at once, as loss of power would."""
        self.process.kill()
        self.process.wait()

    async def virsh(self, *arguments: str) -> str:
        """Run a command of virsh here, return what it prints. Raises VirshError."""
        with trio.fail_after(COMMAND_TIMEOUT):
            done = await trio.run_process(
                ["virsh", "-q", "-c", self.uri, *arguments],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        if done.returncode != 0:
            raise VirshError(f"virsh {arguments[0]} at {self.name}: {done.stderr.decode().strip()}")
        return done.stdout.decode().strip()

    async def state(self) -> str:
        """The domain's state in libvirt's words; empty if there is no domain."""
        if DOMAIN not in (await self.virsh("list", "--all", "--name")).split():
            return ""
        return await self.virsh("domstate", DOMAIN)

    def log(self) -> str:
        """What libvirtd has warned of."""
        path = self.directory / "libvirtd.log"
        return path.read_text() if path.exists() else ""


class VirshError(RuntimeError):
    """A command of virsh failed; the message has its words."""


@contextmanager
def host(name: str, directory: Path) -> Iterator[Host]:
    """A libvirtd in *directory*, whose path has to be short. It may not answer yet: see `ready`."""
    directory.mkdir()
    config = _LIBVIRTD_CONF.format(directory=directory, uuid=uuid.uuid4())
    (directory / "libvirtd.conf").write_text(config)
    (directory / "etc").mkdir()
    (directory / "etc/qemu.conf").write_text(_QEMU_CONF)
    command = [*_NAMESPACES, "bash", "-c", _INIT, "bash", name, str(directory)]
    environment = os.environ | {"PATH": f"/usr/sbin:{os.environ['PATH']}"}
    with open(directory / "output", "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
    running = Host(name, directory, process)
    try:
        yield running
    finally:
        running.crash()


async def ready(*hosts: Host) -> None:
    """Wait until they answer."""
    with trio.fail_after(START_TIMEOUT):
        for one in hosts:
            while True:
                try:
                    await one.virsh("list")
                except VirshError as error:
                    if one.process.poll() is not None:
                        output = (one.directory / "output").read_text()
                        raise VirshError(f"{one.name}: {output} {one.log()}") from error
                    await trio.sleep(0.1)
                else:
                    break


@asynccontextmanager
async def running_domain(at: Host, ends: Ends, xml: str) -> AsyncIterator[Console]:
    """A domain boots, and its writer begins. ``xml``: the file of its definition, which is
    `domain_xml` of the end that has the host's name."""
    await at.virsh("define", xml)
    await at.virsh("start", "--paused", DOMAIN)
    stream = await trio.open_unix_socket(ends.path(f"{at.name}.serial"))
    async with stream, open_background_nursery() as nursery:
        console = Console(stream)
        nursery.start_soon(console.pump)
        await at.virsh("resume", DOMAIN)
        await console.wait_for(ends.system.login, systems.BOOT_TIMEOUT)
        await console.wait_for(ends.system.prompt, systems.BOOT_TIMEOUT)
        await console.send(f"{WRITER}\n")
        await console.wait_for("ACK 3\\b", 60)
        yield console


def domain_xml(end: str, directory: Path, system: System) -> str:
    """A domain that boots from the NBD export at ``<end>.nbd`` in *directory*, by firmware and
    boot loader.

    Its console is at ``<end>.serial`` and in ``<end>.console``, its second serial port at
    ``<end>.heartbeat``.
    """
    place = directory / end
    described = domain.domain_xml(DOMAIN, f"{place}.nbd", system.memory, "tcg")
    ports = f"""<serial type='unix'>
      <source mode='bind' path='{place}.serial'/>
      <log file='{place}.console'/>
      <target port='0'/>
    </serial>
    <serial type='unix'><source mode='bind' path='{place}.heartbeat'/><target port='1'/></serial>"""
    for general, ours in (
        ("</name>", f"</name>\n  <uuid>{_UUID}</uuid>\n  <on_reboot>destroy</on_reboot>"),
        ("<interface type='user'>", f"<interface type='user'><mac address='{_MAC}'/>"),
        ("<serial type='pty'/>", ports),
    ):
        described = described.replace(general, ours)
    return described
