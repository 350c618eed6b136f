# SPDX-License-Identifier: Apache-2.0
"""A web server that does what no real one can be told to do: cut bodies off, announce wrong ranges,
ask to be left alone. It also plays a proxy, and the start of a redirect."""

import contextlib
import http.server
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Liar:
    """How it behaves; all of it can be changed while it runs. It ignores conditions.

    ``etag``: the version that it names. ``cut_after``: bytes of a body after which the connection
    ends. ``busy``: statuses of the next answers, with ``retry_after``. ``content_range``: what the
    next answers say. ``most``: bytes of an answer. ``asked``: the heads of the requests so far.
    ``asked_while_quiet``: how many came sooner than the server had asked for.
    """

    role: Literal["serving", "redirecting", "proxy"]
    content: bytes = b""
    target: str = ""
    url: str = ""
    etag: str = '"one"'
    cut_after: int | None = None
    busy: list[int] = field(default_factory=list)
    retry_after: str = ""
    content_range: list[str] = field(default_factory=list)
    most: int | None = None
    asked: list[str] = field(default_factory=list)
    asked_while_quiet: int = 0
    quiet_until: float = 0.0

    @classmethod
    def serving(cls, content: bytes) -> "Liar":
        return cls("serving", content)

    @classmethod
    def redirecting(cls, target: str) -> "Liar":
        return cls("redirecting", target=target)

    @classmethod
    def proxy(cls) -> "Liar":
        return cls("proxy")


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    liar: Liar

    def do_GET(self) -> None:
        liar = self.liar
        liar.asked.append(f"{self.requestline}\n{self.headers}")
        liar.asked_while_quiet += time.monotonic() < liar.quiet_until
        if liar.role == "redirecting":
            self._head(302, {"Location": liar.target, "Content-Length": "0"})
        elif liar.busy:
            headers = {"Content-Length": "0"}
            if liar.retry_after:
                headers["Retry-After"] = liar.retry_after
                liar.quiet_until = time.monotonic() + float(liar.retry_after) - 0.05
            self._head(liar.busy.pop(0), headers)
        else:
            self._serve(liar)

    def _serve(self, liar: Liar) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        assert wanted
        first, last = int(wanted[1]), int(wanted[2])
        if liar.most is not None:
            last = min(last, first + liar.most - 1)
        body = liar.content[first : last + 1]
        said = f"bytes {first}-{last}/{len(liar.content)}"
        if liar.content_range:
            said = liar.content_range.pop(0)
        headers = {"Content-Length": str(len(body)), "ETag": liar.etag}
        self._head(206, headers | ({"Content-Range": said} if said else {}))
        self.wfile.write(body[: liar.cut_after])
        self.close_connection = liar.cut_after is not None and liar.cut_after < len(body)

    def do_CONNECT(self) -> None:
        self.liar.asked.append(self.requestline)
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as target:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\nX-Proxy: yes\r\n\r\n")
            back = threading.Thread(target=_carry, args=(target, self.connection))
            back.start()
            _carry(self.connection, target)
            back.join()
        self.close_connection = True

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients may go away at any point of a lie."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def liar(behaviour: Liar) -> Iterator[Liar]:
    """The server; its address is in ``url``."""
    handler = type("Handler", (_Handler,), {"liar": behaviour})
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        behaviour.url = f"http://127.0.0.1:{server.server_port}/image"
        yield behaviour
        server.shutdown()
        thread.join()
