# SPDX-License-Identifier: Apache-2.0
"""TLS towards a backing: what its URI says, told to libnbd, or to QEMU where that connects.

The URI's parameters are libnbd's (nbd_connect_uri(3)):

- ``tls-certificates=DIR``: a directory in QEMU's layout: ``ca-cert.pem``, and for servers that
  ask for it ``client-cert.pem`` and ``client-key.pem``. Default: libnbd's own directories, then
  the system's authorities.
- ``tls-psk-file=FILE``: lines of ``USER:KEY`` in hexadecimal digits, as psktool(1) writes them.
  The URI's user name selects one.
- ``tls-hostname=NAME``: the name in the server's certificate, where it is not the URI's host.
- ``tls-verify-peer=false``: accept any certificate.

A parameter that would be ignored is refused: ``tls-certificates`` with ``nbd://`` would silently
be a connection in clear.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nbd

from nbdstream.errors import BackingError, UsageError
from nbdstream.net.address import NbdUri, TcpAddress

_PATHS = ("tls-certificates", "tls-psk-file")
_PARAMETERS = (*_PATHS, "tls-hostname", "tls-verify-peer")
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
# Where libnbd looks if the URI names no directory (nbd_set_tls_certificates(3)).
_OF_ROOT = ("/etc/pki/libnbd",)
_OF_USER = ("~/.pki/libnbd", "~/.config/pki/libnbd")
# The system's authorities in one file: Debian and Alpine, Fedora, SUSE.
_SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/var/lib/ca-certificates/ca-bundle.pem",
)
_AUTHORITY = "ca-cert.pem"
_KEYS = "keys.psk"
_X509_FILES = (_AUTHORITY, "ca-crl.pem", "client-cert.pem", "client-key.pem")
# The name of the object on the command lines of QEMU's tools.


@dataclass(frozen=True)
class QemuTls:
    """TLS for QEMU's NBD client: arguments of its tools, options of its ``nbd`` node, and the
    files that these name."""

    arguments: tuple[str, ...] = ()
    node: tuple[tuple[str, str], ...] = ()
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class TlsClient:
    """How to speak TLS with a server.

    ``directory`` has certificates, or the key ``keys.psk`` if ``psk_file`` is set. ``hostname`` is
    the name in the certificate, "" where there is none to be checked. ``user`` is the name of the
    pre-shared key, "" for libnbd's choice.
    """

    directory: str = ""
    psk_file: str = ""
    hostname: str = ""
    hostname_given: bool = False
    verify_peer: bool = True
    user: str = ""

    def configure(self, handle: nbd.NBD) -> None:
        """Tell libnbd. Raises BackingError where this version cannot do it, nbd.Error."""
        if self.hostname_given:
            if not hasattr(handle, "set_tls_hostname"):
                raise BackingError(
                    f"tls-hostname needs libnbd 1.20, and this is {handle.get_version()}: name the "
                    "host as in its certificate (/etc/hosts can give it that name)"
                )
            handle.set_tls_hostname(self.hostname)
        if self.verify_peer and not self.psk_file and not self.hostname and not _checks(handle):
            raise BackingError(
                f"libnbd {handle.get_version()} checks no certificate on sockets other than TCP: "
                "use tls-psk-file, or say tls-verify-peer=false"
            )
        handle.set_tls(nbd.TLS_REQUIRE)
        handle.set_tls_verify_peer(self.verify_peer)
        if self.psk_file:
            handle.set_tls_psk_file(self.psk_file)
        else:
            handle.set_tls_certificates(self.directory)
        if self.user:
            handle.set_tls_username(self.user)

    def for_qemu(self, name: str) -> QemuTls:
        """The same for QEMU, as an object called ``name``."""
        creds: dict[str, Any] = {"id": name, "endpoint": "client", "dir": self.directory}
        if self.psk_file:
            creds |= {"qom-type": "tls-creds-psk", "username": self._psk_user()}
            names: tuple[str, ...] = (_KEYS,)
        else:
            creds |= {"qom-type": "tls-creds-x509", "verify-peer": self.verify_peer}
            # Its opinion of each of the system's many authorities does not matter.
            creds["sanity-check"] = False
            names = _X509_FILES
        node = {"tls-creds": name} | ({"tls-hostname": self.hostname} if self.hostname else {})
        paths = (os.path.join(self.directory, name) for name in names)
        return QemuTls(
            ("--object", json.dumps(creds)),
            tuple(node.items()),
            tuple(path for path in paths if Path(path).exists()),
        )

    def _psk_user(self) -> str:
        """The name of the key that libnbd would use."""
        handle = nbd.NBD()
        self.configure(handle)
        return str(handle.get_tls_username())


def _checks(handle: nbd.NBD) -> bool:
    """Whether libnbd checks certificates of servers without a name (CVE-2024-7383)."""
    version = tuple(int(number) for number in re.findall(r"\d+", handle.get_version())[:3])
    return version >= (1, 20, 3) or (1, 18, 5) <= version < (1, 19)


@contextmanager
def tls_credentials(uri: NbdUri) -> Iterator[TlsClient | None]:
    """How to speak TLS with the server of a URI, valid for the length of the block; None for a
    connection in clear.

    Libnbd before 1.20.3 checks nothing if it is told of no directory, so it always is. Raises
    UsageError, BackingError.
    """
    tls = tls_client(uri)
    if tls is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="nbdstream-") as own:
        if tls.psk_file:
            Path(own, _KEYS).symlink_to(tls.psk_file)
        elif tls.directory:
            if not Path(tls.directory, _AUTHORITY).exists():
                raise BackingError(f"{tls.directory}: there is no {_AUTHORITY} in it")
            yield tls
            return
        elif usual := _usual_directory():
            own = usual
        else:
            Path(own, _AUTHORITY).symlink_to(_system_bundle())
        yield replace(tls, directory=own)


def tls_client(uri: NbdUri) -> TlsClient | None:
    """What a URI says of TLS; None for a connection in clear. Raises UsageError."""
    given = {name: value for name, value in uri.parameters if name in _PARAMETERS}
    if not uri.tls:
        if given:
            raise UsageError(f"{uri}: {next(iter(given))} has a meaning with nbds:// only")
        return None
    if all(given.get(name) for name in _PATHS):
        raise UsageError(f"{uri}: give one of {' and '.join(_PATHS)}")
    verify = given.get("tls-verify-peer", "true")
    if verify not in _BOOLEANS:
        raise UsageError(f"{uri}: tls-verify-peer is true or false, not '{verify}'")
    host = uri.address.host or "localhost" if isinstance(uri.address, TcpAddress) else ""
    return TlsClient(
        given.get("tls-certificates", ""),
        given.get("tls-psk-file", ""),
        given.get("tls-hostname") or host,
        bool(given.get("tls-hostname")),
        _BOOLEANS[verify],
        uri.user,
    )


def anchored_tls(text: str, directory: Path) -> str:
    """An NBD URI whose relative paths of certificates and keys are taken from ``directory``."""
    if not any(f"{name}=" in text for name in _PATHS):
        return text
    uri = NbdUri.parse(text)
    parameters = tuple(
        (name, str(directory.absolute() / value) if name in _PATHS and value else value)
        for name, value in uri.parameters
    )
    return text if parameters == uri.parameters else str(replace(uri, parameters=parameters))


def _usual_directory() -> str:
    """The directory of certificates that libnbd uses by itself, "" if there is none."""
    places = map(os.path.expanduser, _OF_USER if os.geteuid() else _OF_ROOT)
    return next((place for place in places if Path(place, _AUTHORITY).exists()), "")


def _system_bundle() -> str:
    for bundle in _SYSTEM_BUNDLES:
        if Path(bundle).exists():
            return bundle
    raise BackingError(
        "this system has no file of certificate authorities (apt install ca-certificates): give "
        "tls-certificates"
    )
