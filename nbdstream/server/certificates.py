# SPDX-License-Identifier: Apache-2.0
"""The server's certificate and key for TLS, in files that may be replaced while it runs.

The files are QEMU's (docs/system/tls.rst of QEMU) and nbdkit's: ``server-cert.pem`` (with the
chain behind it), ``server-key.pem`` and, where clients have to show certificates,
``ca-cert.pem`` and perhaps ``ca-crl.pem``. They are looked at before each handshake, and read
again if they have changed. What cannot be read then leaves the former ones in use: a
certificate is often replaced a moment before its key.
"""

import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from nbdstream.errors import UsageError

log = logging.getLogger(__name__)

CERTIFICATE, KEY = "server-cert.pem", "server-key.pem"
AUTHORITIES, REVOKED = "ca-cert.pem", "ca-crl.pem"

# What tells one version of a file from the next: inode, time of change, size. None: no file.
_Version = tuple[int, int, int] | None


@dataclass(frozen=True)
class TlsPolicy:
    """How TLS is offered to clients.

    ``directory`` has the files. ``required``: nothing is served in clear. ``verify_peer``: a client
    has to show a certificate of the authorities.
    """

    directory: Path
    required: bool = True
    verify_peer: bool = False


class Certificates:
    """The files of a policy, as a context for handshakes that is always up to date."""

    def __init__(self, policy: TlsPolicy) -> None:
        """Raises UsageError if the files are not there or make no sense, in one line."""
        self.policy = policy
        self._versions = self._look()
        self._context = self._read()

    def context(self) -> ssl.SSLContext:
        """The context for the next handshake. Looks at files: for a worker thread."""
        versions = self._look()
        if versions != self._versions:
            self._versions = versions
            try:
                self._context = self._read()
                log.info("%s: new certificates are in use", self.policy.directory)
            except UsageError as error:
                log.warning("%s; the former certificates stay in use", error)
        return self._context

    def _look(self) -> list[_Version]:
        return [
            _version(self.policy.directory / name)
            for name in (CERTIFICATE, KEY, AUTHORITIES, REVOKED)
        ]

    def _read(self) -> ssl.SSLContext:
        policy = self.policy
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
        # Connections last. A resumed session would outlive the files and the revocation list.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        certificate, key = policy.directory / CERTIFICATE, policy.directory / KEY
        _check_readable(certificate, key)
        try:
            context.load_cert_chain(certificate, key, password=_no_password)
        except ssl.SSLError as error:
            raise UsageError(f"{certificate}, {key}: {_reason(error)}") from error
        if policy.verify_peer:
            self._demand_certificates(context)
        return context

    def _demand_certificates(self, context: ssl.SSLContext) -> None:
        authorities, revoked = (self.policy.directory / name for name in (AUTHORITIES, REVOKED))
        context.verify_mode = ssl.CERT_REQUIRED
        files = [authorities]
        if revoked.exists():
            files.append(revoked)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        _check_readable(*files)
        for file in files:
            try:
                context.load_verify_locations(file)
            except ssl.SSLError as error:
                raise UsageError(f"{file}: {_reason(error)}") from error


def _version(path: Path) -> _Version:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _check_readable(*paths: Path) -> None:
    """Raise UsageError where a file cannot be opened; OpenSSL does not say which one it is."""
    for path in paths:
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error


def _no_password() -> str:
    """Called for an encrypted key, about which OpenSSL would ask on the terminal."""
    raise UsageError("the server's key is encrypted: decrypt it (openssl pkey -in KEY -out KEY)")


def _reason(error: ssl.SSLError) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the key does not belong to the certificate"
    return f"not what OpenSSL can read as PEM ({error.reason or error.strerror})"
