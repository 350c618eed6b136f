# SPDX-License-Identifier: Apache-2.0
"""A real web server: nginx on loopback, in clear and with TLS, with what a test puts into its
configuration. A blocking context manager, as in `peers`."""

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from testbed.certificates import make_authority
from testbed.peers import READY_SECONDS, Peer, binary, started, temporary_directory
from testbed.processes import children
from testbed.remotes import answers, free_port

# The root user runs nginx's workers, too: images are in directories that are closed to others.
_CONFIG = """\
{user}
daemon off;
worker_processes 1;
pid {directory}/pid;
error_log stderr;
events {{ worker_connections 256; }}
http {{
    default_type application/octet-stream;
    log_format asked '$request_method $request_uri $status $body_bytes_sent $connection '
        '$server_protocol $server_port [$http_range] [$http_authorization] [$http_cookie]';
    access_log {directory}/access.log asked;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    sendfile on;
    keepalive_requests 100000;
    server {{
        listen 127.0.0.1:{port};
        listen 127.0.0.1:{other_port};
        listen 127.0.0.1:{tls_port} ssl http2;
        ssl_certificate {directory}/pki/server-cert.pem;
        ssl_certificate_key {directory}/pki/server-key.pem;
        root {root};
        {locations}
    }}
}}
"""
_LOGGED = re.compile(r"(\S+) (\S+) (\d+) (\d+) (\d+) (\S+) (\d+) \[(.*?)\] \[(.*?)\] \[(.*?)\]\n")


class Request(NamedTuple):
    """A request as nginx has logged it."""

    method: str
    path: str
    status: int
    sent: int
    connection: int
    protocol: str
    port: int
    range: str
    authorization: str
    cookie: str


@dataclass
class WebServer:
    """nginx. ``root`` has its files. It listens on ``port`` and ``other_port`` in clear, and with
    TLS on ``tls_port``, with a certificate of ``authority`` (a file)."""

    peer: Peer
    root: Path
    port: int
    other_port: int
    tls_port: int
    authority: Path
    log: Path
    config: Path

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def other_url(self, path: str) -> str:
        """The same by another port, which is another server to clients."""
        return f"http://127.0.0.1:{self.other_port}/{path}"

    def tls_url(self, path: str) -> str:
        return f"https://localhost:{self.tls_port}/{path}"

    def requests(self) -> list[Request]:
        """All requests that it has answered so far, oldest first."""
        found = _LOGGED.findall(self.log.read_text())
        return [
            Request(m, path, int(st), int(sent), int(conn), proto, int(port), *rest)
            for m, path, st, sent, conn, proto, port, *rest in found
        ]

    def reload(self) -> None:
        """Have nginx read its configuration again; returns when the new one is in use."""
        before = children(self.peer.pid)
        self.peer.process.send_signal(signal.SIGHUP)
        self.peer.wait_until(
            lambda: children(self.peer.pid).isdisjoint(before), "new workers", READY_SECONDS
        )


@contextlib.contextmanager
def nginx(root: Path, locations: str = "") -> Iterator[WebServer]:
    """nginx with the files of ``root``. In ``locations``, what is configured inside its server,
    ``$OTHER`` stands for its other port."""
    with temporary_directory() as directory:
        make_authority(directory / "pki").issue(directory / "pki", "server")
        port, other_port, tls_port = free_port(), free_port(), free_port()
        config = directory / "nginx.conf"
        config.write_text(
            _CONFIG.format(
                user="user root;" if os.geteuid() == 0 else "",
                directory=directory,
                root=root,
                port=port,
                other_port=other_port,
                tls_port=tls_port,
                locations=locations.replace("$OTHER", str(other_port)),
            )
        )
        command = [binary("NGINX"), "-c", str(config), "-p", str(directory), "-e", "stderr"]
        with started(command, directory) as peer:
            peer.wait_until(lambda: answers(port), "answer on its port", READY_SECONDS)
            authority = directory / "pki" / "ca-cert.pem"
            log = directory / "access.log"
            yield WebServer(peer, root, port, other_port, tls_port, authority, log, config)
