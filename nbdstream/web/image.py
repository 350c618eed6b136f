# SPDX-License-Identifier: Apache-2.0
"""One image on a web server: where redirects lead, that it stays the same, what is tried again.

**Redirects** are followed once, and what is read is asked for where they ended. When that place
no longer answers (a signed URL expires, a mirror goes away), they are followed again from the
start.

**The image is pinned** by what the first answer says of it: its size, and an entity tag or a
date. Each request carries it as a condition, and each answer is compared with it. Another image
is refused for good: half of one and half of another would be a broken disk. The pin outlives
this process (`Keeper`), so that a helper that is started again does not take what it finds.

**Tried again** here is what a moment cures: a connection that ended (from the byte that came
last), and a server that says when to come back. Everything else is reported; nbdstream tries
again later.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from nbdstream.web.answers import (
    BUSY,
    PARTIAL,
    PRECONDITION_FAILED,
    RANGE_NOT_SATISFIABLE,
    REDIRECTS,
    Validator,
)
from nbdstream.web.errors import REFUSES, WARNS, LinkError, ReplacedError, WebError
from nbdstream.web.exchange import Exchange, Pin, require_same, shown
from nbdstream.web.settings import load
from nbdstream.web.transfers import Transfers

REDIRECTS_MOST = 10
# How often one read has redirects followed again.
RENEWALS_MOST = 2
# The pauses before a request whose connection ended is sent again.
LINK_PAUSES = (0.0, 0.2, 1.0)
# A read waits so long for a server that asks to be left alone; then it fails, to be tried later.
QUIET_MOST = 60.0
# What a server answers at a place that was good once: the signature or the session is over.
_OVER = frozenset({401, 403, 404, 410})


@dataclass(frozen=True)
class _Place:
    """Where redirects ended."""

    url: str


class Keeper:
    """What has to outlive the process: the pin and why it was refused, in an open file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def load(self) -> tuple[Pin | None, str]:
        """What was kept last: the pin, if there is one, and the refusal, or ""."""
        text = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        if not text:
            return None, ""
        kept = json.loads(text)
        pin = Pin(kept["size"], Validator(kept["etag"], kept["modified"]), kept["host"])
        return pin, kept["refusal"]

    def keep(self, pin: Pin, refusal: str = "") -> None:
        kept = {"size": pin.size, "host": pin.host, "refusal": refusal}
        kept |= {"etag": pin.validator.etag, "modified": pin.validator.modified}
        text = json.dumps(kept).encode()
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text, 0)


