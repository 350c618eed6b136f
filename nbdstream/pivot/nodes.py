# SPDX-License-Identifier: Apache-2.0
"""A disk in the block graph of a guest's QEMU: where our export is, and what stands on it.

QEMU can replace the file of a format node while the guest's device stays where it is. So the
disk has to be attached as a node of the driver ``raw`` over the ``nbd`` node that is connected
to our server.
"""

import os
from dataclasses import dataclass

from nbdstream.errors import NbdstreamError, UsageError
from nbdstream.net.address import NbdUri, UnixAddress
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import JSONObject


class PivotError(NbdstreamError):
    """A pivot that did not take place; the message says how things stand."""


@dataclass(frozen=True)
class Attached:
    """The guest's disk: ``raw`` as in query-named-block-nodes, ``nbd`` the node below it."""

    raw: JSONObject
    nbd: str

    @property
    def name(self) -> str:
        """The node of the format ``raw``."""
        return str(self.raw["node-name"])


class Graph:
    """The block graph at one time."""

    def __init__(self, nodes: list[JSONObject], graph: JSONObject) -> None:
        self._nodes = {node["node-name"]: node for node in nodes}
        self._kinds = {node["id"]: node["type"] for node in graph["nodes"]}
        self._names = {node["id"]: node["name"] for node in graph["nodes"]}
        self._edges = graph["edges"]

    @classmethod
    async def of(cls, qmp: QMPClient) -> "Graph":
        """The graph as it is now. Raises QMPError."""
        nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
        return cls(nodes, await qmp.execute("x-debug-query-block-graph"))

    def has(self, name: str) -> bool:
        """Whether there is a node of that name."""
        return name in self._nodes

    def file_of(self, name: str) -> str:
        """The node that is the file of a format node, "" for none."""
        for edge in self._edges:
            if self._names[edge["parent"]] == name and edge["name"] == "file":
                return str(self._names[edge["child"]])
        return ""

    def find(self, uris: list[str]) -> Attached:
        """The disk that is connected to one of these exports.

        Raises:
            PivotError: there is none, or it cannot be replaced; the message says why.
        """
        wanted = [_place(uri) for uri in uris]
        ours = [
            node["node-name"]
            for node in self._nodes.values()
            if node["drv"] == "nbd" and _place(node["file"]) in wanted
        ]
        if not ours:
            raise PivotError(f"this QEMU has no disk on {' or '.join(uris)}: not this guest's")
        if len(ours) > 1:
            raise PivotError(f"QEMU has several nodes on {uris[0]}: {', '.join(ours)}")
        (nbd,) = ours
        parents = self._parents(nbd)
        for kind, name in parents:
            if kind == "block-job":
                raise PivotError(f"the job {name} is at work on the disk: wait for it, or end it")
        formats = [name for kind, name in parents if kind == "block-driver"]
        if len(parents) != 1 or not formats or self._nodes[formats[0]]["drv"] != "raw":
            raise PivotError(
                f"the guest's device uses the node {nbd} directly: attach the disk as a 'raw' node"
                " over the 'nbd' node, so that its file can be replaced (docs/pivot.md)"
            )
        raw = self._nodes[formats[0]]
        if formats[0].startswith("#"):
            raise PivotError(
                "QEMU chose the name of the disk's node by itself, and cannot change such a node:"
                " give it one (-drive ...,node-name=NAME)"
            )
        for kind, name in self._parents(formats[0]):
            if kind == "block-job":
                raise PivotError(f"the job {name} is at work on the disk: wait for it, or end it")
        if raw["image"]["virtual-size"] != self._nodes[nbd]["image"]["virtual-size"]:
            raise PivotError(f"the node {formats[0]} is only a part of the export")
        return Attached(raw, nbd)

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
