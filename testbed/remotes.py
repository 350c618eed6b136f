# SPDX-License-Identifier: Apache-2.0
"""Far servers that are not NBD: object storage and SSH, each a real server on loopback.

Both are blocking context managers, as in `peers`.
"""

import contextlib
import getpass
import os
import pwd
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testbed.peers import READY_SECONDS, Peer, binary, run, started, temporary_directory

REGION = "us-east-1"


def free_port() -> int:
    """A TCP port of the loopback interface on which nothing listens at present."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class ObjectStore:
    """An S3 server. `environment` is what makes AWS clients, nbdkit's S3 plugin among them,
    use it."""

    endpoint: str
    environment: dict[str, str]

    def put(self, bucket: str, key: str = "", data: bytes = b"") -> None:
        """Make a bucket, or with `key` an object in it. Raises OSError."""
        url = f"{self.endpoint}/{bucket}/{key}" if key else f"{self.endpoint}/{bucket}"
        # The server takes the account from the signature's form and does not verify it.
        credential = f"key/20240101/{REGION}/s3/aws4_request"
        signature = f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders=host, Signature=0"
        request = urllib.request.Request(url, data=data, method="PUT")
        request.add_header("Authorization", signature)
        request.add_header("Content-Type", "application/octet-stream")
        with urllib.request.urlopen(request, timeout=READY_SECONDS):
            pass


@contextlib.contextmanager
def s3_server() -> Iterator[ObjectStore]:
    """moto's S3 server, empty, in a process of its own."""
    with temporary_directory() as directory:
        port = free_port()
        command = [binary("MOTO_SERVER"), "-H", "127.0.0.1", "-p", str(port)]
        endpoint = f"http://127.0.0.1:{port}"
        with started(command, directory) as peer:
            peer.wait_until(lambda: answers(port), "answer on its port", 3 * READY_SECONDS)
            settings = {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": REGION,
                "AWS_MAX_ATTEMPTS": "1",
            }
            yield ObjectStore(endpoint, settings)


def answers(port: int) -> bool:
    """Whether a server on this host accepts connections on a port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class SshServer:
    """An SSH server for the user that runs the tests.

    `client` is a `.ssh` directory with a key that the server accepts, and the server's own
    key among the known hosts. libssh takes that directory from the user database, whatever
    `$HOME` says: what has `prefix` before it sees `client` in its place.
    """

    peer: Peer
    port: int
    client: Path

    @property
    def prefix(self) -> list[str]:
        namespaces = ["unshare", "--mount"]
        if os.geteuid() != 0:
            namespaces += ["--user", "--map-current-user", "--keep-caps"]
        place = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".ssh"
        script = 'mkdir -p -m 700 "$1" && mount --bind "$0" "$1" && shift && exec "$@"'
        return [*namespaces, "sh", "-c", script, str(self.client), str(place)]

    def uri(self, path: Path) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}{path}"


@contextlib.contextmanager
def ssh_server() -> Iterator[SshServer]:
    """OpenSSH's sshd with keys and configuration of its own; SFTP only."""
    with temporary_directory() as directory:
        port, keys = free_port(), directory / "client"
        keys.mkdir(mode=0o700)
        for path in (directory / "host_key", keys / "id_ed25519"):
            run([binary("SSH_KEYGEN"), "-q", "-t", "ed25519", "-N", "", "-f", path])
        host_key = (directory / "host_key.pub").read_text()
        (keys / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
        (directory / "authorized_keys").write_text((keys / "id_ed25519.pub").read_text())
        settings = {
            "Port": port,
            "ListenAddress": "127.0.0.1",
            "HostKey": directory / "host_key",
            "AuthorizedKeysFile": directory / "authorized_keys",
            "PidFile": directory / "pid",
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
            "Subsystem": "sftp internal-sftp",
        }
        config = directory / "sshd_config"
        config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        if os.geteuid() == 0:  # where sshd drops its privileges
            Path("/run/sshd").mkdir(exist_ok=True)
        command = [binary("SSHD"), "-D", "-e", "-f", str(config)]
        with started(command, directory) as peer:
            peer.wait_until(lambda: answers(port), "answer on its port", READY_SECONDS)
            yield SshServer(peer, port, keys)
