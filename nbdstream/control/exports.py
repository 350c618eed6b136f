# SPDX-License-Identifier: Apache-2.0
"""QMP commands for exports, as QEMU has them (qapi/block-export.json).

The disk has an export of its own, which stays. More can be added under other names, for reading
only or for writing, and deleted again.
"""

from collections.abc import Callable, Mapping
from typing import Literal

from nbdstream.control.table import command
from nbdstream.disk.readonly import ReadOnlyExport
from nbdstream.export import Export
from nbdstream.qmp.protocol import DeviceNotFound, GenericError, JSONObject
from nbdstream.server.cursor import string_fault
from nbdstream.server.server import Server


class Alias:
    """Implements `nbdstream.export.Export`: another one by another name."""

    def __init__(self, disk: Export, name: str, description: str) -> None:
        self.name = name
        self.description = description
        self.size = disk.size
        self.read_only = disk.read_only
        self.preferred_block_size = disk.preferred_block_size
        self.read_nowait, self.write_nowait = disk.read_nowait, disk.write_nowait
        self.read, self.write, self.zero, self.trim = disk.read, disk.write, disk.zero, disk.trim
        self.cache, self.flush, self.block_status = disk.cache, disk.flush, disk.block_status


class ExportCommands:
    """Adds, deletes and lists exports of the disk ``device`` on its server.

    ``emit`` tells the clients of the control socket what happened.
    """

    def __init__(
        self,
        server: Server,
        disk: Export,
        device: str,
        emit: Callable[[str, Mapping[str, object]], None],
    ) -> None:
        self._server = server
        self._disk = disk
        self._device = device
        self._emit = emit
        self._added: dict[str, Export] = {}
        self._ending: set[str] = set()

    @command("query-block-exports")
    async def query_block_exports(self) -> list[JSONObject]:
        """The newest first, as QEMU has them."""
        return [
            {
                "id": id_,
                "type": "nbd",
                "node-name": self._device,
                "shutting-down": id_ in self._ending,
            }
            for id_ in (*reversed(self._added), self._device)
        ]

    @command("block-export-add")
    async def block_export_add(
        self,
        type: Literal["nbd"],  # noqa: A002 (QMP's name for it)
        id: str,  # noqa: A002
        node_name: str,
        name: str | None = None,
        description: str = "",
        writable: bool = False,
        writethrough: bool = False,
    ) -> None:
        """Add an export of the disk. Without ``name`` it is called as the node is.

        Raises:
            DeviceNotFound: no disk has this name.
            GenericError: an argument has a value that is not supported, or is in use already.
        """
        name = node_name if name is None else name
        if node_name != self._device:
            raise DeviceNotFound(f"Cannot find device='{node_name}'")
        if writethrough:
            raise GenericError("Parameter 'writethrough' does not accept value 'true'")
        if not id or id in (self._device, *self._added):
            raise GenericError(f"Block export id '{id}' is already in use")
        for what, text in (("export name", name), ("description", description)):
            if fault := string_fault(text):
                raise GenericError(f"{what} '{text}' {fault}")
        if name in (self._disk.name, *(each.name for each in self._added.values())):
            raise GenericError(f"NBD server already has export named '{name}'")
        if writable and self._disk.read_only:
            raise GenericError("Cannot export read-only node as writable")
        export: Export = (
            Alias(self._disk, name, description)
            if writable
            else ReadOnlyExport(self._disk, name, description)
        )
        self._added[id] = export
        self._server.add_export(export)

    @command("block-export-del")
    async def block_export_del(
        self,
        id: str,  # noqa: A002
        mode: Literal["safe", "hard"] = "safe",
    ) -> None:
        """Remove an export; in mode "safe" only one that no client uses.

        Raises GenericError: there is no such export, it is the disk's own, or it is in use.
        """
        if id == self._device:
            raise GenericError(f"export '{id}' is the disk's own: 'quit' ends it")
        if id not in self._added or id in self._ending:
            raise GenericError(f"Export '{id}' is not found")
        export = self._added[id]
        if mode == "safe" and self._server.clients_of(export):
            raise GenericError(f"export '{id}' still in use")
        self._ending.add(id)
        try:
            await self._server.remove_export(export)
        finally:
            self._ending.discard(id)
            del self._added[id]
        self._emit("BLOCK_EXPORT_DELETED", {"id": id})
