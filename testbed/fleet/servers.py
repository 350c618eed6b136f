# SPDX-License-Identifier: Apache-2.0
"""The servers of a fleet, configured as docs/fleet.md prints it: nginx and SeaweedFS.

Each runs on a machine of `testbed.fleet.network` with a private /etc/nginx, /run, /srv and the
like. So the files are used as they are printed.
"""

import contextlib
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testbed.certificates import Authority
from testbed.fleet.network import Machine
from testbed.peers import READY_SECONDS, Peer, PeerError, binary, run, started
from testbed.processes import TOP, children

PAGE = TOP / "docs" / "fleet.md"
ORIGIN = "/etc/nginx/conf.d/images.conf"
RACK = "/etc/nginx/conf.d/rack.conf"
SNIPPET = "/etc/nginx/snippets/image-slices.conf"
S3 = "/etc/seaweedfs/s3.json"
_PRINTED = re.compile(
    r"^`(/etc/[^`]+)`(?:, for an? (\S+)[^\n]*)?:\n\n```\w+\n(.*?)^```$", re.S | re.M
)
# Places that a server has for itself.
_PRIVATE = ("/etc/nginx", "/var/lib/nginx", "/var/log/nginx", "/run", "/srv")
S3_PORT = 8333
WEED = Path(sys.executable).with_name("weed")
_PUBLISHER = "publisher:change-this"


def printed(path: str, variant: str = "") -> str:
    """A file that the page prints; ``variant``: the first word of what it is for."""
    for name, found, text in _PRINTED.findall(PAGE.read_text()):
        if name == path and found.startswith(variant):
            return str(text)
    raise LookupError(f"{PAGE} prints no {path} {variant}")


@dataclass
class Nginx:
    """A running nginx; ``root``: what it has in the place of /etc/nginx and the like."""

    machine: Machine
    peer: Peer
    root: Path

    def kill(self) -> None:
        """End it as a crash of the machine would."""
        workers = children(self.peer.pid)
        self.peer.kill()
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def log(self, name: str) -> list[tuple[str, int, int, str, str]]:
        """A log as the page has it: (client, status, bytes, range, the rest) of each line."""
        lines = (self.root / "var/log/nginx" / name).read_text()
        found = re.findall(r'^\S+ (\S+) "[^"]*" (\d+) (\d+) "([^"]*)" ?(.*)$', lines, re.M)
        return [(client, int(status), int(sent), *rest) for client, status, sent, *rest in found]


def tree(directory: Path, files: dict[str, str]) -> Path:
    """A root directory for an nginx: Debian's /etc/nginx without its sites, and these files."""
    for place in _PRIVATE:
        (directory / place[1:]).mkdir(parents=True, exist_ok=True)
    ours = directory / "etc/nginx"
    shutil.rmtree(ours)
    shutil.copytree("/etc/nginx", ours, symlinks=True)
    shutil.rmtree(ours / "sites-enabled")
    (ours / "sites-enabled").mkdir()
    for path, text in files.items():
        file = directory / path[1:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return directory


def _binds(root: Path) -> list[tuple[Path, str]]:
    binds = [(root / place[1:], place) for place in _PRIVATE]
    bundle = root / "etc/ssl/certs/ca-certificates.crt"
    return [*binds, (bundle, "/etc/ssl/certs/ca-certificates.crt")] if bundle.exists() else binds


def check(machine: Machine, root: Path) -> str:
    """`nginx -t` there: its words. Raises PeerError."""
    return run([*machine.enter(_binds(root)), "sh", "-c", f"{binary('NGINX')} -t 2>&1"])


@contextlib.contextmanager
def nginx(machine: Machine, root: Path) -> Iterator[Nginx]:
    """nginx on a machine, from the files of ``root`` (`tree`)."""
    command = [*machine.enter(_binds(root)), binary("NGINX"), "-g", "daemon off;"]
    (root / "output").mkdir(exist_ok=True)
    pid = root / "run/nginx.pid"
    pid.unlink(missing_ok=True)
    with started(command, root / "output") as peer:
        peer.wait_until(lambda: pid.exists() and pid.stat().st_size > 0, "pid file", READY_SECONDS)
        yield Nginx(machine, peer, root)


@contextlib.contextmanager
def https_origin(machine: Machine, directory: Path, authority: Authority) -> Iterator[Nginx]:
    """The page's origin, for the files in ``srv/images`` of its root."""
    root = tree(directory, {ORIGIN: printed(ORIGIN)})
    (root / "srv/images").mkdir()
    certificates = directory / "pki"
    authority.issue(certificates, "server", name="images.example")
    tls = root / "etc/nginx/tls"
    tls.mkdir()
    for ours, theirs in (("cert", "pem"), ("key", "key")):
        shutil.copy(certificates / f"server-{ours}.pem", tls / f"images.example.{theirs}")
    with nginx(machine, root) as server:
        yield server


@contextlib.contextmanager
def rack_cache(machine: Machine, directory: Path, authority: Path | None = None) -> Iterator[Nginx]:
    """The page's cache of a rack. ``authority``: a file with the certificate of who vouches for
    an origin with HTTPS; without it the origin is an S3-compatible store."""
    files = {SNIPPET: printed(SNIPPET), RACK: printed(RACK, "origin" if authority else "S3")}
    if authority is not None:
        files["/etc/ssl/certs/ca-certificates.crt"] = authority.read_text()
    with nginx(machine, tree(directory, files)) as server:
        yield server


@dataclass
class Seaweed:
    """A running SeaweedFS; ``root``: what it has in the place of /srv."""

    machine: Machine
    peer: Peer
    root: Path

    def put(self, path: str, file: Path | None = None, *, keys: bool = True) -> None:
        """Make a bucket, or put a file at BUCKET/KEY, as the page says. Raises PeerError."""
        signed = ["--aws-sigv4", "aws:amz:us-east-1:s3", "--user", _PUBLISHER] if keys else []
        signed += ["-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD"]
        body = ["-T", str(file)] if file else ["-X", "PUT"]
        url = f"http://{self.machine.address}:{S3_PORT}/{path}"
        run([*self.machine.enter(), "curl", "--fail", "-sS", *signed, *body, url])


@contextlib.contextmanager
def seaweed(machine: Machine, directory: Path) -> Iterator[Seaweed]:
    """SeaweedFS with the page's identities, and the bucket `images` in it."""
    root = tree(directory, {S3: printed(S3)})
    (root / "srv/weed").mkdir()
    command = [*machine.enter([(root / "srv", "/srv")]), str(WEED), "server"]
    command += [f"-ip={machine.address}", "-dir=/srv/weed", "-s3", f"-s3.config={root}{S3}"]
    (root / "output").mkdir()
    with started(command, root / "output") as peer:
        server = Seaweed(machine, peer, root)

        def ready() -> bool:
            try:
                server.put("images")
            except PeerError:
                return False
            return True

        peer.wait_until(ready, "bucket", 3 * READY_SECONDS)
        try:
            yield server
        finally:
            peer.kill()  # it takes more than ten seconds to end by itself
