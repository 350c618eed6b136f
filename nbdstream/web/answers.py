# SPDX-License-Identifier: Apache-2.0
"""What the headers of an answer say. No I/O.

Source: RFC 9110, sections 8.8 (validators), 10.2.3 (Retry-After), 13.1 (preconditions) and 14.4
(Content-Range).
"""

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

REDIRECTS = frozenset({301, 302, 303, 307, 308})
# What says that the request cannot be answered right now.
BUSY = frozenset({429, 503})
PARTIAL, PRECONDITION_FAILED, RANGE_NOT_SATISFIABLE = 206, 412, 416

_STATUS = re.compile(rb"HTTP/[0-9.]+ ([0-9]{3})[ ]?(.*)")
_RANGE = re.compile(r"bytes (?:([0-9]+)-([0-9]+)|\*)/([0-9]+|\*)")


@dataclass
class Answer:
    """The head of an answer; ``headers`` by their names in small letters."""

    status: int = 0
    reason: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The status as it is shown to users: ``404 Not Found``."""
        return f"{self.status} {self.reason}".strip()

    def take(self, line: bytes) -> bool:
        """Take a line of the head; whether it was the last one of the final answer."""
        started = _STATUS.match(line)
        if started:
            self.status, self.headers = int(started[1]), {}
            self.reason = started[2].decode("latin-1").strip()
            return False
        text = line.decode("latin-1").strip()
        if not text:
            return self.status >= 200  # others announce an answer that follows
        name, _, value = text.partition(":")
        self.headers[name.strip().lower()] = value.strip()
        return False

    def content_range(self) -> tuple[int, int, int] | None:
        """The (first, last, total) of the bytes that follow; None where that is not said."""
        found = _RANGE.fullmatch(self.headers.get("content-range", ""))
        if found is None or found[1] is None or found[3] == "*":
            return None
        first, last, total = int(found[1]), int(found[2]), int(found[3])
        return (first, last, total) if first <= last < total else None

    def validator(self) -> "Validator":
        return Validator(self.headers.get("etag", ""), self.headers.get("last-modified", ""))

    def retry_after(self, now: datetime | None = None) -> float | None:
        """The seconds after which the server wants to be asked again; None if it does not say."""
        value = self.headers.get("retry-after", "")
        if value.isdecimal():
            return float(value)
        try:
            at = parsedate_to_datetime(value)
        except ValueError:
            return None
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        return max(0.0, (at - (now or datetime.now(UTC))).total_seconds())


@dataclass(frozen=True)
class Validator:
    """What tells one version of an image from another: an entity tag, a date, or neither."""

    etag: str = ""
    modified: str = ""

    def __bool__(self) -> bool:
        return bool(self.etag or self.modified)

    def __str__(self) -> str:
        shown = [self.etag and f"ETag {self.etag}", self.modified and f"of {self.modified}"]
        return ", ".join(filter(None, shown)) or "no ETag, no date"

    def condition(self) -> list[str]:
        """The header with which a server refuses to send another version.

        ``If-Match`` takes strong tags only. A date that a server sends is good for
        ``If-Unmodified-Since``.
        """
        if self.etag and not self.etag.startswith("W/"):
            return [f"If-Match: {self.etag}"]
        return [f"If-Unmodified-Since: {self.modified}"] if self.modified else []

    def contradicts(self, other: "Validator") -> bool:
        """Whether the two are of different versions for certain. Tags decide; where one of them
        has none, dates do."""
        if self.etag and other.etag:
            return _opaque(self.etag) != _opaque(other.etag)
        return bool(self.modified and other.modified) and self.modified != other.modified

    def confirms(self, other: "Validator") -> bool:
        """Whether two servers have the same version for certain: each makes up tags of its own,
        but dates go along with files."""
        same_tag = bool(self.etag) and self.etag == other.etag
        return same_tag or (bool(self.modified) and self.modified == other.modified)


def _opaque(etag: str) -> str:
    return etag.removeprefix("W/")
