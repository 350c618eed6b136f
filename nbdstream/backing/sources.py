# SPDX-License-Identifier: Apache-2.0
"""From what a user writes after ``-b`` to an open backing.

libnbd reads the NBD schemes by itself. For everything else a helper process
(`nbdstream.backing.helper`) turns the source into an NBD export: nbdkit's plugins for
where an image is, qemu-nbd for what format it has, one on top of the other where both
are asked for (``qcow2+https://…``). What can be named is what is installed.
"""

import json
import logging
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

import trio

from nbdstream.backing.connect import Endpoint, connect
from nbdstream.backing.connection import Connection
from nbdstream.backing.helper import Helper, program, run_helper
from nbdstream.backing.nbd import NbdBacking, open_nbd
from nbdstream.backing.window import UNIT_LEAST
from nbdstream.errors import BackingError, BackingGoneError, UsageError

log = logging.getLogger(__name__)

NBD_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock")
# URI prefix and QEMU's name of each image format that a backing may have.
FORMATS = {name: name for name in ("qcow2", "qed", "qcow", "vmdk", "vdi", "vhdx", "parallels")}
FORMATS["vpc"] = FORMATS["vhd"] = "vpc"
# These plugins do one request at a time on each connection, each a round trip of its own,
# so it takes large requests on many connections to use a link.
DEAR_UNIT = 256 << 10
DEAR_CONNECTIONS = 8
# How long a failed helper may take to say why.
LAST_WORDS = 0.5


@dataclass(frozen=True)
class _Plugin:
    """An nbdkit plugin: its name, the Debian package, how it is told of a URI.

    ``script``: it is written in Python. nbdkit starts such a plugin by becoming
    ``nbdkit python SCRIPT``, forgets the socket that it was given on the way, and listens on
    all interfaces instead; so that is what we start.
    ``filters``: nbdkit's filters above it. The ssh plugin never connects again by itself once
    its connection is lost; the retry filter opens it again.
    """

    name: str
    package: str
    parameters: Callable[[str, SplitResult], list[str]]
    script: bool = False
    filters: tuple[str, ...] = ()
    unit_least: int = DEAR_UNIT
    connections: int = DEAR_CONNECTIONS


def _curl(uri: str, _parts: SplitResult) -> list[str]:
    return [f"url={uri}"]


def _ssh(uri: str, parts: SplitResult) -> list[str]:
    if not parts.hostname or not parts.path.strip("/"):
        raise UsageError(f"{uri}: wanted: ssh://[USER@]HOST[:PORT]/PATH")
    parameters = [f"host={parts.hostname}", f"path={unquote(parts.path)}"]
    parameters += [f"user={unquote(parts.username)}"] if parts.username else []
    parameters += [f"port={parts.port}"] if parts.port else []
    return parameters


def _s3(uri: str, parts: SplitResult) -> list[str]:
    if not parts.netloc or not parts.path.strip("/"):
        raise UsageError(f"{uri}: wanted: s3://BUCKET/KEY")
    parameters = [f"bucket={parts.netloc}", f"key={unquote(parts.path[1:])}"]
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    return parameters + ([f"endpoint-url={endpoint}"] if endpoint else [])


def _file(uri: str, parts: SplitResult) -> list[str]:
    if parts.netloc not in ("", "localhost"):
        raise UsageError(f"{uri}: a file of another host: wanted: file:///PATH")
    return [f"file={_existing(unquote(parts.path))}"]


PLUGINS = {
    "file": _Plugin("file", "nbdkit", _file, unit_least=UNIT_LEAST, connections=3),
    "http": _Plugin("curl", "nbdkit", _curl),
    "https": _Plugin("curl", "nbdkit", _curl),
    "ftp": _Plugin("curl", "nbdkit", _curl),
    "ftps": _Plugin("curl", "nbdkit", _curl),
    "ssh": _Plugin("ssh", "nbdkit", _ssh, filters=("retry",)),
    "sftp": _Plugin("ssh", "nbdkit", _ssh, filters=("retry",)),
    "s3": _Plugin("S3", "nbdkit-plugin-python python3-boto3", _s3, script=True),
}


@dataclass(frozen=True)
class _Served:
    """A source served over NBD; ``helper`` is the last process on the way, if any."""

    endpoint: Endpoint
    helper: Helper | None = None


