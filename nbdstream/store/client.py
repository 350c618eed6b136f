# SPDX-License-Identifier: Apache-2.0
"""A guest's backing by way of the store: the image's process on this host instead of the far end.

The leaf records the far end, as it does without a store. So it can be served without the store
later, and which store a host has is no property of its leaves.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from nbdstream.backing.base import Priority
from nbdstream.backing.connect import Endpoint, OwnServer, connect
from nbdstream.backing.connection import Connection
from nbdstream.backing.nbd import NbdBacking, open_nbd
from nbdstream.errors import BackingGoneError, ImageGoneError
from nbdstream.net.address import NbdUri, UnixAddress
from nbdstream.store.exports import BACKGROUND, export_name
from nbdstream.store.launch import waker
from nbdstream.store.layout import Image, Store
from nbdstream.store.register import Membership, join
from nbdstream.store.resolve import resolve, whole_uri
from nbdstream.tasks import in_worker
from nbdstream.text import redacted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreOpener:
    """Opens backings by way of a store: a `nbdstream.backing.BackingOpener`.

    ``leaf`` is the user's image; ``temporary``: it goes away with this process.
    """

    store: Store
    leaf: str
    temporary: bool = False

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
        uri = whole_uri(uri)
        image, membership = await self._join(uri, identity, size)
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
                yield backing
        except BaseException:
            membership.pause()
            raise
        # Only who does not need the backing any more leaves the block without an error.
        await in_worker(membership.leave)

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
