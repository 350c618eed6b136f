# SPDX-License-Identifier: Apache-2.0
"""A disk in the block graph of a guest's QEMU: where our export is, and what stands on it.

There are two ways to replace an export while the guest's device stays where it is:

- The device uses a node of the driver ``raw`` over the ``nbd`` node, and that node has a name that
  the user gave. QEMU can replace its file (``blockdev-reopen``), for all disks in one transaction.
- Otherwise, the device itself is given another node (its property ``drive``), each device for
  itself.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from nbdstream.errors import UsageError
from nbdstream.net.address import NbdUri, UnixAddress
from nbdstream.pivot.servers import PivotError
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import JSONObject


@dataclass(frozen=True)
class Attached:
    """The guest's disk: ``top`` is the node that its device uses, as in
    query-named-block-nodes; ``nbd`` the node of the export, the same one or below it.
    ``device``: QOM path of the device that has to be given another node; "" where the file of
    ``top`` can be replaced."""

    top: JSONObject
    nbd: str
    device: str = ""

    @property
    def name(self) -> str:
        """The node that the guest's device uses."""
        return str(self.top["node-name"])


class Graph:
    """The block graph at one time."""

    def __init__(
        self, nodes: list[JSONObject], graph: JSONObject, devices: Sequence[JSONObject]
    ) -> None:
        self._nodes = {node["node-name"]: node for node in nodes}
        self._kinds = {node["id"]: node["type"] for node in graph["nodes"]}
        self._names = {node["id"]: node["name"] for node in graph["nodes"]}
        self._edges = graph["edges"]
        self._devices = devices

    @classmethod
    async def of(cls, qmp: QMPClient) -> "Graph":
        """The graph as it is now. Raises QMPError."""
        nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
        graph = await qmp.execute("x-debug-query-block-graph")
        return cls(nodes, graph, await qmp.execute("query-block"))

    def leaves(self, prefix: str, file: str) -> list[str]:
        """Nodes by names of this kind that have that image file."""
        return [
            name
            for name, node in self._nodes.items()
            # With another backing than the image names, QEMU describes the node as JSON.
            if name.startswith(prefix)
            and (node["file"] == file or f'"filename": {json.dumps(file)}' in node["file"])
        ]

    def unused(self, prefix: str) -> list[str]:
        """Nodes by names of this kind that nothing uses."""
        return [name for name in self._nodes if name.startswith(prefix) and not self.in_use(name)]

    def uses(self, driver: str) -> bool:
        """Whether anything uses a node of that driver."""
        nodes = self._nodes.values()
        return any(node["drv"] == driver and self.in_use(node["node-name"]) for node in nodes)

    def in_use(self, name: str) -> bool:
        """Whether a device, a job or another node uses the node."""
        return bool(self._parents(name))

    def has(self, name: str) -> bool:
        """Whether there is a node of that name."""
        return name in self._nodes

    def exports(self, uris: list[str], *, used: bool = True) -> list[str]:
        """Nodes that are connected to one of these exports, and that something uses; or those
        that nothing uses, as a killed pivot leaves one."""
        wanted = [_place(uri) for uri in uris]
        return [
            name
            for name, node in self._nodes.items()
            if node["drv"] == "nbd" and _place(node["file"]) in wanted and self.in_use(name) is used
        ]

    def devices_over(self, name: str) -> list[str]:
        """Ids, or QOM paths, of the guest's devices that use a node or what stands on it."""
        devices = [str(one["qdev"]) for one in self._users(name) if one.get("qdev")]
        for kind, user in self._parents(name):
            if kind == "block-driver":
                devices += self.devices_over(user)
        return devices

    def _users(self, name: str) -> list[JSONObject]:
        """The entries of query-block that have this node inserted."""
        return [one for one in self._devices if one.get("inserted", {}).get("node-name") == name]

    def find(self, uris: list[str]) -> Attached:
        """The disk that is connected to one of these exports.

        Raises:
            PivotError: there is none, or it cannot be replaced; the message says why.
        """
        ours = self.exports(uris)
        if not ours:
            raise PivotError(f"this QEMU has no disk on {' or '.join(uris)}: not this guest's")
        if len(ours) > 1:
            raise PivotError(f"QEMU has several nodes on {uris[0]}: {', '.join(ours)}")
        (nbd,) = ours
        self._refuse_jobs(nbd)
        top = self._top(nbd)
        node = self._nodes[top]
        if node["image"]["virtual-size"] != self._nodes[nbd]["image"]["virtual-size"]:
            raise PivotError(f"the node {top} is only a part of the export")
        if top != nbd and not top.startswith("#"):
            return Attached(node, nbd)
        # Neither a node of the driver nbd nor one that QEMU has named can be changed.
        return Attached(node, nbd, self._device_of(top))

    def _top(self, nbd: str) -> str:
        """The ``raw`` node over the export, if there is one, or the export's own."""
        formats = [name for kind, name in self._parents(nbd) if kind == "block-driver"]
        if not formats:
            return nbd
        driver = self._nodes[formats[0]]["drv"]
        if len(self._parents(nbd)) != 1 or driver != "raw":
            raise PivotError(
                f"QEMU has the node {formats[0]} ({driver}) over the export: a pivot can replace"
                " what is below a 'raw' node or a device, and nothing else"
            )
        return formats[0]

    def _refuse_jobs(self, name: str) -> None:
        """A job may be at work on any node above: a backup puts one there by itself."""
        for kind, user in self._parents(name):
            if kind == "block-job":
                raise PivotError(f"the job {user} is at work on the disk: wait for it, or end it")
            if kind == "block-driver":
                self._refuse_jobs(user)

    def _device_of(self, name: str) -> str:
        """The QOM path of the device that uses a node, if nothing else uses it."""
        paths = [str(one["qdev"]) for one in self._users(name) if one.get("qdev")]
        if len(paths) != 1 or len(self._parents(name)) != 1:
            raise PivotError(
                f"the node {name} has other users than one device of the guest: it cannot be"
                " replaced (docs/pivot.md)"
            )
        (path,) = paths
        return path if path.startswith("/") else f"/machine/peripheral/{path}"

    def _parents(self, name: str) -> list[tuple[str, str]]:
        """Kind and name of each user of a node."""
        return [
            (self._kinds[edge["parent"]], self._names[edge["parent"]])
            for edge in self._edges
            if self._names[edge["child"]] == name
        ]


def _place(uri: str) -> tuple[str, str]:
    """Socket and export of an NBD URI, to compare; a socket is the same by any path."""
    try:
        parsed = NbdUri.parse(uri)
    except UsageError:
        return "", uri
    address = parsed.address
    if isinstance(address, UnixAddress):
        return os.path.realpath(address.path), parsed.export
    return str(address), parsed.export
