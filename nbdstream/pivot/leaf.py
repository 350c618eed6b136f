# SPDX-License-Identifier: Apache-2.0
"""A leaf as QEMU is to open it: complete, or with copy on read from the backing that it names."""

from contextlib import suppress
from dataclasses import dataclass, field

from nbdstream.errors import UsageError
from nbdstream.guest.disks import nbd_options
from nbdstream.pivot.leftovers import PROBE
from nbdstream.pivot.nodes import Attached
from nbdstream.pivot.servers import DiskServer, PivotError
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import CommandError, JSONObject

IMAGE, BACKING = "-image", "-backing"
"""What is added to a leaf's node for those below it, where the leaf is not complete."""


@dataclass(frozen=True)
class PivotLeaf:
    """A disk that has passed the checks: its server, the leaf as QEMU sees it, the leaf's node to
    be (``node``), and what it is to replace. ``backing``: what QEMU reads that the leaf does not
    have, as a node; empty for a complete leaf. ``thin``: it is not to be copied into the leaf."""

    server: DiskServer
    leaf: str
    format: str
    attached: Attached
    node: str
    backing: JSONObject = field(default_factory=dict)
    thin: bool = False

    async def add(self, qemu: QMPClient) -> None:
        """Have QEMU open the leaf. Raises QMPError."""
        for node in self._added():
            await qemu.execute("blockdev-add", node)

    def _added(self) -> list[JSONObject]:
        """Arguments of blockdev-add for the leaf, one node after the other."""
        common = {**self._kept(), "discard": "unmap"}
        file = {"driver": "file", "filename": self.leaf, **common}
        node = {"driver": self.format, "node-name": self.node, **common, "file": file}
        if self.format != "raw":
            node["backing"] = None  # whatever the leaf still names
        below = []
        if self.backing:
            # By a name: QEMU would mix options with what the image says of its backing.
            below = [{**self.backing, "node-name": self.node + BACKING}]
        if self.backing and self.thin:
            node["backing"] = self.node + BACKING
        elif self.backing:
            image = {**node, "node-name": self.node + IMAGE, "backing": self.node + BACKING}
            node = {"driver": "copy-on-read", "node-name": self.node, **common, "file": image}
        if self.attached.device:
            node["detect-zeroes"] = self.attached.top["detect_zeroes"]
        return [*below, node]

    async def remove(self, qemu: QMPClient) -> None:
        """Have QEMU close the leaf, as far as it has opened it. Raises QMPConnectionError."""
        for name in (self.node, self.node + BACKING):
            with suppress(CommandError):
                await qemu.execute("blockdev-del", {"node-name": name})

    def reopened(self) -> JSONObject:
        """Options of blockdev-reopen for the guest's disk; those that are not given would be
        set to their defaults."""
        return {
            "driver": "raw",
            "node-name": self.attached.name,
            **self._kept(),
            "detect-zeroes": self.attached.top["detect_zeroes"],
            "discard": "unmap",
            "file": self.node,
        }

    def _kept(self) -> JSONObject:
        top = self.attached.top
        cache = {key: top["cache"][key] for key in ("direct", "no-flush")}
        return {"read-only": top["ro"], "cache": cache}

    async def probe(self, qemu: QMPClient) -> None:
        """Whether QEMU can open the file and the backing. It takes no lock and reads nothing.

        Raises:
            PivotError: it cannot.
        """
        file = {"driver": "file", "filename": self.leaf, "locking": "off"}
        await _try(
            qemu,
            {**file, "read-only": self.attached.top["ro"]},
            "QEMU cannot open the leaf: {}. It needs the right to read and write the file, and its"
            " own path of it (--leaf-path)",
        )
        if self.backing:
            await _try(
                qemu,
                self.backing,
                "QEMU cannot open the backing, without which the leaf is not complete: {}",
            )


async def _try(qemu: QMPClient, node: JSONObject, words: str) -> None:
    try:
        await qemu.execute("blockdev-add", {**node, "node-name": PROBE})
    except CommandError as error:
        raise PivotError(words.format(error)) from error
    await qemu.execute("blockdev-del", {"node-name": PROBE})


def backing_node(facts: JSONObject) -> JSONObject:
    """What a leaf lacks, as a node of QEMU: the image that it stays on, or the backing that it
    names; empty for a complete leaf. ``facts`` are the server's.

    Raises:
        PivotError: QEMU does not reach the backing by that name.
    """
    if "image" in facts:
        file = {"driver": "file", "filename": facts["image"]}
        return {"driver": "raw", "read-only": True, "file": file}
    backing = facts.get("backing")
    if backing is None:
        return {}
    uri, image_format = backing["uri"], backing["format"]
    try:
        options = nbd_options(uri)
    except UsageError as error:
        raise PivotError(
            f"the leaf is not complete, and QEMU cannot read its backing itself: {error}"
        ) from error
    return {"driver": image_format or "raw", "read-only": True, "file": options}
