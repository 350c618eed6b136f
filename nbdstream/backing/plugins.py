# SPDX-License-Identifier: Apache-2.0
"""nbdkit's plugins: which one reads which kind of URI, and how it is told.

What a plugin is told stands on its command line, which every user of the host can read. So
passwords go by a descriptor of their own (`SECRET`), and a plugin that cannot take one so is
not given any.
"""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from nbdstream.backing import confine
from nbdstream.backing.helper import SECRET_FD, STATE_FD, program
from nbdstream.backing.window import UNIT_LEAST
from nbdstream.errors import UsageError
from nbdstream.text import redacted, without_userinfo

# These plugins do one request at a time on each connection, each a round trip of its own,
# so it takes large requests on many connections to use a link.
DEAR_UNIT = 256 << 10
DEAR_CONNECTIONS = 8
# What a URI begins with that names a plugin of nbdkit's itself.
NBDKIT = "nbdkit:"
# How nbdkit is told to read a password from the helper's secret.
SECRET = f"+/dev/fd/{SECRET_FD}"

# Where nbdstream is, of which `nbdstream.web` runs in nbdkit's process.
_PACKAGE = Path(__file__).resolve().parent.parent
_WEB_SCRIPT = _PACKAGE / "web" / "script.py"
_CERTIFICATES = ("CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
_PROXIES = tuple(
    spelled
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    for spelled in (name, name.upper())
)


@dataclass(frozen=True)
class Told:
    """What a plugin is told: ``parameters`` on its command line, ``secret`` by a descriptor."""

    parameters: list[str]
    secret: str = field(default="", repr=False)


@dataclass(frozen=True)
class Plugin:
    """An nbdkit plugin: its name, the Debian package, how it is told of a URI.

    ``script``: it is written in Python. nbdkit starts such a plugin by becoming
    ``nbdkit python SCRIPT``, forgets the socket that it was given on the way, and listens on
    all interfaces instead; so that is what we start.
    ``filters``: nbdkit's filters above it. The ssh plugin never connects again by itself once
    its connection is lost; the retry filter opens it again.

    ``trees`` and ``environment``: what it needs of the user's home and environment (names that
    end in ``*``: all that begin so). ``runs``: it may run programs from these trees. ``files``:
    says what else it needs. ``stateful``: see `nbdstream.backing.helper.Launch`.
    """

    name: str
    package: str
    told: Callable[[str, SplitResult], Told]
    script: bool = False
    filters: tuple[str, ...] = ()
    unit_least: int = DEAR_UNIT
    connections: int = DEAR_CONNECTIONS
    trees: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    runs: bool = False
    files: Callable[[], list[str]] = list
    stateful: bool = False


def _settings_files() -> list[str]:
    """The user's file of settings for web servers, its directory (it may be replaced), and what it
    names. Raises UsageError."""
    # Deferred: a start that needs no web server does not wait for a parser of TOML.
    from nbdstream.web.errors import SettingsError
    from nbdstream.web.settings import load, settings_path

    try:
        files = load(settings_path()).files()
    except SettingsError as error:
        raise UsageError(str(error)) from error
    return [*files, *(str(Path(file).parent) for file in files[:1])]


def _web(uri: str, parts: SplitResult) -> Told:
    if not parts.hostname:
        raise UsageError(f"{redacted(uri)}: wanted: {parts.scheme}://HOST[:PORT]/PATH")
    from nbdstream.web.settings import settings_path  # deferred, as above

    told = {"url": uri, "settings": settings_path(), "state": STATE_FD}
    return Told([str(_WEB_SCRIPT), f"config=/dev/fd/{SECRET_FD}"], json.dumps(told))


def _curl(uri: str, parts: SplitResult) -> Told:
    parameters = [f"url={without_userinfo(uri)}", "protocols=ftp,ftps"]
    if parts.username:
        parameters.append(f"user={unquote(parts.username)}")
    return _with_password(parameters, parts)


def _ssh(uri: str, parts: SplitResult) -> Told:
    if not parts.hostname or not parts.path.strip("/"):
        raise UsageError(f"{redacted(uri)}: wanted: ssh://[USER@]HOST[:PORT]/PATH")
    parameters = [f"host={parts.hostname}", f"path={unquote(parts.path)}"]
    parameters += [f"user={unquote(parts.username)}"] if parts.username else []
    parameters += [f"port={parts.port}"] if parts.port else []
    return _with_password(parameters, parts)


def _with_password(parameters: list[str], parts: SplitResult) -> Told:
    if not parts.password:
        return Told(parameters)
    return Told([*parameters, f"password={SECRET}"], unquote(parts.password))


def _s3(uri: str, parts: SplitResult) -> Told:
    if "@" in parts.netloc:
        raise UsageError(
            f"{redacted(uri)}: S3's keys come from the environment (AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY) or from ~/.aws, not from the URI"
        )
    if not parts.netloc or not parts.path.strip("/"):
        raise UsageError(f"{redacted(uri)}: wanted: s3://BUCKET/KEY")
    parameters = [f"bucket={parts.netloc}", f"key={unquote(parts.path[1:])}"]
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    return Told(parameters + ([f"endpoint-url={endpoint}"] if endpoint else []))


def _file(uri: str, parts: SplitResult) -> Told:
    if parts.netloc not in ("", "localhost"):
        raise UsageError(f"{redacted(uri)}: a file of another host: wanted: file:///PATH")
    return Told([f"file={confine.IMAGE}"])


PLUGINS = {
    "file": Plugin("file", "nbdkit", _file, unit_least=UNIT_LEAST, connections=3),
    "ssh": Plugin(
        "ssh",
        "nbdkit",
        _ssh,
        filters=("retry",),
        trees=("~/.ssh",),
        environment=("SSH_AUTH_SOCK", "USER"),
    ),
    "s3": Plugin(
        "S3",
        "nbdkit-plugin-python python3-boto3",
        _s3,
        script=True,
        trees=("~/.aws", "~/.local/lib"),
        environment=("AWS_*", *_CERTIFICATES, *_PROXIES),
    ),
}
PLUGINS["sftp"] = PLUGINS["ssh"]
for _scheme in ("http", "https"):
    PLUGINS[_scheme] = Plugin(
        "python",
        "nbdkit-plugin-python python3-pycurl",
        _web,
        # It does as many requests at once as nbdkit has threads for a connection.
        connections=2,
        trees=(str(_PACKAGE), "~/.netrc"),
        files=_settings_files,
        environment=(*_CERTIFICATES, *_PROXIES),
        stateful=True,
    )
for _scheme in ("ftp", "ftps"):
    PLUGINS[_scheme] = Plugin("curl", "nbdkit", _curl, environment=(*_CERTIFICATES, *_PROXIES))


def named_plugin(uri: str) -> Plugin:
    """The plugin of ``nbdkit:PLUGIN?KEY=VALUE&...``, which the user has chosen.

    ``filter=NAME`` names a filter of nbdkit's, the one next to the client first; all other
    pairs are the plugin's (and the filters') parameters, percent-encoded.
    It may read whatever the user may read, and run programs: a shell script can be a plugin.
    Raises UsageError.
    """
    name, _, query = uri.removeprefix(NBDKIT).partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        pairs = [("", "")]
    if not name or not all(key for key, _ in pairs):
        raise UsageError(f"{redacted(uri)}: wanted: nbdkit:PLUGIN?KEY=VALUE&KEY=VALUE")
    parameters = [f"{key}={value}" for key, value in pairs if key != "filter"]
    return Plugin(
        unquote(name),
        f"nbdkit-plugin-{name}",
        lambda _uri, _parts: Told(parameters),
        filters=tuple(value for key, value in pairs if key == "filter"),
        trees=("/",),
        environment=("*",),
        runs=True,
    )


def has_plugin(name: str) -> bool:
    """Whether nbdkit can load a plugin (worker: runs nbdkit)."""
    nbdkit = program("nbdkit", "nbdkit")
    done = subprocess.run(
        [nbdkit, name, "--dump-plugin"], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    return done.returncode == 0


def script_of(name: str) -> str:
    """Where a plugin that is a script lies (worker: runs nbdkit)."""
    command = [program("nbdkit", "nbdkit"), "--dump-config"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    settings = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return str(Path(settings["plugindir"]) / f"nbdkit-{name}-plugin")


def split(uri: str) -> SplitResult:
    """A source's URI, taken apart. Raises UsageError where host or port make no sense."""
    try:
        parts = urlsplit(uri)
        _ = parts.port  # judged when it is asked for
    except ValueError as error:
        raise UsageError(f"{redacted(uri)}: its host or port makes no sense") from error
    return parts


def local_path(uri: str) -> str | None:
    """The path that a local source names, or None if it is not local."""
    if uri.startswith(NBDKIT):
        return None
    if "://" not in uri:
        return uri
    parts = split(uri)
    return unquote(parts.path) if parts.scheme == "file" else None
