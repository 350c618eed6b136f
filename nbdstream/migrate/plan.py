# SPDX-License-Identifier: Apache-2.0
"""What is to be migrated, from where to where; checked before anything is touched."""

import os
from dataclasses import dataclass, fields
from pathlib import Path

from nbdstream.errors import NbdstreamError, UsageError
from nbdstream.leaf import format_from_suffix
from nbdstream.migrate.tls import check_directory


class MigrationError(NbdstreamError):
    """A migration that did not happen or did not end; the message says how things stand."""


@dataclass(frozen=True)
class DiskPlan:
    """One disk. At the source it is served by an nbdstream (``source_control``: its control
    socket) or is a node of the source's QEMU (``source_node``).

    ``listen``: where the source offers it, HOST:PORT or unix:PATH, and ``reach`` where the
    destination finds it, if that is another address (of a tunnel, say). ``leaf``, ``socket``
    and ``control``: the leaf that is made at the destination, and the NBD and control sockets
    of the nbdstream that serves it there.
    """

    listen: str
    leaf: str
    socket: str
    control: str
    source_control: str = ""
    source_node: str = ""
    reach: str = ""

    @classmethod
    def parse(cls, text: str) -> "DiskPlan":
        """From ``key=value,…``, with ``-`` for ``_`` in keys. Raises UsageError."""
        known = [field.name for field in fields(cls)]
        values: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = part.partition("=")
            name = key.strip().replace("-", "_")
            if not equals or not value or name not in known or name in values:
                spelled = ", ".join(key.replace("_", "-") for key in known)
                raise UsageError(f"'{part}' in a disk: wanted KEY=VALUE with one of {spelled}")
            values[name] = value
        for name in ("listen", "leaf", "socket", "control"):
            if name not in values:
                raise UsageError(f"a disk needs {name}=…")
        if ("source_control" in values) == ("source_node" in values):
            raise UsageError("a disk needs source-control=… or source-node=…, one of them")
        format_from_suffix(values["leaf"])
        return cls(**values)

    @property
    def source(self) -> str:
        """The disk at the source, in words."""
        if self.source_control:
            return f"the disk served by {self.source_control}"
        return f"QEMU's node {self.source_node}"


@dataclass(frozen=True)
class MigrationPlan:
    """``source_qmp`` and ``destination_qmp`` are the two QEMUs' sockets; ``memory`` is the URI
    over which they migrate, ``memory_listen`` where the destination listens for it, if that is
    another one. ``prefix`` is put before every command that is run at the destination
    (``ip netns exec …``), ``command`` the QEMU to start there; where it is empty, another tool
    starts one once the disks are served.

    ``max_bandwidth`` is in bytes per second, 0 for QEMU's own limit; ``downtime_limit`` in
    seconds, 0 likewise. ``pivot``: the destination's servers are told to pivot by themselves.
    ``tls``: the directory of certificates for memory and disks (`nbdstream.migrate.tls`), "" to
    send both in clear.
    """

    source_qmp: str
    destination_qmp: str
    memory: str
    disks: tuple[DiskPlan, ...]
    prefix: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    memory_listen: str = ""
    postcopy_ram: bool = False
    max_bandwidth: int = 0
    downtime_limit: float = 0.0
    pivot: bool = False
    tls: str = ""

    def check(self) -> None:
        """Raises UsageError for what cannot work."""
        if not self.disks:
            raise UsageError("there is no disk to migrate")
        for what in ("leaf", "socket", "control"):
            names = [getattr(disk, what) for disk in self.disks]
            if len(set(names)) != len(names):
                raise UsageError(f"two disks have the same {what}")
        if self.tls:
            check_directory(self.tls)
            self._check_addresses()
        for disk in self.disks:
            if os.path.lexists(disk.leaf):
                raise UsageError(f"{disk.leaf} exists already: the destination needs a new leaf")
            if not Path(disk.leaf).absolute().parent.is_dir():
                raise UsageError(f"there is no directory for {disk.leaf}")
        if len({disk.listen for disk in self.disks if disk.source_node}) > 1:
            raise UsageError("QEMU has one NBD server: give its disks the same listen=…")

    def _check_addresses(self) -> None:
        """Raises UsageError where a certificate could not be compared with a host's name."""
        for memory in filter(None, (self.memory, self.memory_listen)):
            if not memory.startswith("tcp:"):
                raise UsageError(f"{memory}: with --tls, memory goes over tcp:HOST:PORT")
        for disk in self.disks:
            for where in filter(None, (disk.listen, disk.reach)):
                if where.startswith("unix:"):
                    raise UsageError(f"{where}: with --tls, disks are offered at HOST:PORT")

    def describe(self) -> list[str]:
        """What would be done, a line a step."""
        lines = [f"offer {disk.source} read-only at {disk.listen}" for disk in self.disks]
        lines += [
            f"start nbdstream for the new leaf {disk.leaf}, standing by, at {disk.socket}"
            for disk in self.disks
        ]
        qemu = (
            "start QEMU at the destination" if self.command else "wait for the destination's QEMU"
        )
        kind = "by post-copy after one pass" if self.postcopy_ram else "by pre-copy"
        if self.tls:
            kind += f"; memory and disks with TLS, by the certificates in {self.tls}"
        return [
            *lines,
            f"{qemu}, with QMP at {self.destination_qmp}",
            f"migrate memory over {self.memory}, {kind}",
            "with the guest stopped: seal the source, activate the destination's disks",
            "let the guest go on at the destination",
            "stream the disks; then end the offers: the source's images may be deleted",
        ]
