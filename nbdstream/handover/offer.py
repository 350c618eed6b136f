# SPDX-License-Identifier: Apache-2.0
"""The source's side: the disk offered to another host, and sealed when that takes over.

One generation of the disk is offered at a time, read-only, on a listener of its own. What
must hold:

- Once sealed, no guest changes the disk, in this process or in a later one, until the
  seal is taken off (`nbdstream.handover.seal`).
- The seal comes off only after the offer has ended: a destination that was made to rely on
  the sealed content has then lost it for good.
"""

from pathlib import Path

import trio

from nbdstream.control.table import command
from nbdstream.disk import StreamedDisk
from nbdstream.disk.readonly import ReadOnlyExport
from nbdstream.errors import UsageError
from nbdstream.handover.generation import export_name, new_generation
from nbdstream.handover.seal import HOLD, Seal, remove_seal, write_seal
from nbdstream.net.address import TcpAddress, UnixAddress, parse_address
from nbdstream.net.listeners import Listener, listen_tcp, listen_unix
from nbdstream.qmp.protocol import GenericError, JSONObject
from nbdstream.server.certificates import Certificates, TlsPolicy
from nbdstream.server.server import Server
from nbdstream.tasks import in_worker


class Offering:
    """The one offer of a disk, and its commands on the control socket."""

    def __init__(self, disk: StreamedDisk, device: str, nursery: trio.Nursery) -> None:
        self._disk = disk
        self._device = device
        self._nursery = nursery
        self._seal: Seal | None = None
        self._serving = trio.CancelScope()
        self._ended: trio.Event | None = None
        self._uri = ""

    def resume(self, seal: Seal) -> None:
        """Offer again what was sealed in an earlier process. Raises UsageError, OSError."""
        self._start(seal, listen(seal.listen), _certificates(seal.tls))

    @command("x-nbdstream-export-add")
    async def add(self, listen_at: str, tls_certificates: str = "") -> JSONObject:
        """Offer the disk's content at HOST:PORT or unix:PATH, as a new generation; with a directory
        of certificates by TLS alone, to clients of its authorities. ``size`` in the answer is in
        bytes.

        Raises:
            GenericError: it is offered already, or another server owns it.
            UsageError, OSError: the address is none or cannot be listened on, or the certificates
                cannot be used.
        """
        if self._seal is not None:
            raise GenericError(f"the disk is offered already, as {self._seal.export}")
        if self._disk.gate.reason:
            raise GenericError(f"another server owns the disk: {self._disk.gate.reason}")
        certificates = await in_worker(_certificates, tls_certificates)
        generation = new_generation()
        address = parse_address(listen_at)
        listeners = listen(listen_at)
        bound = listeners[0].address
        if isinstance(address, TcpAddress) and isinstance(bound, TcpAddress):
            address = TcpAddress(address.host, bound.port)  # the system may have chosen the port
        name = export_name(self._device, generation)
        seal = Seal(generation, name, str(address), tls=tls_certificates)
        self._start(seal, listeners, certificates)
        return {"uri": self._uri, "generation": generation, "size": self._disk.size}

    @command("x-nbdstream-export-query")
    async def query(self) -> JSONObject:
        """The offer there is, or the empty object."""
        if self._seal is None:
            return {}
        return {"uri": self._uri, "generation": self._seal.generation}

    @command("x-nbdstream-export-remove")
    async def remove(self, generation: str) -> None:
        """End the offer. A seal stays: the disk was handed over."""
        self._check(generation)
        await self._stop()

    @command("x-nbdstream-seal")
    async def seal(self, generation: str) -> JSONObject:
        """Refuse all writes from now on; durable when it returns."""
        seal = self._check(generation)
        try:
            await self._disk.freeze(seal.reason, hold=HOLD)
            await in_worker(write_seal, self._disk.leaf.path, seal)
        except OSError:
            self._disk.gate.open()
            raise
        return {"generation": generation, "size": self._disk.size}

    @command("x-nbdstream-unseal")
    async def unseal(self, generation: str) -> None:
        """The disk did not move after all: end the offer for good, then let guests write."""
        self._check(generation)
        await self._stop()
        await in_worker(remove_seal, self._disk.leaf.path)
        self._disk.gate.open()

    def _check(self, generation: str) -> Seal:
        if self._seal is None or self._seal.generation != generation:
            raise GenericError(f"generation {generation} of the disk is not offered here")
        return self._seal

    def _start(
        self, seal: Seal, listeners: list[Listener], certificates: Certificates | None
    ) -> None:
        self._seal, self._ended = seal, trio.Event()
        export = ReadOnlyExport(self._disk, seal.export, "handed over to another host")
        self._serving = trio.CancelScope()
        self._uri = listeners[0].uri(seal.export, tls=certificates is not None)
        server = Server([export], tls=certificates)
        self._nursery.start_soon(self._run, server, listeners, self._serving, self._ended)

    async def _run(
        self,
        server: Server,
        listeners: list[Listener],
        serving: trio.CancelScope,
        ended: trio.Event,
    ) -> None:
        try:
            with serving:
                await server.run(listeners)
        finally:
            ended.set()

    async def _stop(self) -> None:
        """Drop the clients at once: over a link that is cut, they would not take replies."""
        if self._ended is not None:
            self._serving.cancel()
            await self._ended.wait()
        self._ended, self._seal = None, None


def _certificates(directory: str) -> Certificates | None:
    """What an offer by TLS shows; None for one in clear. Raises UsageError."""
    if not directory:
        return None
    return Certificates(TlsPolicy(Path(directory), required=True, verify_peer=True))


def listen(text: str) -> list[Listener]:
    """Listen at ``HOST:PORT`` or ``unix:PATH``. Raises UsageError, OSError."""
    address = parse_address(text)
    if isinstance(address, UnixAddress):
        return [listen_unix(Path(address.path))]
    if not address.host:
        raise UsageError(f"{text}: name the address at which the other host finds this one")
    return listen_tcp(address.host, address.port)
