# SPDX-License-Identifier: Apache-2.0
"""The source of a disk, of either kind, as the tool sees it.

`NbdstreamSource`: the disk is served by an nbdstream, which offers and seals it.
`QemuSource`: the disk is a node of the guest's own QEMU, whose NBD server offers it. There
the seal is QEMU's own: migrating, it gives up ("inactivates") its images, and goes on
reading them for its NBD clients. When the guest runs at the destination, the image gets a
seal of ours, too, if it is a file of this host.
"""

import os
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass

from nbdstream.errors import LeafError, LeafFormatError, LeafInUseError
from nbdstream.handover.generation import export_name, new_generation
from nbdstream.handover.seal import SUFFIX, Seal, read_seal, stamp_of, write_seal
from nbdstream.leaf.locking import open_locked
from nbdstream.migrate import tls
from nbdstream.migrate.monitor import Monitor
from nbdstream.migrate.plan import MigrationError, MigrationPlan
from nbdstream.net.address import NbdUri, UnixAddress, parse_address
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import CommandError, JSONObject
from nbdstream.tasks import in_worker

# How the ids of our block exports begin.
_EXPORT_ID = "nbdstream-"
# The states of a source QEMU in which its guest stands still for a migration.
_STOPPED = ("finish-migrate", "postmigrate", "paused", "prelaunch", "shutdown")


@dataclass(frozen=True)
class Offer:
    """What the destination is to rely on."""

    uri: str
    generation: str
    size: int


class Source(ABC):
    """One disk at the source. Methods raise QMPError, MigrationError."""

    _generation = ""

    @property
    def offered(self) -> bool:
        """Whether there is an offer to end, as far as this process knows."""
        return bool(self._generation)

    @abstractmethod
    async def adopt(self) -> str:
        """Take over an offer that an earlier tool left behind; its generation, or ""."""

    @abstractmethod
    async def offer(self) -> Offer:
        """Offer the disk's content, read-only, under a name that is new.

        Raises:
            QMPError: the source's program refuses, or does not answer.
            MigrationError: there is no such disk, or its image is sealed.
        """

    @abstractmethod
    async def seal(self) -> None:
        """When this returns, the content that was offered does not change any more.

        Raises:
            QMPError: the source's program refuses, or does not answer.
            MigrationError: the guest still runs.
        """

    async def mark(self) -> None:  # noqa: B027 - not all have to
        """The guest runs at the destination: have the source's image say so, where `seal`
        did not. Raises OSError, too."""

    @abstractmethod
    async def unseal(self) -> None:
        """End the offer for good; then the source may write again. Safe at any time."""

    @abstractmethod
    async def release(self) -> None:
        """The destination needs it no more: end the offer. The seal stays."""


class NbdstreamSource(Source):
    """A disk that an nbdstream serves. Each command is a connection of its own, so that one
    that was lost is no obstacle to the next command."""

    def __init__(self, control: str, listen: str, tls: str) -> None:
        self._control = control
        self._listen = listen
        self._tls = tls

    async def adopt(self) -> str:
        self._generation = (await self._ask("x-nbdstream-export-query", {})).get("generation", "")
        return self._generation

    async def offer(self) -> Offer:
        secure = {"tls-certificates": self._tls} if self._tls else {}
        where = {"listen-at": self._listen, **secure}
        answer = await self._ask("x-nbdstream-export-add", where)
        self._generation = answer["generation"]
        return Offer(answer["uri"], answer["generation"], answer["size"])

    async def seal(self) -> None:
        await self._ask("x-nbdstream-seal", {"generation": self._generation})

    async def unseal(self) -> None:
        await self._end("x-nbdstream-unseal")

    async def release(self) -> None:
        await self._end("x-nbdstream-export-remove")

    async def _end(self, command: str) -> None:
        if self._generation:
            await self._ask(command, {"generation": self._generation})
            self._generation = ""

    async def _ask(self, command: str, arguments: JSONObject) -> JSONObject:
        async with QMPClient.connect(self._control) as qmp:
            answer: JSONObject = await qmp.execute(command, arguments)
            return answer


