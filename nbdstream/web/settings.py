# SPDX-License-Identifier: Apache-2.0
"""The user's file of settings for web servers: credentials, headers, certificates, proxies.

A TOML file with a table for each place, which is the beginning of a URL:

    ["https://images.example/private/"]
    headers = ["Authorization: Bearer 0123"]

What a table says holds for URLs that begin so, and is sent nowhere else: not to where a
redirect leads, unless a table of its own says so. Where several fit, each key is taken from
the longest one.
"""

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nbdstream.web.errors import SettingsError

# Names the file. Otherwise it is the first of the usual ones that is there.
VARIABLE = "NBDSTREAM_HTTP"
_USUAL = ("~/.config/nbdstream/http.toml", "/etc/nbdstream/http.toml")

_WORDS = ("user", "password", "password-file", "cookie", "cookie-file", "proxy", "user-agent")
_FILES = ("password-file", "cookie-file", "ca-file", "client-certificate", "client-key")
_KINDS: dict[str, type] = {
    **dict.fromkeys((*_WORDS, *_FILES), str),
    "headers": list,
    "verify": bool,
    "http2": bool,
    "connections": int,
}


@dataclass(frozen=True)
class Settings:
    """All tables of a file: what begins a URL, and the keys for it, the longest first."""

    path: str = ""
    tables: list[tuple[str, dict[str, Any]]] = field(default_factory=list, repr=False)

    def of(self, url: str) -> dict[str, Any]:
        """The keys that hold for a URL."""
        merged: dict[str, Any] = {}
        for place, table in self.tables:
            if _begins(url, place):
                merged = table | merged
        return merged

    def files(self) -> list[str]:
        """The file itself and all that it names."""
        named = [table[key] for _, table in self.tables for key in _FILES if key in table]
        return [self.path, *named] if self.path else []


def settings_path() -> str:
    """Where the user's file is, "" if there is none."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return named and str(Path(named).absolute())
    home = os.environ.get("XDG_CONFIG_HOME")
    usual = ([f"{home}/nbdstream/http.toml"] if home else []) + list(_USUAL)
    places = map(os.path.expanduser, usual)
    return next((place for place in places if Path(place).is_file()), "")


def load(path: str) -> Settings:
    """Read a file of settings; "" is an empty one. Raises SettingsError, in one line."""
    if not path:
        return Settings()
    try:
        content = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # neither UTF-8 nor TOML
        raise SettingsError(f"{path}: not TOML: {error}") from error
    tables = [(place, _table(path, place, table)) for place, table in content.items()]
    return Settings(path, sorted(tables, key=lambda item: len(item[0]), reverse=True))


def _table(path: str, place: str, table: object) -> dict[str, Any]:
    parts = urlsplit(place)
    if not isinstance(table, dict) or parts.scheme not in ("http", "https") or not parts.netloc:
        raise SettingsError(f'{path}: wanted: a table for each place, ["https://HOST/PATH"]')
    if "@" in parts.netloc:
        raise SettingsError(f"{path}: the user of {parts.hostname} goes in the key 'user'")
    for key, value in table.items():
        kind = _KINDS.get(key)
        if kind is None:
            raise SettingsError(f"{path}: there is no key '{key}'; known: {', '.join(_KINDS)}")
        fits = type(value) is kind
        if isinstance(value, list):
            fits = fits and all(map(_is_header, value))
        if not fits:
            raise SettingsError(f"{path}: '{key}' is {_SAID[kind]}")
    files = {key: _anchored(path, table[key]) for key in _FILES if key in table}
    return table | files


_SAID = {
    str: "a string",
    bool: "true or false",
    int: "a number",
    list: 'a list of headers such as "Name: value"',
}


def _is_header(text: object) -> bool:
    if not isinstance(text, str) or "\n" in text or "\r" in text:
        return False
    name, colon, _ = text.partition(":")
    return bool(colon) and bool(name) and name.isascii() and " " not in name


def _anchored(path: str, name: str) -> str:
    """A file that is named in a file: a relative path begins there."""
    return str(Path(path).parent / Path(name).expanduser())


def _begins(url: str, place: str) -> bool:
    """Whether a URL is at a place: the same scheme, host and port, and a path below."""
    wanted, found = urlsplit(place), urlsplit(url)
    if (wanted.scheme, _authority(place)) != (found.scheme, _authority(url)):
        return False
    above = wanted.path.rstrip("/")
    return found.path == wanted.path or not above or found.path.startswith(f"{above}/")


def _authority(url: str) -> tuple[str | None, int]:
    parts = urlsplit(url)
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
