# SPDX-License-Identifier: Apache-2.0
"""From a URI to an image of the store.

What a URI leads to now is asked of its server: size and fingerprint. The answer holds for a few
seconds (`FRESH`), so that twenty guests that start together ask once. If it is an image that the
store does not have, an empty one is made. An image never becomes another one: a new version
behind the same URI is a new image, and leaves that belong to the old one stay with it.
"""

import hashlib
import logging
import time
from pathlib import Path

from nbdstream.backing import fingerprint, open_backing
from nbdstream.backing.sources import anchored
from nbdstream.errors import BackingGoneError, BackingMismatchError, UsageError
from nbdstream.leaf.base import BackingReference
from nbdstream.store.files import read_record, write_record
from nbdstream.store.layout import Image, Store
from nbdstream.store.locks import acquire
from nbdstream.tasks import in_worker
from nbdstream.text import has_hidden, redacted

log = logging.getLogger(__name__)

# Seconds for which an answer of a URI's server holds.
FRESH = 10.0
# Seconds that another process may take to ask a server.
ASKING_MOST = 60.0


async def resolve(store: Store, uri: str, identity: str = "", size: int = 0) -> Image:
    """The image that a URI leads to; with ``identity``, the one of that fingerprint.

    Args:
        uri: whole, with its secrets, and not relative (`whole_uri`).
        size: of the image with that identity. If the source is out of reach, an empty one is
            made, and its process goes on trying.

    Raises:
        BackingMismatchError: the image of that identity is neither in the store nor there.
        UsageError, BackingError, StoreError, OSError: as opening the backing or the store does.
    """
    place = redacted(uri)
    if identity:
        image = await in_worker(store.find, place, identity)
        if image is not None:
            return image
    name = store.root / "names" / f"{hashlib.sha256(place.encode()).hexdigest()[:32]}"
    lock = await in_worker(lambda: acquire(name, timeout=ASKING_MOST))
    with lock:
        image = await in_worker(_fresh, store, place, name)
        if image is None or identity not in ("", image.record.identity):
            known = BackingReference(place, "raw", size, identity)
            image = await _ask(store, uri, name, known)
    if identity not in ("", image.record.identity):
        raise BackingMismatchError(
            f"{place}: its content is not that of the image that the leaf belongs to, "
            f"and the store {store.root} does not have that image"
        )
    return image


def whole_uri(uri: str) -> str:
    """A URI as it is used from any directory. Raises UsageError if a secret was left out."""
    uri = anchored(uri, Path.cwd())
    if has_hidden(uri):
        raise UsageError(f"{uri}: passwords and tokens are not recorded: name it with -b")
    return uri


async def _ask(store: Store, uri: str, name: Path, known: BackingReference) -> Image:
    """Ask the URI's server, and remember the answer. If it is out of reach, the image is the one
    that is ``known``, or else the newest one from there."""
    try:
        async with open_backing(uri) as backing:
            identity = await fingerprint(backing)
            reference = BackingReference(backing.uri, "raw", backing.size, identity)
    except BackingGoneError as error:
        if known.identity:
            log.warning("%s; going on with what is local", error)
            return await in_worker(store.create, known)
        image = await in_worker(store.latest, redacted(uri))
        if image is None:
            raise
        log.warning("%s; using image %s of the store", error, image.id)
        return image

    def remember() -> Image:
        image = store.create(reference)
        values = {"uri": reference.uri, "identity": identity, "asked": time.time()}
        write_record(name.with_suffix(".json"), values)
        return image

    return await in_worker(remember)


def _fresh(store: Store, place: str, name: Path) -> Image | None:
    """The image that the URI led to a moment ago. A clock that jumps only makes us ask again."""
    values = read_record(name.with_suffix(".json")) or {}
    asked = values.get("asked")
    if not isinstance(asked, float) or not 0 <= time.time() - asked < FRESH:
        return None
    return store.find(place, str(values.get("identity", "")))
