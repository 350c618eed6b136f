# SPDX-License-Identifier: Apache-2.0
"""A very small HTTP server: the metrics, and the live report.

It answers GET and HEAD of a few pages, one request a connection, and holds clients to a size and
a time; whatever else comes in gets the HTTP status for it. A page that cannot be made is answered
with 500 and logged; that disturbs nothing else.
"""

import logging
import math
from collections.abc import Awaitable, Callable, Mapping

import trio

from nbdstream.net.accept import Acceptor, Client, Episode
from nbdstream.net.address import parse_tcp
from nbdstream.net.listeners import Listener, listen_tcp

log = logging.getLogger(__name__)

REQUEST_LIMIT = 8192
"""Bytes that a request may have, headers included."""
REQUEST_SECONDS = 10.0
"""Time for a whole request and its answer."""
MAX_CLIENTS = 16
"""Connections at any time. One more waits for up to GRACE seconds, then takes the place of
the oldest."""
GRACE = 1.0
PAUSE = 0.05
"""Seconds between two answers with a page, however many clients ask."""


class Page:
    """Something that is made each time it is asked for.

    It takes about a millisecond, in which no guest is served, so there is a pause of `PAUSE`
    seconds between any two.
    """

    def __init__(self, content_type: str, make: Callable[[], Awaitable[bytes]]) -> None:
        self.content_type = content_type
        self._make = make
        self._turn = trio.Lock()
        self._next = -math.inf
        self._failures = Episode()

    async def take(self) -> bytes | None:
        """The page, or None if it cannot be had now; the log says why."""
        async with self._turn:
            await trio.sleep_until(self._next)
            self._next = trio.current_time() + PAUSE
            try:
                return await self._make()
            except Exception:
                if self._failures.begins():
                    log.exception("a page of the metrics' server cannot be made")
                return None


def listen_web(address: str) -> list[Listener]:
    """Open HOST:PORT, to be served later; no host means this host alone.

    Raises UsageError, OSError.
    """
    where = parse_tcp(address)
    return listen_tcp(where.host or "localhost", where.port)


async def serve_web(listeners: list[Listener], pages: Mapping[str, Page]) -> None:
    """Serve pages by their paths until cancelled; then close the listeners."""

    async def serve(client: Client) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(client.socket))
        try:
            with trio.move_on_after(REQUEST_SECONDS):
                async with stream:
                    head = await _read_head(stream)
                    await stream.send_all(await _answer(head, pages))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("a client of the metrics is gone")

    acceptor = Acceptor("metrics client", serve, limit=MAX_CLIENTS, grace=GRACE)
    async with trio.open_nursery() as clients:
        await acceptor.run(listeners, clients)


async def _read_head(stream: trio.SocketStream) -> bytes:
    """A request up to its empty line; whatever came if it ends or is too long before."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) <= REQUEST_LIMIT:
        data = await stream.receive_some()
        if not data:
            break
        head += data
    return head


async def _answer(head: bytes, pages: Mapping[str, Page]) -> bytes:
    """The response to a request (RFC 9112), which ends the connection."""
    words = head.partition(b"\r\n")[0].split(b" ")
    if b"\r\n\r\n" not in head or len(words) != 3 or not words[2].startswith(b"HTTP/1."):
        return _response("400 Bad Request", b"not an HTTP/1 request\n")
    method, target, _ = words
    page = pages.get(target.partition(b"?")[0].decode("latin-1"))
    if page is None:
        known = ", ".join(pages).encode()
        return _response("404 Not Found", b"see " + known + b"\n")
    if method not in (b"GET", b"HEAD"):
        return _response("405 Method Not Allowed", b"GET or HEAD\n")
    body = await page.take()
    if body is None:
        return _response("500 Internal Server Error", b"the server's log says why\n")
    return _response("200 OK", body, page.content_type, only_head=method == b"HEAD")


def _response(
    status: str, body: bytes, content_type: str = "text/plain", *, only_head: bool = False
) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nAllow: GET, HEAD\r\n"
        "X-Content-Type-Options: nosniff\r\nX-Frame-Options: DENY\r\nConnection: close\r\n\r\n"
    ).encode()
    return head if only_head else head + body
