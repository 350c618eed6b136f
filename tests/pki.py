# SPDX-License-Identifier: Apache-2.0
"""Keys and certificates that a module of tests shares, and clients that go by them."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from nbdstream.server.certificates import Certificates, TlsPolicy
from testbed.certificates import Authority, make_authority
from tests.memory_export import MemoryExport

SIZE = 8 << 20


@dataclass(frozen=True)
class Pki:
    """``good`` belongs to the server and to a client that it knows."""

    directory: Path
    authority: Authority
    other: Authority

    def __getitem__(self, name: str) -> Path:
        return self.directory / name

    def certificates(self, *, required: bool = True, verify_peer: bool = False) -> Certificates:
        return Certificates(TlsPolicy(self["good"], required, verify_peer))

    def context(self, certificates: str = "") -> ssl.SSLContext:
        """What a client goes by; ``certificates``: the directory of its own."""
        context = ssl.create_default_context(cafile=self.authority.certificate)
        if certificates:
            own = self[certificates]
            context.load_cert_chain(own / "client-cert.pem", own / "client-key.pem")
        return context


def make_pki(directory: Path) -> Pki:
    """Files for everyone whom the tests need."""
    authority = make_authority(directory / "authority")
    other = make_authority(directory / "other")
    for end in ("server", "client"):
        authority.issue(directory / "good", end)
    other.issue(directory / "wrong", "client")
    authority.issue(directory / "expired", "client", expired=True)
    return Pki(directory, authority, other)


def disk() -> MemoryExport:
    """An export whose content differs from byte to byte."""
    export = MemoryExport(SIZE)
    export.data[:] = bytes(i * 7 % 251 for i in range(4096)) * (SIZE // 4096)
    return export