class RemoteImage:
    """An image by its URL; all methods may be called from any thread."""

    def __init__(
        self, url: str, settings_file: str, transfers: Callable[[], Transfers], keeper: Keeper
    ) -> None:
        """Raises SettingsError. ``transfers``: what carries requests out, once there are any."""
        parts = urlsplit(url)
        userinfo, _, host = parts.netloc.rpartition("@")
        self.url = parts._replace(netloc=host).geturl()
        self._user, self._password = map(unquote, (userinfo + ":").split(":", 2)[:2])
        self._settings_file = settings_file
        self._settings_version = _version(settings_file)
        self._settings = load(settings_file)
        self._transfers = transfers
        self._keeper = keeper
        self._pin, self._refusal = keeper.load()
        self._lock = threading.Lock()
        self._place: _Place | None = None
        self._quiet_until = 0.0

    def ready(self) -> None:
        """Find the image, unless that was done. Raises WebError."""
        self._found()

    @property
    def size(self) -> int:
        """Bytes, once the image is `ready`."""
        assert self._pin is not None
        return self._pin.size

    @property
    def connections(self) -> int:
        """How many connections the user allows to the server; 0 for any number."""
        return int(self._settings.of(self.url).get("connections", 0))

    def read(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset``. Raises WebError."""
        position = renewals = 0
        place = self._found()
        while position < len(view):
            trouble: WebError
            try:
                exchange = self._ask(place.url, offset + position, view[position:], self._pin)
            except LinkError as error:
                trouble, renewable = error, place.url != self.url
            else:
                status = exchange.answer.status
                if status == PARTIAL:
                    position += exchange.received
                    continue
                if status in (PRECONDITION_FAILED, RANGE_NOT_SATISFIABLE):
                    raise self._refused(
                        f"{self._name(place.url)}the image was replaced: the server answers "
                        f"{exchange.answer.words} where it had {self._pin and self._pin.validator}"
                    )
                trouble = WebError(f"{self._name(place.url)}{exchange.answer.words}")
                renewable = status in REDIRECTS or (
                    status in _OVER and (self._settings_changed() or place.url != self.url)
                )
            if not renewable or renewals == RENEWALS_MOST:
                raise trouble
            renewals += 1
            place = self._renewed(place)

    # -- where it is -------------------------------------------------------------------

    def _found(self) -> _Place:
        with self._lock:
            if self._refusal:
                raise ReplacedError(self._refusal)
            if self._place is None:
                self._place = self._follow()
            return self._place

    def _renewed(self, stale: _Place) -> _Place:
        """Where the image is now that ``stale`` does not answer."""
        with self._lock:
            if self._place is stale:
                self._place = None
        return self._found()

    def _follow(self) -> _Place:
        """Follow redirects to the image, and pin it or compare it with the pin."""
        url = self.url
        for _ in range(REDIRECTS_MOST + 1):
            exchange = self._ask(url, 0, memoryview(bytearray(1)), None)
            answer = exchange.answer
            if answer.status == PARTIAL:
                self._compare(url, exchange)
                return _Place(url)
            if answer.status in _OVER and self._settings_changed():
                continue
            if answer.status == RANGE_NOT_SATISFIABLE:
                raise WebError(f"{self._name(url)}the file is empty, or the server has no ranges")
            if answer.status not in REDIRECTS or "location" not in answer.headers:
                raise WebError(f"{self._name(url)}{answer.words}")
            url = _next(url, answer.headers["location"])
        raise WebError(f"more than {REDIRECTS_MOST} redirects")

    def _compare(self, url: str, exchange: Exchange) -> None:
        """Pin what was found, or raise if it is not what is pinned."""
        span = exchange.answer.content_range()
        assert span is not None  # or the answer would not have been taken
        found = Pin(span[2], exchange.answer.validator(), urlsplit(url).netloc)
        pin = self._pin
        if pin is None:
            if not found.validator:
                tell(
                    WARNS,
                    f"{shown(url)}: the server sends neither ETag nor Last-Modified: if the image "
                    "is replaced while it is read, only another size shows it",
                )
        elif found.host == pin.host:
            try:
                require_same(self._name(url), pin, found)
            except ReplacedError as error:
                raise self._refused(str(error)) from error
        elif found.size != pin.size or not found.validator.confirms(pin.validator):
            raise WebError(
                f"{self._name(url)}{pin.host} had the image of {pin.size} bytes, {pin.validator}; "
                f"this server has another one, of {found.size} bytes, {found.validator}"
            )
        self._pin = found
        self._keeper.keep(found)

    def _refused(self, words: str) -> ReplacedError:
        """Refuse the image from now on; the error to raise."""
        if not self._refusal:
            self._refusal = words
            if self._pin is not None:
                self._keeper.keep(self._pin, words)
            tell(REFUSES, words)
        return ReplacedError(self._refusal)

    # -- requests ----------------------------------------------------------------------

    def _ask(self, url: str, offset: int, view: memoryview, pin: Pin | None) -> Exchange:
        """Send a request until it is answered, in part at least. Raises WebError."""
        pauses = iter(LINK_PAUSES)
        give_up = time.monotonic() + QUIET_MOST
        while True:
            self._keep_quiet(url, give_up)
            exchange = Exchange(url, self._name(url), offset, view, pin)
            ours = _origin(url) == _origin(self.url)
            user, password = (self._user, self._password) if ours else ("", "")
            try:
                exchange.perform(self._transfers(), self._settings, user, password)
            except ReplacedError as error:
                raise self._refused(str(error)) from error
            except LinkError:
                if exchange.received:
                    return exchange
                pause = next(pauses, None)
                if pause is None:
                    raise
                time.sleep(pause)
                continue
            answer = exchange.answer
            wait = answer.retry_after() if answer.status in BUSY else None
            if wait is None:
                return exchange
            self._quiet_until = max(self._quiet_until, time.monotonic() + wait)

    def _keep_quiet(self, url: str, give_up: float) -> None:
        """Wait for as long as the server has asked for. Raises WebError if that is too long."""
        while (now := time.monotonic()) < self._quiet_until:
            if self._quiet_until > give_up:
                raise WebError(
                    f"{self._name(url)}the server wants to be left alone for "
                    f"{self._quiet_until - now:.0f} s more"
                )
            time.sleep(self._quiet_until - now)

    def _name(self, url: str) -> str:
        """What a message about an answer begins with. That it is about the image goes without
        saying; where a redirect led does not."""
        return "" if url == self.url else f"{shown(url)}: "

    def _settings_changed(self) -> bool:
        """Read the user's settings again if the file has changed; whether it has."""
        version = _version(self._settings_file)
        if version == self._settings_version:
            return False
        self._settings_version = version
        try:
            self._settings = load(self._settings_file)
        except WebError as error:
            tell(WARNS, f"{error}; the former settings stay in use")
            return False
        return True


def tell(kind: str, words: str) -> None:
    """Tell nbdstream something: that it is refused, or a warning."""
    os.write(2, f"{kind}{words}\n".encode())


def _next(url: str, location: str) -> str:
    """Where a redirect leads. Raises WebError if it leads to another kind of source."""
    target = urljoin(url, location)
    here, there = urlsplit(url).scheme, urlsplit(target).scheme
    if there not in ("http", "https"):
        raise WebError(f"{shown(url)}: redirects to {there}://")
    if (here, there) == ("https", "http"):
        raise WebError(
            f"{shown(url)}: redirects to {shown(target)}, which is in clear: name that URL if it "
            "is good enough"
        )
    return target


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _version(path: str) -> tuple[int, int, int] | None:
    """What tells one version of a file from the next."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