class QemuServer:
    """The NBD server in the source's QEMU: one for all disks, there while any is offered."""

    def __init__(self, monitor: Monitor, directory: str = "") -> None:
        """``directory``: of the certificates, if it speaks TLS."""
        self.monitor = monitor
        self._directory = directory
        self._offers: set[str] = set()
        self._started = False

    async def add(self, listen: str, node: str, generation: str) -> None:
        """Export a node, read-only, as a generation of its own."""
        name = export_name(node, generation)
        arguments = {"type": "nbd", "id": _EXPORT_ID + generation, "node-name": node, "name": name}
        async with self.monitor.session() as qmp:
            if not self._started:
                secure: JSONObject = {}
                if self._directory:
                    secure = {"tls-creds": await tls.give(qmp, self._directory, tls.SERVER)}
                await qmp.execute("nbd-server-start", {"addr": _address(listen), **secure})
                self._started = True
            await qmp.execute("block-export-add", {**arguments, "writable": False})
        self._offers.add(generation)

    async def remove(self, generation: str) -> None:
        """Drop an export and its clients; with the last one the server."""
        async with self.monitor.session() as qmp:
            if generation in self._offers:
                export = {"id": _EXPORT_ID + generation}
                with qmp.events() as events:
                    await qmp.execute("block-export-del", {**export, "mode": "hard"})
                    await events.wait("BLOCK_EXPORT_DELETED", data=export)
                self._offers.remove(generation)
            if not self._offers and self._started:
                await qmp.execute("nbd-server-stop")
                self._started = False
                if self._directory:
                    await tls.take(qmp, tls.SERVER)

    async def adopt(self, node: str) -> str:
        """Take over what an earlier tool left behind; the node's generation, or ""."""
        async with self.monitor.session() as qmp:
            exports = await qmp.execute("query-block-exports")
        for export in exports:
            if export["node-name"] == node and export["id"].startswith(_EXPORT_ID):
                self._started = True
                generation = str(export["id"].removeprefix(_EXPORT_ID))
                self._offers.add(generation)
                return generation
        return ""

    async def clear(self) -> None:
        """Stop a server that has no exports: the tool was killed while it made the first, or
        dropped the last."""
        async with self.monitor.session() as qmp:
            if not await qmp.execute("query-block-exports"):
                with suppress(CommandError):  # there is none
                    await qmp.execute("nbd-server-stop")


class QemuSource(Source):
    """A node of the source's QEMU."""

    def __init__(self, server: QemuServer, node: str, listen: str) -> None:
        self._server = server
        self._node = node
        self._listen = listen
        self._image = ""
        self._format = ""

    async def adopt(self) -> str:
        self._generation = await self._server.adopt(self._node)
        return self._generation

    async def offer(self) -> Offer:
        """See `Source.offer`."""
        async with self._server.monitor.session() as qmp:
            nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
        found = [node for node in nodes if node["node-name"] == self._node]
        if not found:
            raise MigrationError(f"the source's QEMU has no block node {self._node}")
        size = found[0]["image"]["virtual-size"]
        if await in_worker(_is_written_here, found[0]["file"]):
            self._image, self._format = found[0]["file"], found[0]["drv"]
            await in_worker(_refuse_sealed, self._image)
        generation = new_generation()
        # Noted before it is made: a QEMU whose server has started must get rid of it.
        self._generation = generation
        await self._server.add(self._listen, self._node, generation)
        uri = nbd_uri(self._listen, export_name(self._node, generation))
        return Offer(uri, generation, size)

    async def seal(self) -> None:
        """See `Source.seal`."""
        async with self._server.monitor.session() as qmp:
            status = (await qmp.execute("query-status"))["status"]
        if status not in _STOPPED:
            raise MigrationError(f"the source's guest is not stopped but {status}")

    async def mark(self) -> None:
        if self._image:
            name = export_name(self._node, self._generation)
            await in_worker(
                lambda: write_seal(
                    self._image,
                    Seal(
                        self._generation,
                        name,
                        self._listen,
                        stamp=stamp_of(self._image),
                        format=self._format,
                    ),
                )
            )

    async def unseal(self) -> None:
        await self.release()

    async def release(self) -> None:
        if self._generation:
            await self._server.remove(self._generation)
            self._generation = ""


def _is_written_here(path: str) -> bool:
    """Whether a file is what QEMU has open for writing, by its locks: a source elsewhere may
    call another file by this name."""
    try:
        os.close(open_locked(path, read_only=True))
    except LeafInUseError:
        return True
    except (LeafError, OSError):
        pass
    return False


def _refuse_sealed(image: str) -> None:
    try:
        sealed = read_seal(image) is not None
    except LeafFormatError:
        sealed = True
    if sealed:
        raise MigrationError(
            f"{image} was handed over before: another host owns the disk; "
            f"if you mean it, delete {image}{SUFFIX}"
        )


def make_sources(plan: MigrationPlan, server: QemuServer) -> list[Source]:
    """The sources of a plan's disks, in order."""
    return [
        NbdstreamSource(disk.source_control, disk.listen, plan.tls)
        if disk.source_control
        else QemuSource(server, disk.source_node, disk.listen)
        for disk in plan.disks
    ]


def nbd_uri(listen: str, name: str) -> str:
    """The NBD URI of an export at HOST:PORT or unix:PATH. Raises UsageError."""
    return str(NbdUri(parse_address(listen), name))


def _address(listen: str) -> JSONObject:
    """QEMU's SocketAddressLegacy for HOST:PORT or unix:PATH. Raises UsageError."""
    address = parse_address(listen)
    if isinstance(address, UnixAddress):
        return {"type": "unix", "data": {"path": address.path}}
    return {"type": "inet", "data": {"host": address.host, "port": str(address.port)}}
