# SPDX-License-Identifier: Apache-2.0
"""Disks as QEMU names them: block device options for NBD exports and image files."""

import json
from dataclasses import dataclass
from pathlib import Path

from nbdstream.errors import UsageError
from nbdstream.net.address import NbdUri, TcpAddress, UnixAddress
from nbdstream.qmp.protocol import JSONObject


@dataclass(frozen=True)
class Disk:
    """A virtio disk of a guest. *blockdev* is as in QMP's ``blockdev-add``, unnamed."""

    blockdev: JSONObject

    def named(self, name: str) -> str:
        """QEMU's ``-blockdev`` argument for this disk as a node of that name."""
        return json.dumps({**self.blockdev, "node-name": name})

    @classmethod
    def file(cls, path: Path | str, image_format: str = "raw") -> "Disk":
        """A local image file, with trims passed on."""
        protocol = {"driver": "file", "filename": str(path), "discard": "unmap"}
        return cls({"driver": image_format, "file": protocol, "discard": "unmap"})

    @classmethod
    def nbd(cls, uri: str, reconnect_delay: int = 0) -> "Disk":
        """The export that *uri* names, below a node of the format ``raw``: what that node has
        as its file can be replaced while the guest runs (`nbdstream pivot`).

        While the server is away, requests wait for up to *reconnect_delay* seconds before
        the guest sees an error. Raises UsageError as ``nbd_options`` does.
        """
        node = {**nbd_options(uri), "discard": "unmap"}
        if reconnect_delay:
            node["reconnect-delay"] = reconnect_delay
        return cls({"driver": "raw", "discard": "unmap", "file": node})


def nbd_options(uri: str) -> JSONObject:
    """Return QEMU's options for the NBD URI *uri* (``doc/uri.md`` of the NBD project).

    Raises UsageError for what is not an NBD URI, and for TLS, which QEMU only takes
    together with credentials that a URI does not name.
    """
    parsed = NbdUri.parse(uri)
    if parsed.tls:
        raise UsageError(f"{uri}: QEMU cannot take TLS from a URI; serve it without, locally")
    address = parsed.address
    if isinstance(address, UnixAddress):
        server = {"type": "unix", "path": address.path}
    elif isinstance(address, TcpAddress) and address.host:
        server = {"type": "inet", "host": address.host, "port": str(address.port)}
    else:
        raise UsageError(f"{uri}: QEMU needs nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH")
    options: JSONObject = {"driver": "nbd", "server": server}
    if parsed.export:
        options["export"] = parsed.export
    return options
