# SPDX-License-Identifier: Apache-2.0
"""The network of a fleet: a namespace for each machine, real links between them.

A *spine* joins the origin and the racks, and a rack's own namespace joins its hosts: both are
bridges. The origin's link and each rack's link to the spine may have a rate (tbf). All machines are
in one subnet. It needs root.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

_SUBNET = "10.77.0."
_UPLINK, _BRIDGE = "up0", "br0"
# What a link takes at a time: a packet as large as TCP hands it to a device, a few times.
_BURST = 256 << 10
_QUEUE_SECONDS = 0.1


@dataclass(frozen=True)
class Machine:
    """A namespace. ``names``: its /etc/hosts."""

    name: str
    namespace: str
    address: str
    names: Path

    def enter(self, binds: Sequence[tuple[Path, str]] = ()) -> tuple[str, ...]:
        """What is put before a command to run it there, with such files or directories of ours in
        the place of others. The command keeps the process."""
        mounts = [(self.names, "/etc/hosts"), *binds]
        script = "".join(
            f'mount --bind "${{{2 * n + 1}}}" "${{{2 * n + 2}}}" && ' for n in range(len(mounts))
        )
        script += f'shift {2 * len(mounts)} && exec "$@"'
        words = [str(word) for mount in mounts for word in mount]
        return ("ip", "netns", "exec", self.namespace, "sh", "-ec", script, "sh", *words)

    def sent(self) -> int:
        """Bytes that it has sent over its link so far, headers included."""
        path = f"/sys/class/net/{_UPLINK}/statistics/tx_bytes"
        return int(_output(*self.enter(), "cat", path))

    def received(self) -> int:
        """Bytes that came to it over its link so far, headers included."""
        path = f"/sys/class/net/{_UPLINK}/statistics/rx_bytes"
        return int(_output(*self.enter(), "cat", path))


@dataclass
class Rack:
    """``cache``: the machine of its cache, to whose link the rack's hosts are joined."""

    cache: Machine
    hosts: list[Machine] = field(default_factory=list)


@dataclass
class Network:
    origin: Machine
    racks: list[Rack]

    @property
    def hosts(self) -> list[Machine]:
        """All hosts, rack by rack."""
        return [host for rack in self.racks for host in rack.hosts]


def missing() -> str:
    """Why there can be no such network on this machine; "" if there can."""
    return "" if os.geteuid() == 0 else "network namespaces need root"


@contextlib.contextmanager
def network(
    directory: Path,
    racks: int,
    hosts: int,
    *,
    origin_rate: float | None = None,
    rack_rate: float | None = None,
) -> Iterator[Network]:
    """So many racks with so many hosts each; rates in bits per second. A rack's machines know
    its cache as ``images.rack``, and caches know the origin as ``images.example`` and
    ``s3.example``. ``directory`` is for small files. Raises CalledProcessError."""
    with contextlib.ExitStack() as exits:
        build = _Builder(directory, exits)
        spine = build.machine("spine", "")
        build.bridge(spine)
        origin = build.machine("origin", "")
        build.join(origin, spine, origin_rate)
        build.address(origin, _UPLINK)
        found: list[Rack] = []
        for number in range(1, racks + 1):
            names = f"{origin.address} images.example s3.example\n"
            cache = build.machine(f"rack{number}", names)
            build.bridge(cache)
            build.join(cache, spine, rack_rate)
            build.address(cache, _BRIDGE)
            rack = Rack(cache)
            for _ in range(hosts):
                host = build.machine(
                    f"host{len(found) * hosts + len(rack.hosts) + 1}",
                    f"{cache.address} images.rack\n",
                )
                build.join(host, cache, None)
                build.address(host, _UPLINK)
                rack.hosts.append(host)
            found.append(rack)
        yield Network(origin, found)


class _Builder:
    def __init__(self, directory: Path, exits: contextlib.ExitStack) -> None:
        self._directory = directory
        self._exits = exits
        self._numbers = count(1)
        self._ports = count(1)

    def machine(self, name: str, names: str) -> Machine:
        namespace = f"nbdstream-{os.getpid()}-{name}"
        _ip("netns", "add", namespace)
        self._exits.callback(_ip, "netns", "del", namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")
        path = self._directory / f"{name}.names"
        path.write_text(f"127.0.0.1 localhost\n{names}")
        return Machine(name, namespace, f"{_SUBNET}{next(self._numbers)}", path)

    def bridge(self, machine: Machine) -> None:
        _ip("-n", machine.namespace, "link", "add", _BRIDGE, "type", "bridge")
        _ip("-n", machine.namespace, "link", "set", _BRIDGE, "up")

    def address(self, machine: Machine, device: str) -> None:
        _ip("-n", machine.namespace, "address", "add", f"{machine.address}/24", "dev", device)

    def join(self, machine: Machine, upper: Machine, rate: float | None) -> None:
        """A link from a machine to a bridge above it."""
        port = f"port{next(self._ports)}"
        ends = ["peer", "name", port, "netns", upper.namespace]
        _ip("link", "add", _UPLINK, "netns", machine.namespace, "type", "veth", *ends)
        for namespace, device in ((machine.namespace, _UPLINK), (upper.namespace, port)):
            _ip("-n", namespace, "link", "set", device, "up")
            if rate is not None:
                burst = ["burst", str(_BURST), "latency", f"{_QUEUE_SECONDS}s"]
                command = ["tc", "-n", namespace, "qdisc", "add", "dev", device, "root"]
                subprocess.run([*command, "tbf", "rate", f"{rate:.0f}", *burst], check=True)
        _ip("-n", upper.namespace, "link", "set", port, "master", _BRIDGE)
        bridges = _output("ip", "-n", machine.namespace, "-o", "link", "show", "type", "bridge")
        if bridges:
            _ip("-n", machine.namespace, "link", "set", _UPLINK, "master", _BRIDGE)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
