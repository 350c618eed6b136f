# SPDX-License-Identifier: Apache-2.0
"""Words from elsewhere, made fit to be shown: no control characters, no secrets.

Names in images, URIs, servers' messages and helpers' complaints were written by strangers. On a
terminal, control characters in them would move the cursor, change the title or hide text; in
a log, a line break would forge an entry. And a URI that a user typed may hold a password.
Both are dealt with where text leaves the program (`nbdstream.cli.output`, the log's formatter),
so that no message has to think of it.
"""

import re
import unicodedata
from urllib.parse import urlsplit, urlunsplit

# What stands for a secret.
HIDDEN = "***"

# Control characters (Cc) and what changes the direction or the joining of others (Cf), line
# and paragraph separators, lone surrogates, private use.
_UNFIT = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co"}
# A URI with an authority, or one that names an nbdkit plugin, as it stands in a message.
_URI = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*://|\bnbdkit:)[^\s\"'<>]+")
# The userinfo is all up to the last @ before the path.
_USERINFO = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*://)([^/?#\s]*)@")
# Names of parameters that grant access, in signed URLs of S3, GCS, Azure and others.
_SECRET_NAME = re.compile(
    r"sig$|signature|token|secret|passw|^pw$|pwd|credential|api-?_?key|access-?_?key|^key$|auth|"
    r"session|^code$|policy",
    re.I,
)


def printable(text: str, *, keep: str = "") -> str:
    """Text with whatever a terminal could take for a command written as an escape (``\\x1b``).

    ``keep``: characters that stay as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character in keep or unicodedata.category(character) not in _UNFIT
        else character.encode("unicode_escape", "backslashreplace").decode("ascii")
        for character in text
    )


def redacted(uri: str) -> str:
    """A URI without its password and without the values of parameters that grant access.

    Idempotent. What is not a URI stays as it is.
    """
    if "://" not in uri and "nbdkit:" not in uri:
        return uri
    uri = _USERINFO.sub(_without_password, uri)
    head, mark, query = uri.partition("?")
    if not mark or head.startswith(("nbd:", "nbds:", "nbd+", "nbds+")):
        return uri
    query, hash_mark, fragment = query.partition("#")
    pairs = [_without_value(pair) for pair in query.split("&")]
    return f"{head}?{'&'.join(pairs)}{hash_mark}{fragment}"


def redacted_text(text: str) -> str:
    """Text in which each URI is `redacted`."""
    return _URI.sub(lambda found: redacted(found[0]), text) if ":" in text else text


def shown(text: str, *, keep: str = "") -> str:
    """Text as it may be shown or logged: `redacted_text`, and `printable`."""
    return printable(redacted_text(text), keep=keep)


def has_hidden(uri: str) -> bool:
    """Whether a URI lacks a secret, because it is the record of one that had it."""
    found = _USERINFO.match(uri)
    in_userinfo = found is not None and found[2].endswith(f":{HIDDEN}")
    return in_userinfo or f"={HIDDEN}" in uri.partition("?")[2]


def without_userinfo(uri: str) -> str:
    """A URI without user and password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _without_password(found: re.Match[str]) -> str:
    user, colon, _ = found[2].partition(":")
    return f"{found[1]}{user}{colon and f':{HIDDEN}'}@"


def _without_value(pair: str) -> str:
    name, equals, value = pair.partition("=")
    return f"{name}={HIDDEN}" if equals and value and _SECRET_NAME.search(name) else pair
