# SPDX-License-Identifier: Apache-2.0
"""The metrics' HTTP server: any request.

Never raises: every answer is one response of HTTP/1.1 with the length that it says.
"""

from collections.abc import Iterator

from fuzz.export import finished
from fuzz.target import Target
from nbdstream.control.web import Page, _answer


class ReadyPage(Page):
    """One that is there at once, without an event loop."""

    def __init__(self) -> None:
        self.content_type = "text/plain"

    async def take(self) -> bytes:
        return b"metric 1\n"


PAGES: dict[str, Page] = {"/metrics": ReadyPage(), "/": ReadyPage()}
STATUS = {b"200", b"400", b"404", b"405"}


def run(data: bytes) -> object:
    response = finished(_answer(data, PAGES))
    head, end, body = response.partition(b"\r\n\r\n")
    assert end
    status, *lines = head.split(b"\r\n")
    protocol, code, _ = status.split(b" ", 2)
    assert protocol == b"HTTP/1.1" and code in STATUS
    headers = dict(line.split(b": ", 1) for line in lines)
    if data.startswith(b"HEAD ") and code == b"200":
        assert not body
    else:
        assert len(body) == int(headers[b"Content-Length"])
    return response


def seeds() -> Iterator[bytes]:
    yield b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    yield b"HEAD /metrics?a=b HTTP/1.0\r\n\r\n"
    yield b"POST /metrics HTTP/1.1\r\n\r\nbody"
    yield b"GET / HTTP/1.1\r\n\r\n"


TARGET = Target("metrics", run, (), seeds)
