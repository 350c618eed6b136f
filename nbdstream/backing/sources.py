# SPDX-License-Identifier: Apache-2.0
"""From what a user writes after ``-b`` to an open backing.

libnbd reads the NBD schemes by itself. For everything else a helper process
(`nbdstream.backing.helper`) turns the source into an NBD export: nbdkit's plugins for
where an image is, qemu-nbd for what format it has, one on top of the other where both
are asked for (``qcow2+https://…``). A chain of images is each of them, and
qemu-storage-daemon on top. What can be named is what is installed.
"""

import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import trio

from nbdstream.backing.connect import Endpoint, connect
from nbdstream.backing.connection import Connection
from nbdstream.backing.formats import FORMATS, Node, chained, file_node, inspect, nbd_node
from nbdstream.backing.helper import LISTEN_FD, Helper, Launch, program, run_helper
from nbdstream.backing.nbd import NbdBacking, open_nbd
from nbdstream.backing.plugins import (
    NBDKIT,
    PLUGINS,
    Plugin,
    has_plugin,
    local_path,
    named_plugin,
    script_of,
    split,
)
from nbdstream.backing.sandbox import Policy, open_image, source_policy
from nbdstream.backing.tls import anchored_tls, tls_credentials
from nbdstream.errors import BackingError, BackingGoneError, UsageError
from nbdstream.net.address import NBD_SCHEMES, NbdUri
from nbdstream.tasks import in_worker, open_background_nursery
from nbdstream.text import has_hidden, redacted

log = logging.getLogger(__name__)

# Between the images of a chain, the top first.
CHAINED = " on "
# How long a failed helper may take to say why.
LAST_WORDS = 0.5


class BackingOpener(Protocol):
    """Opens the backing that a URI names, as `open_backing` does."""

    def __call__(
        self,
        uri: str,
        *,
        timeout: float | None = None,
        size: int = 0,
        identity: str = "",
    ) -> AbstractAsyncContextManager[NbdBacking]: ...


@dataclass(frozen=True)
class _Served:
    """A source served over NBD; ``helpers`` are the processes on the way, the last one first."""

    endpoint: Endpoint
    helpers: tuple[Helper, ...] = ()

    def words(self) -> str:
        """What the helpers last had to say; the one next to the source knows best. "" if none."""
        return next(filter(None, (helper.words for helper in reversed(self.helpers))), "")


@asynccontextmanager
async def open_backing(
    uri: str,
    *,
    timeout: float | None = None,  # noqa: ASYNC109
    size: int = 0,
    identity: str = "",
    later: bool = False,
) -> AsyncIterator[NbdBacking]:
    """Open the backing that a URI names; it is closed at the end of the block.

    ``timeout``: seconds for which reads wait for a lost backing; None is for ever.
    ``size`` and ``identity`` (see `nbdstream.backing.identity`), where known: what it has
    to be. With both of them a backing that is out of reach is no error: it opens
    disconnected, and its reads wait. ``later`` (with both of them): do not wait for a first
    connection at all. Whatever is wrong with the server is told to those who read.

    Raises:
        UsageError: not a URI of a kind that is known.
        BackingGoneError: nothing answers there.
        BackingMismatchError: not of that size or identity.
        BackingError: anything else that is wrong, in one line.
    """
    uri = anchored(uri, Path.cwd())  # the leaf will be opened from other directories
    if has_hidden(uri):
        raise UsageError(f"{uri}: a leaf does not record passwords and tokens: name it with -b")
    async with _serve(uri) as served:
        first: Connection | None = None
        try:
            if not later:
                first = await _first_connection(uri, served)
        except BackingGoneError as error:
            if not (size and identity):
                raise
            log.warning("%s; going on with what is local", error)
        async with open_nbd(
            served.endpoint, first, timeout=timeout, size=size, identity=identity
        ) as backing:
            if served.helpers:
                backing.sandbox = lambda: served.helpers[0].sandbox
                backing.words = served.words
            async with open_background_nursery() as nursery:
                for helper in served.helpers:
                    nursery.start_soon(_heed_refusal, helper, backing)
                yield backing


async def _heed_refusal(helper: Helper, backing: NbdBacking) -> None:
    """End the backing's reads once a helper refuses its source for good."""
    await helper.refused.wait()
    log.error("%s", helper.refusal)
    backing.refuse(helper.refusal)


