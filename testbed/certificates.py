# SPDX-License-Identifier: Apache-2.0
"""Certificates and pre-shared keys for tests, in QEMU's file layout, made by certtool.

A directory has ``ca-cert.pem`` and, for each end it is made for, ``server-cert.pem`` and
``server-key.pem`` or ``client-cert.pem`` and ``client-key.pem``.
"""

import secrets
from dataclasses import dataclass
from pathlib import Path

from testbed.peers import run

_EXPIRED = 'activation_date = "2001-01-01"\nexpiration_date = "2002-01-01"\n'
_VALID = "expiration_days = 2\n"


@dataclass(frozen=True)
class Authority:
    """A certificate authority whose files are in ``directory``."""

    directory: Path

    @property
    def certificate(self) -> Path:
        return self.directory / "ca-cert.pem"

    @property
    def key(self) -> Path:
        return self.directory / "ca-key.pem"

    def issue(
        self, directory: Path, end: str, *, name: str = "localhost", expired: bool = False
    ) -> Path:
        """Make a key and a certificate for ``end``, "server" or "client", in ``directory``."""
        directory.mkdir(exist_ok=True)
        directory.joinpath("ca-cert.pem").write_bytes(self.certificate.read_bytes())
        names = f'cn = "{name}"\n'
        if end == "server":
            names += f'dns_name = "{name}"\nip_address = "127.0.0.1"\n'
        terms = _EXPIRED if expired else _VALID
        key, certificate = directory / f"{end}-key.pem", directory / f"{end}-cert.pem"
        _make_key(key)
        template = _template(
            directory, f"{names}{terms}tls_www_{end}\nsigning_key\nencryption_key\n"
        )
        signer = [f"--load-ca-certificate={self.certificate}", f"--load-ca-privkey={self.key}"]
        _certtool(
            "--generate-certificate",
            f"--load-privkey={key}",
            *signer,
            f"--template={template}",
            f"--outfile={certificate}",
        )
        return directory

    def revoke(self, directory: Path, certificate: Path) -> None:
        """Put a list of revoked certificates, with this one in it, into ``directory``."""
        template = _template(directory, "crl_next_update = 2\ncrl_number = 1\n")
        _certtool(
            "--generate-crl",
            f"--load-ca-certificate={self.certificate}",
            f"--load-ca-privkey={self.key}",
            f"--load-certificate={certificate}",
            f"--template={template}",
            f"--outfile={directory / 'ca-crl.pem'}",
        )


def make_authority(directory: Path, name: str = "nbdstream tests") -> Authority:
    """A new certificate authority."""
    directory.mkdir(exist_ok=True)
    authority = Authority(directory)
    _make_key(authority.key)
    template = _template(
        directory, f'cn = "{name}"\nca\ncert_signing_key\ncrl_signing_key\n{_VALID}'
    )
    _certtool(
        "--generate-self-signed",
        f"--load-privkey={authority.key}",
        f"--template={template}",
        f"--outfile={authority.certificate}",
    )
    return authority


def make_psk_file(path: Path, *users: str) -> Path:
    """Keys for users, in psktool's format."""
    path.write_text("".join(f"{user}:{secrets.token_hex(32)}\n" for user in users))
    path.chmod(0o600)
    return path


def _make_key(path: Path) -> None:
    _certtool("--generate-privkey", "--key-type=ecdsa", "--curve=secp256r1", f"--outfile={path}")


def _template(directory: Path, text: str) -> Path:
    path = directory / "template"
    path.write_text(text)
    return path


def _certtool(*arguments: str) -> None:
    run(["certtool", *arguments])