@asynccontextmanager
async def open_backing(
    uri: str,
    *,
    timeout: float | None = None,  # noqa: ASYNC109
    size: int = 0,
    identity: str = "",
) -> AsyncIterator[NbdBacking]:
    """Open the backing that a URI names; it is closed at the end of the block.

    ``timeout``: seconds for which reads wait for a lost backing; None is for ever.
    ``size`` and ``identity`` (see `nbdstream.backing.identity`), where known: what it has
    to be. With both of them a backing that is out of reach is no error: it opens
    disconnected, and its reads wait.

    Raises:
        UsageError: not a URI of a kind that is known.
        BackingGoneError: nothing answers there.
        BackingMismatchError: not of that size or identity.
        BackingError: anything else that is wrong, in one line.
    """
    uri = anchored(uri, Path.cwd())  # the leaf will be opened from other directories
    async with _serve(uri) as served:
        first: Connection | None = None
        try:
            first = await _first_connection(uri, served)
        except BackingGoneError as error:
            if not (size and identity):
                raise
            log.warning("%s; going on with what is local", error)
        async with open_nbd(
            served.endpoint, first, timeout=timeout, size=size, identity=identity
        ) as backing:
            yield backing


def anchored(uri: str, directory: Path) -> str:
    """A backing's URI; a relative path in it is taken from ``directory``."""
    prefix, _, rest = uri.partition("+")
    if rest and prefix in FORMATS:
        return f"{prefix}+{anchored(rest, directory)}"
    if "://" in uri or urlsplit(uri).scheme in NBD_SCHEMES:
        return uri
    return str(directory.absolute() / uri)


def named_by_image(image: str, name: str, image_format: str) -> str:
    """The URI of the backing that an image names, by QEMU's rules: a relative path is taken
    from where the image is, and ``image_format`` says how to read what is found.

    Raises UsageError where that is not said (never guessed: a guest can write any magic
    number to a raw disk), or is no format that is known.
    """
    uri = anchored(name, Path(image).parent)
    if image_format == "raw":
        return uri
    if image_format in FORMATS.values():
        return f"{image_format}+{uri}"
    what = f"has the unknown format {image_format}" if image_format else "has no format recorded"
    raise UsageError(f"{image}: the backing {name} {what}: name it with -b (qcow2+{name}, say)")


def recorded_by_image(uri: str) -> tuple[str, str]:
    """How an image names this backing so that QEMU understands it: name and format.

    The opposite of `named_by_image`: ``qcow2+nbd://host`` is ``nbd://host``, a qcow2 image.
    """
    prefix, _, rest = uri.partition("+")
    if rest and prefix in FORMATS:
        return rest, FORMATS[prefix]
    return uri, "raw"


async def _first_connection(uri: str, served: _Served) -> Connection:
    """Connect; a helper's own words say best why that failed. Raises BackingError."""
    helper = served.helper
    if helper is None:
        return await connect(served.endpoint)
    outcome: Connection | BackingError | None = None

    async def attempt(nursery: trio.Nursery) -> None:
        nonlocal outcome
        try:
            outcome = await connect(served.endpoint)
        except BackingError as error:
            outcome = error
            # What the helper has to say of it is on its way to us.
            with trio.move_on_after(LAST_WORDS):
                await helper.spoke.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt, nursery)
        await helper.died.wait()
        nursery.cancel_scope.cancel()
    if isinstance(outcome, Connection):
        return outcome
    words = helper.words or str(outcome or "the helper process ended")
    raise BackingGoneError(f"{uri}: {words}")


def _serve(uri: str) -> AbstractAsyncContextManager[_Served]:
    """Have a source served over NBD for the length of the block."""
    scheme = urlsplit(uri).scheme
    if scheme in NBD_SCHEMES:
        return _serve_as_is(uri)
    prefix, _, rest = uri.partition("+")
    if rest and prefix in FORMATS:
        return _serve_format(uri, FORMATS[prefix], rest)
    source = uri
    if "://" not in uri:
        source, scheme = Path(uri).absolute().as_uri(), "file"
    plugin = PLUGINS.get(scheme)
    if plugin is None:
        raise UsageError(f"{uri}: unknown kind of backing; known: {', '.join(known_kinds())}")
    return _serve_plugin(uri, source, plugin)