def chain(uri: str) -> list[str]:
    """The images of a backing, the top first: ``IMAGE on IMAGE on IMAGE``.

    All but the last have a format, because a raw image has no backing. Otherwise it is the path
    of one file that has the word in its name. Raises UsageError.
    """
    images = uri.split(CHAINED)
    for image in images[:-1]:
        if _taken_apart(image)[0] == "raw":
            if "://" in uri:
                raise UsageError(
                    f"{redacted(image)}: only an image in a format (qcow2+..., say) is on another"
                )
            return [uri]
    return images


def anchored(uri: str, directory: Path) -> str:
    """A backing's URI; a relative path in it is taken from ``directory``."""
    images = chain(uri)
    if len(images) > 1:
        return CHAINED.join(anchored(image, directory) for image in images)
    prefix, _, rest = uri.partition("+")
    if rest and prefix in FORMATS:  # as it was written: vhd is not made vpc
        return f"{prefix}+{anchored(rest, directory)}"
    if split(uri).scheme in NBD_SCHEMES:
        return anchored_tls(uri, directory)
    if "://" in uri or uri.startswith(NBDKIT):
        return uri
    return str(directory.absolute() / uri)


def runs_program(uri: str) -> bool:
    """Whether a backing is read by a program that its URI chooses (``nbdkit:``). Such a URI is
    taken from the user only, never from a leaf: an image must not choose what is run."""
    return any(image.rpartition("+")[2].startswith(NBDKIT) for image in uri.split(CHAINED))


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
    image_format, source = _taken_apart(uri)
    # No image can name a chain in a way that QEMU understands.
    return (source, image_format) if len(chain(uri)) == 1 else (uri, "raw")


def _taken_apart(uri: str) -> tuple[str, str]:
    """Format and source of one image."""
    prefix, _, rest = uri.partition("+")
    if rest and prefix in FORMATS:
        return FORMATS[prefix], rest
    return "raw", uri


async def _first_connection(uri: str, served: _Served) -> Connection:
    """Connect; a helper's own words say best why that failed. Raises BackingError."""
    if not served.helpers:
        return await connect(served.endpoint)
    helper = served.helpers[0]
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
    words = served.words() or str(outcome or "the helper process ended")
    raise BackingGoneError(f"{redacted(uri)}: {words}")


def _serve(uri: str) -> AbstractAsyncContextManager[_Served]:
    """Have a source served over NBD for the length of the block."""
    images = chain(uri)
    if len(images) > 1:
        return _serve_chain(uri, images)
    scheme = split(uri).scheme
    if scheme in NBD_SCHEMES:
        return _serve_as_is(uri)
    image_format, inner = _taken_apart(uri)
    if image_format != "raw":
        return _serve_format(uri, image_format, inner)
    if uri.startswith(NBDKIT):
        return _serve_plugin(uri, uri, named_plugin(uri))
    source = uri
    if "://" not in uri:
        source, scheme = Path(uri).absolute().as_uri(), "file"
    plugin = PLUGINS.get(scheme)
    if plugin is None:
        raise UsageError(
            f"{redacted(uri)}: unknown kind of backing; known: {', '.join(known_kinds())}"
        )
    return _serve_plugin(uri, source, plugin)


@asynccontextmanager
async def _serve_as_is(uri: str) -> AsyncIterator[_Served]:
    with tls_credentials(NbdUri.parse(uri)) as tls:
        yield _Served(Endpoint(uri, redacted(uri), tls))


@asynccontextmanager
async def _serve_plugin(uri: str, source: str, plugin: Plugin) -> AsyncIterator[_Served]:
    """nbdkit with the plugin on ``source``. Raises BackingError if that is not installed."""
    told = plugin.told(source, split(source))
    nbdkit = program("nbdkit", "nbdkit")
    kind = [plugin.name]
    if plugin.script:
        kind = ["python", await in_worker(script_of, plugin.name)]
    filters = [f"--filter={name}" for name in plugin.filters]
    command = [nbdkit, "--foreground", "--readonly", *filters, *kind, *told.parameters]
    with _policy(plugin, source) as policy:
        async with run_helper(Launch(command, policy, told.secret, plugin.stateful)) as helper:
            # Asked while the helper starts: what it says itself of a missing plugin helps less.
            if not await in_worker(has_plugin, plugin.name):
                raise BackingError(
                    f"{redacted(uri)}: nbdkit has no working {plugin.name} plugin "
                    f"(apt install {plugin.package})"
                )
            endpoint = Endpoint(
                helper.uri, redacted(uri), None, plugin.unit_least, plugin.connections
            )
            yield _Served(endpoint, (helper,))


