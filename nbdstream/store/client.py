# SPDX-License-Identifier: Apache-2.0
"""A guest's backing by way of the store: the image's process on this host instead of the far end.

The leaf records the far end, as it does without a store. So it can be served without the store
later, and which store a host has is no property of its leaves.
"""

import errno
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from nbdstream.backing.base import Priority
from nbdstream.backing.connect import Endpoint, OwnServer, connect
from nbdstream.backing.connection import Connection
from nbdstream.backing.nbd import NbdBacking, open_nbd
from nbdstream.errors import BackingGoneError, ImageGoneError, StoreError
from nbdstream.net.address import NbdUri, UnixAddress
from nbdstream.store.exports import BACKGROUND, export_name
from nbdstream.store.launch import waker
from nbdstream.store.layout import Image, Store
from nbdstream.store.local import LocalImage
from nbdstream.store.register import Membership, join
from nbdstream.store.resolve import resolve, whole_uri
from nbdstream.tasks import in_worker, open_background_nursery, start_contained, surely
from nbdstream.text import redacted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreOpener:
    """Opens backings by way of a store: a `nbdstream.backing.BackingOpener`.

    ``leaf`` is the user's image; ``temporary``: it goes away with this process. ``pull``: all of
    the store's image is to be fetched.
    """

    store: Store
    leaf: str
    temporary: bool = False
    pull: bool = False

    def __call__(
        self,
        uri: str,
        *,
        timeout: float | None = None,
        size: int = 0,
        identity: str = "",
    ) -> AbstractAsyncContextManager[NbdBacking]:
        """See `nbdstream.backing.open_backing`. Raises StoreError as well."""
        return self._open(uri, timeout, identity if size else "", size)

    @asynccontextmanager
    async def _open(
        self,
        uri: str,
        timeout: float | None,  # noqa: ASYNC109
        identity: str,
        size: int,
    ) -> AsyncIterator[NbdBacking]:
        uri = whole_uri(await in_worker(self._source, uri))
        try:
            image, membership = await self._join(uri, identity, size)
        except OSError as error:
            raise StoreError(
                f"the image store {self.store.root}: {error.strerror or error}; make room "
                "('nbdstream image prune'), or start without --store"
                if error.errno == errno.ENOSPC
                else f"the image store {self.store.root}: {error}"
            ) from error
        try:
            endpoint = image_endpoint(image, uri)
            first: Connection | None = None
            try:
                first = await connect(endpoint)
            except BackingGoneError as error:
                if not identity:
                    raise
                log.warning("%s; going on with what is local", error)
            async with open_nbd(
                endpoint,
                first,
                timeout=timeout,
                size=image.record.size,
                identity=image.record.identity,
            ) as backing:
                async with self._beside(backing, image, uri):
                    yield backing
        except BaseException:
            await surely(membership.pause)
            raise
        # Only who does not need the backing any more leaves the block without an error.
        await in_worker(membership.leave)

    @asynccontextmanager
    async def _beside(self, backing: NbdBacking, image: Image, uri: str) -> AsyncIterator[None]:
        """What is done besides while the backing is open: read the image's file ourselves."""
        local = await in_worker(LocalImage, image)
        try:
            async with open_background_nursery() as nursery:
                backing.local = local
                start_contained(nursery, f"image {image.id}", _logged, local.watch)
                if self.pull:
                    start_contained(nursery, f"image {image.id}", _logged, _pull, image, uri)
                yield
        finally:
            local.close()

    def _source(self, uri: str) -> str:
        """Where the image comes from that a leaf names: one that QEMU has had names the image's
        file in the store."""
        image = self.store.at(uri)
        return uri if image is None else image.record.uri

    async def _join(self, uri: str, identity: str, size: int) -> tuple[Image, Membership]:
        """Find or make the image, and enter ourselves as its user before it can be removed."""
        while True:
            image = await resolve(self.store, uri, identity, size)
            try:
                return image, await in_worker(
                    lambda: join(image, self.leaf, temporary=self.temporary)  # noqa: B023
                )
            except ImageGoneError:
                continue  # it was removed in between


async def _pull(image: Image, uri: str) -> None:
    """A task: have all of the image fetched. Raises StoreError, BackingError, OSError."""
    if image.complete or image.pull.exists():
        return  # its process knows
    from nbdstream.store.upkeep import pull  # loads the client of its control socket

    await pull(image, uri)


def _logged(_name: str, _error: BaseException) -> None:
    """A failure that costs the guest nothing but speed was logged; that is all."""


def image_endpoint(image: Image, uri: str) -> Endpoint:
    """Where an image's process serves it; ``uri`` is the far end, with secrets."""

    def at(priority: Priority) -> str:
        name = export_name(image.record.identity, priority)
        return str(NbdUri(UnixAddress(str(image.socket)), name))

    own = OwnServer(
        image.record.identity,
        {priority: at(priority) for priority in BACKGROUND},
        waker(image, uri),
    )
    return Endpoint(at(Priority.DEMAND), redacted(uri), own=own)