@asynccontextmanager
async def _serve_as_is(uri: str) -> AsyncIterator[_Served]:
    yield _Served(Endpoint(uri, uri))


@asynccontextmanager
async def _serve_plugin(uri: str, source: str, plugin: _Plugin) -> AsyncIterator[_Served]:
    """nbdkit with the plugin on ``source``. Raises BackingError if that is not installed."""
    parameters = plugin.parameters(source, urlsplit(source))
    nbdkit = program("nbdkit", "nbdkit")
    if not await trio.to_thread.run_sync(has_plugin, plugin.name):
        raise BackingError(
            f"{uri}: nbdkit has no working {plugin.name} plugin (apt install {plugin.package})"
        )
    kind = [plugin.name]
    if plugin.script:
        kind = ["python", await trio.to_thread.run_sync(_script_of, plugin.name)]
    filters = [f"--filter={name}" for name in plugin.filters]
    command = [nbdkit, "--foreground", "--readonly", *filters, *kind, *parameters]
    async with run_helper(command) as helper:
        yield _Served(Endpoint(helper.uri, uri, plugin.unit_least, plugin.connections), helper)


@asynccontextmanager
async def _serve_format(uri: str, image_format: str, inner: str) -> AsyncIterator[_Served]:
    """qemu-nbd on what ``inner`` names: a file itself, anything else by way of NBD."""
    qemu_nbd = program("qemu-nbd", "qemu-utils")
    command = [qemu_nbd, "--read-only", "--persistent", "--shared=0", "--format", image_format]
    path = _local_path(inner)
    if path is not None:
        async with run_helper([*command, _existing(path)]) as helper:
            yield _Served(Endpoint(helper.uri, uri), helper)
        return
    async with _serve(inner) as served:
        await _refuse_backing_file(uri, image_format, served.endpoint.uri)
        async with run_helper([*command, served.endpoint.uri]) as helper:
            yield _Served(replace(served.endpoint, uri=helper.uri, name=uri), helper)


async def _refuse_backing_file(uri: str, image_format: str, nbd_uri: str) -> None:
    """An image from elsewhere must not name files of this machine as parts of itself.

    Raises BackingError if it does, or if it cannot be read.
    """
    qemu_img = program("qemu-img", "qemu-utils")
    command = [qemu_img, "info", "--output=json", "-f", image_format, nbd_uri]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().removeprefix("qemu-img: ")
        raise BackingError(f"{uri}: {words.replace(nbd_uri, 'it')}")
    named = json.loads(done.stdout).get("backing-filename")
    if named:
        raise BackingError(f"{uri}: the image has a backing file of its own ({named}): flatten it")


def _local_path(uri: str) -> str | None:
    """The path that a local source names, or None if it is not local."""
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    return unquote(parts.path) if parts.scheme == "file" else None


def _existing(path: str) -> str:
    """The absolute path of a file that can be read. Raises BackingError if it cannot."""
    try:
        with open(path, "rb"):
            return str(Path(path).absolute())
    except OSError as error:
        raise BackingError(f"{path}: {error.strerror}") from error


def has_plugin(name: str) -> bool:
    """Whether nbdkit can load a plugin (worker: runs nbdkit)."""
    nbdkit = program("nbdkit", "nbdkit")
    done = subprocess.run(
        [nbdkit, name, "--dump-plugin"], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    return done.returncode == 0


def _script_of(name: str) -> str:
    """Where a plugin that is a script lies (worker: runs nbdkit)."""
    command = [program("nbdkit", "nbdkit"), "--dump-config"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    settings = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return str(Path(settings["plugindir"]) / f"nbdkit-{name}-plugin")


def known_kinds() -> list[str]:
    """Every kind of backing that can be opened here (worker: runs nbdkit)."""
    usable = set(filter(has_plugin, {plugin.name for plugin in PLUGINS.values()}))
    schemes = [scheme for scheme, plugin in PLUGINS.items() if plugin.name in usable]
    formats = [f"{name}+..." for name in FORMATS]
    return [*(f"{scheme}://" for scheme in (*NBD_SCHEMES, *schemes)), "a file's path", *formats]