@contextmanager
def _policy(plugin: Plugin, source: str) -> Iterator[Policy]:
    """What a plugin may open. Raises BackingError if that is a file that cannot be."""
    path = local_path(source)
    if path is None:
        trees = (*plugin.trees, *plugin.files())
        yield source_policy(trees, plugin.environment, runs=plugin.runs)
        return
    with _opened(path) as fd:
        yield Policy(image=fd, path=os.path.realpath(path))


@asynccontextmanager
async def _serve_format(uri: str, image_format: str, inner: str) -> AsyncIterator[_Served]:
    """qemu-nbd on what ``inner`` names: a file itself, anything else by way of NBD."""
    program("qemu-nbd", "qemu-utils")
    name = redacted(uri)
    path = local_path(inner)
    if path is not None:
        with _opened(path) as fd:
            node = file_node(image_format, path, fd)
            await inspect(name, image_format, node)
            async with _serve_node(node) as helper:
                yield _Served(Endpoint(helper.uri, name), (helper,))
        return
    async with _serve(inner) as served:
        node = await nbd_node(name, image_format, served.endpoint)
        await _inspect(served, name, image_format, node)
        async with _serve_node(node) as helper:
            endpoint = replace(served.endpoint, uri=helper.uri, name=name, tls=None)
            yield _Served(endpoint, (helper, *served.helpers))


@asynccontextmanager
async def _serve_chain(uri: str, images: list[str]) -> AsyncIterator[_Served]:
    """QEMU on a chain of images, the top first; each comes to it by way of NBD."""
    daemon = program("qemu-storage-daemon", "qemu-system-common")
    async with AsyncExitStack() as stack:
        nodes: list[Node] = []
        endpoints: list[Endpoint] = []
        helpers: list[Helper] = []
        for level, image in enumerate(images):
            image_format, source = _taken_apart(image)
            served = await stack.enter_async_context(_serve(source))
            name = redacted(image)
            node = await nbd_node(name, image_format, served.endpoint, level)
            await _inspect(served, name, image_format, node, based=level < len(images) - 1)
            nodes.append(node)
            endpoints.append(served.endpoint)
            helpers.extend(served.helpers)
        whole = chained(nodes)
        server = f"addr.type=fd,addr.str={LISTEN_FD},max-connections=0"
        export = f"type=nbd,id=chain,node-name={whole.top},name="
        command = [daemon, *whole.arguments, "--nbd-server", server, "--export", export]
        helper = await stack.enter_async_context(run_helper(Launch(command, whole.policy)))
        endpoint = Endpoint(
            helper.uri,
            redacted(uri),
            unit_least=max(endpoint.unit_least for endpoint in endpoints),
            bulk_connections=max(endpoint.bulk_connections for endpoint in endpoints),
        )
        yield _Served(endpoint, (helper, *helpers))


async def _inspect(
    served: _Served, name: str, image_format: str, node: Node, *, based: bool = False
) -> None:
    """Look at an image that is served. Raises BackingError: where there is trouble with the
    source, its helper says it best."""
    try:
        await inspect(name, image_format, node, based=based)
    except BackingError as error:
        if served.words():
            raise BackingError(f"{name}: {served.words()}") from error
        raise


@asynccontextmanager
async def _serve_node(node: Node) -> AsyncIterator[Helper]:
    """qemu-nbd on an image."""
    qemu_nbd = program("qemu-nbd", "qemu-utils")
    command = [qemu_nbd, "--read-only", "--persistent", "--shared=0"]
    command += [*node.arguments, node.graph]
    async with run_helper(Launch(command, node.policy)) as helper:
        yield helper


@contextmanager
def _opened(path: str) -> Iterator[int]:
    """An image of the user's, open for as long as the block. Raises BackingError."""
    fd = open_image(path)
    try:
        yield fd
    finally:
        os.close(fd)


def known_kinds() -> list[str]:
    """Every kind of backing that can be opened here (worker: runs nbdkit)."""
    usable = set(filter(has_plugin, {plugin.name for plugin in PLUGINS.values()}))
    schemes = [scheme for scheme, plugin in PLUGINS.items() if plugin.name in usable]
    formats = [f"{name}+..." for name in FORMATS]
    uris = [f"{scheme}://" for scheme in (*NBD_SCHEMES, *schemes)]
    return [*uris, "a file's path", f"{NBDKIT}PLUGIN?...", *formats]
