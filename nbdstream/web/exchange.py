# SPDX-License-Identifier: Apache-2.0
"""One request for a range, and what may come as its answer.

The head is judged before a byte of the body is taken: a body that is not the range that was
asked for, of the image that it should be, never reaches the caller's buffer.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pycurl

from nbdstream.web.answers import PARTIAL, Answer, Validator
from nbdstream.web.errors import LinkError, ReplacedError, WebError
from nbdstream.web.settings import Settings
from nbdstream.web.transfers import Transfers

CONNECT_SECONDS = 20
# A transfer on which nothing comes for so long has failed.
SILENT_SECONDS = 30
# The body of a refusal is read up to this size, so that its connection can be used again.
CHATTER_MOST = 64 << 10

# CURLOPT_SUPPRESS_CONNECT_HEADERS, which pycurl has no name for: a proxy's answer is none of ours.
_SUPPRESS_CONNECT_HEADERS = 265
# Where other programs are told of certificates; libcurl itself asks none of them.
_AUTHORITIES = ("CURL_CA_BUNDLE", "SSL_CERT_FILE")


@dataclass(frozen=True)
class Pin:
    """The image as it was found: what every later answer has to agree with."""

    size: int
    validator: Validator
    host: str


@dataclass
class Exchange:
    """A request for ``view``'s length of bytes from ``offset``.

    ``name``: what messages begin with. ``received``: how many of the bytes have come. ``answer``:
    the head. ``pin``: what the image has to be, None where that is not known yet.
    """

    url: str
    name: str
    offset: int
    view: memoryview
    pin: Pin | None = None
    answer: Answer = field(default_factory=Answer)
    received: int = 0
    _chatter: int = 0
    _refusal: WebError | None = None

    def perform(self, transfers: Transfers, settings: Settings, user: str, password: str) -> None:
        """Send the request, and take the answer.

        Raises LinkError where none came or not all of it, ReplacedError, WebError.
        """
        easy = self._request(settings.of(self.url), user, password)
        try:
            transfers.perform(easy)
        except WebError as error:
            if self._refusal is None:
                raise type(error)(f"{self.name}{error}") from error
        if self._refusal is not None:
            raise self._refusal
        if self.answer.status == PARTIAL and self.received < len(self.view):
            raise LinkError(f"{self.name}the answer ended early")

    # -- asking ------------------------------------------------------------------------

    def _request(self, table: dict[str, Any], user: str, password: str) -> Any:
        easy = pycurl.Curl()
        easy.setopt(pycurl.URL, self.url.partition("#")[0])
        easy.setopt(pycurl.RANGE, f"{self.offset}-{self.offset + len(self.view) - 1}")
        easy.setopt(pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        easy.setopt(pycurl.NOSIGNAL, 1)
        easy.setopt(pycurl.CONNECTTIMEOUT, CONNECT_SECONDS)
        easy.setopt(pycurl.LOW_SPEED_LIMIT, 1)
        easy.setopt(pycurl.LOW_SPEED_TIME, SILENT_SECONDS)
        easy.setopt(pycurl.TCP_KEEPALIVE, 1)
        easy.setopt(pycurl.BUFFERSIZE, 128 << 10)
        easy.setopt(_SUPPRESS_CONNECT_HEADERS, 1)
        easy.setopt(pycurl.HEADERFUNCTION, self._take_head)
        easy.setopt(pycurl.WRITEFUNCTION, self._take_body)
        easy.setopt(pycurl.USERAGENT, table.get("user-agent", "nbdstream"))
        http2 = table.get("http2", True)
        version = pycurl.CURL_HTTP_VERSION_2TLS if http2 else pycurl.CURL_HTTP_VERSION_1_1
        easy.setopt(pycurl.HTTP_VERSION, version)
        easy.setopt(pycurl.PIPEWAIT, http2)
        headers = [*table.get("headers", []), *(self.pin.validator.condition() if self.pin else [])]
        easy.setopt(pycurl.HTTPHEADER, headers)
        _set_credentials(easy, table, user, password)
        _set_trust(easy, table)
        return easy

    # -- the answer, in the loop's thread ----------------------------------------------

    def _take_head(self, line: bytes) -> int:
        if self.answer.take(line):
            try:
                self._judge()
            except WebError as error:
                self._refusal = error
                return -1
        return len(line)

    def _judge(self) -> None:
        """Raise what is wrong with the head of a good answer."""
        answer, name = self.answer, self.name
        if answer.status == 200:
            raise WebError(
                f"{name}the server answers a request for a range with the whole file: it "
                "cannot be read in parts (copy it, or use another server)"
            )
        if answer.status != PARTIAL:
            return
        found = answer.content_range()
        wanted = (self.offset, self.offset + len(self.view) - 1)
        if found is None or found[0] != wanted[0] or found[1] > wanted[1]:
            said = answer.headers.get("content-range", "none")
            raise WebError(
                f"{name}asked for bytes {wanted[0]}-{wanted[1]}, answered with Content-Range {said}"
            )
        if self.pin is not None:
            require_same(name, self.pin, Pin(found[2], answer.validator(), ""))
        self.view = self.view[: found[1] + 1 - found[0]]

    def _take_body(self, data: bytes) -> int:
        if self.answer.status != PARTIAL:
            self._chatter += len(data)
            return len(data) if self._chatter <= CHATTER_MOST else -1
        end = self.received + len(data)
        if end > len(self.view):
            self._refusal = WebError(f"{self.name}more bytes came than were announced")
            return -1
        self.view[self.received : end] = data
        self.received = end
        return len(data)


def require_same(name: str, pin: Pin, found: Pin) -> None:
    """Check that an answer is of the same image. Raises ReplacedError if it is not."""
    if found.size != pin.size:
        raise ReplacedError(
            f"{name}the image was replaced: it had {pin.size} bytes, it has {found.size}"
        )
    if pin.validator.contradicts(found.validator):
        raise ReplacedError(
            f"{name}the image was replaced: it was {pin.validator}, it is {found.validator}"
        )


def shown(url: str) -> str:
    """A URL as it is shown: without user, query and fragment, which may grant access."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _set_credentials(easy: Any, table: dict[str, Any], user: str, password: str) -> None:
    if not user:
        user = table.get("user", "")
    if not password and "password-file" in table:
        password = _first_line(table["password-file"])
    if user:
        easy.setopt(pycurl.USERNAME, user)
        easy.setopt(pycurl.PASSWORD, password or table.get("password", ""))
    else:
        easy.setopt(pycurl.NETRC, pycurl.NETRC_OPTIONAL)
    # A file's name, even an empty one, has libcurl keep the cookies that servers set.
    easy.setopt(pycurl.COOKIEFILE, table.get("cookie-file", ""))
    if "cookie" in table:
        easy.setopt(pycurl.COOKIE, table["cookie"])


def _set_trust(easy: Any, table: dict[str, Any]) -> None:
    if not table.get("verify", True):
        easy.setopt(pycurl.SSL_VERIFYPEER, 0)
        easy.setopt(pycurl.SSL_VERIFYHOST, 0)
    named: Sequence[str] = [table.get("ca-file", ""), *map(os.environ.get, _AUTHORITIES)]  # type: ignore[list-item]
    if authorities := next(filter(None, named), ""):
        easy.setopt(pycurl.CAINFO, authorities)
    if "client-certificate" in table:
        easy.setopt(pycurl.SSLCERT, table["client-certificate"])
        easy.setopt(pycurl.SSLKEY, table.get("client-key", table["client-certificate"]))
    if "proxy" in table:
        easy.setopt(pycurl.PROXY, table["proxy"])


def _first_line(path: str) -> str:
    try:
        with open(path) as file:
            return file.readline().rstrip("\r\n")
    except OSError as error:
        raise WebError(f"{path}: {error.strerror}") from error
