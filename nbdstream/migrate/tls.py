# SPDX-License-Identifier: Apache-2.0
"""TLS between the two hosts of a migration, for memory and for disks, from one directory.

It has QEMU's file layout, and is at the same path on both hosts: each end shows a certificate of
the authorities in ``ca-cert.pem``, and accepts no peer without one. Who listens needs the
server's files, who connects the client's: memory goes from the source to the destination, and
disks are read by the destination.

Source: docs/system/tls.rst and docs/devel/migration of QEMU.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from nbdstream.errors import UsageError
from nbdstream.net.address import NbdUri
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import CommandError

# The credentials' ids in both QEMUs, by the end that they are for.
_IDS = {"client": "nbdstream-tls-client", "server": "nbdstream-tls-server"}
CLIENT, SERVER = "client", "server"
_FILES = ("ca-cert.pem", *(f"{end}-{part}.pem" for end in _IDS for part in ("cert", "key")))


def check_directory(directory: str) -> None:
    """Raises UsageError where a file is missing, or where the path is not absolute: two hosts
    have to understand it."""
    if not Path(directory).is_absolute():
        raise UsageError(f"{directory}: give the absolute path, which is the same on both hosts")
    for name in _FILES:
        if not Path(directory, name).exists():
            raise UsageError(f"{directory}: there is no {name} in it")


def secured(uri: str, directory: str) -> str:
    """The URI of an offer, for a destination that has the same directory."""
    return str(replace(NbdUri.parse(uri), tls=True, parameters=(("tls-certificates", directory),)))


async def give(qmp: QMPClient, directory: str, end: str) -> str:
    """Give a QEMU credentials; returns their id. Raises QMPError: it cannot use the files."""
    await take(qmp, end)  # those of a tool that was killed
    credentials = {"qom-type": "tls-creds-x509", "id": _IDS[end], "endpoint": end}
    await qmp.execute("object-add", credentials | {"dir": directory, "verify-peer": True})
    return _IDS[end]


async def take(qmp: QMPClient, end: str) -> None:
    """Take the credentials away, if there are any. Raises QMPError."""
    with suppress(CommandError):
        await qmp.execute("object-del", {"id": _IDS[end]})


def id_of(end: str) -> str:
    return _IDS[end]
