# SPDX-License-Identifier: Apache-2.0
"""Disks as QEMU names them: block device options for NBD exports and image files."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from nbdstream.errors import UsageError
from nbdstream.qmp.protocol import JSONObject

DEFAULT_NBD_PORT = 10809


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
        """The export that *uri* names.

        While the server is away, requests wait for up to *reconnect_delay* seconds before
        the guest sees an error. Raises UsageError as ``nbd_options`` does.
        """
        node = {**nbd_options(uri), "discard": "unmap"}
        if reconnect_delay:
            node["reconnect-delay"] = reconnect_delay
        return cls(node)


def nbd_options(uri: str) -> JSONObject:
    """Return QEMU's options for the NBD URI *uri* (``doc/uri.md`` of the NBD project).

    Raises UsageError for what is not an NBD URI, and for TLS, which QEMU only takes
    together with credentials that a URI does not name.
    """
    parts = urlsplit(uri)
    try:
        port = parts.port or DEFAULT_NBD_PORT
    except ValueError as error:
        raise UsageError(f"{uri}: no such port") from error
    if re.fullmatch(r"nbds(\+unix|\+vsock)?", parts.scheme):
        raise UsageError(f"{uri}: QEMU cannot take TLS from a URI; serve it without, locally")
    if parts.scheme == "nbd+unix":
        path = parse_qs(parts.query).get("socket", [""])[0]
        if not path:
            raise UsageError(f"{uri}: an nbd+unix URI needs ?socket=PATH")
        server = {"type": "unix", "path": path}
    elif parts.scheme == "nbd" and parts.hostname:
        server = {"type": "inet", "host": parts.hostname, "port": str(port)}
    else:
        raise UsageError(f"{uri}: not an NBD URI (nbd://HOST/EXPORT, nbd+unix:///EXPORT?socket=…)")
    options: JSONObject = {"driver": "nbd", "server": server}
    if export := unquote(parts.path.removeprefix("/")):
        options["export"] = export
    return options
