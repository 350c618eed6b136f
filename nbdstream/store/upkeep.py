# SPDX-License-Identifier: Apache-2.0
"""Looking after a store: what is in it, and removing what is not needed.

An image is only ever removed while its lock is held and its register is empty, after its process
has ended, and while no QEMU has it open. So no server can begin to use it meanwhile, and none that
uses it loses it.
"""

import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from nbdstream.errors import ImageGoneError, StoreError
from nbdstream.leaf import MAP_SUFFIX
from nbdstream.leaf.locking import is_open_elsewhere
from nbdstream.leaf.raw.map import local_runs
from nbdstream.qmp.client import QMPClient
from nbdstream.qmp.protocol import QMPError
from nbdstream.store.launch import waker
from nbdstream.store.layout import Image, Store
from nbdstream.store.locks import acquire
from nbdstream.store.register import User, UserState, sweep, users
from nbdstream.streamer.room import Space
from nbdstream.tasks import in_worker
from nbdstream.units import format_count, format_size

log = logging.getLogger(__name__)

# Seconds that an image's process gets to end when it is told to.
END_TIMEOUT = 40.0
# Of the leaves that need an image, so many are named.
LEAVES_SHOWN = 3
_SECTOR = 512  # stat(2): st_blocks


@dataclass(frozen=True)
class Facts:
    """How an image is now. Sizes in bytes, times POSIX.

    ``local`` counts what is local, zeroes included; ``stored`` is the space that it takes.
    ``pulling``: all of it was asked for, and is not there yet.
    """

    image: Image
    local: int
    stored: int
    users: list[User]
    served: bool
    pulling: bool
    last_used: float

    @property
    def users_text(self) -> str:
        """Who needs it, in a few words."""
        running = sum(user.state is UserState.RUNNING for user in self.users)
        waiting = len(self.users) - running
        parts = [f"{running} running"] * bool(running) + [f"{waiting} waiting"] * bool(waiting)
        return ", ".join(parts) or "none"


def facts_of(image: Image) -> Facts:
    """Look at an image, which may be in use (worker).

    Raises:
        ImageGoneError: it was removed meanwhile.
        LeafError, OSError: what is there cannot be read.
    """
    try:
        status = image.leaf.stat()
        try:
            runs = local_runs(f"{image.leaf}{MAP_SUFFIX}")
            local = sum(end - start for start, end in runs)
        except FileNotFoundError:
            local = image.record.size
        found = users(image)
        return Facts(
            image,
            local=local,
            stored=status.st_blocks * _SECTOR,
            users=found,
            served=image.served,
            pulling=image.pull.exists() and local < image.record.size,
            last_used=time.time() if _running(found) else image.last_used,
        )
    except FileNotFoundError as error:
        raise ImageGoneError(f"image {image.id} is not in the store any more") from error


def all_facts(store: Store) -> list[Facts]:
    """`facts_of` each image that is still there (worker)."""
    found = []
    for image in store.images():
        try:
            found.append(facts_of(image))
        except ImageGoneError:
            continue
    return found


def _running(found: list[User]) -> bool:
    return any(user.state is UserState.RUNNING for user in found)


async def pull(image: Image, uri: str) -> None:
    """Have all of an image fetched, whether or not it is used: now, and after a restart of
    its process. Raises StoreError, BackingError, OSError."""
    if image.complete:
        return
    await in_worker(image.use)
    await in_worker(lambda: image.pull.touch(mode=0o600))
    await waker(image, uri)()
    async with QMPClient.connect(str(image.control)) as qmp:
        if not await qmp.execute("query-jobs"):
            try:
                device = (await qmp.execute("query-block"))[0]["device"]
                await qmp.execute("block-stream", {"device": device})
            except QMPError:
                if not image.complete:  # it may have become so in between
                    raise


async def remove(store: Store, image: Image) -> None:
    """Remove an image that is not needed.

    Raises:
        StoreError: it is needed, or its process does not end; one line says by what.
        ImageGoneError: it is not there any more.
        OSError: it could not be deleted.
    """
    lock = await in_worker(image.lock)
    with lock:
        left = await in_worker(sweep, image)
        if left:
            leaves = ", ".join(sorted({user.leaf for user in left})[:LEAVES_SHOWN])
            raise StoreError(
                f"image {image.id} is needed by {format_count(len(left), 'user')} ({leaves}): "
                "stop the guests, and delete the leaves or let them become complete"
            )
        await _end_process(image)
        if await in_worker(is_open_elsewhere, str(image.leaf)):
            raise StoreError(
                f"image {image.id} is open in another program, which may be the QEMU of a guest "
                "on a thin leaf: stop it first"
            )
        await in_worker(store.discard, image)
    await in_worker(store.clean)


async def _end_process(image: Image) -> None:
    """End the process of an image that has no users."""
    if not await in_worker(lambda: image.served):
        return
    try:
        async with QMPClient.connect(str(image.control)) as qmp:
            await qmp.execute("quit")
    except (QMPError, OSError) as error:
        log.info("image %s: %s", image.id, error)  # it is ending, or was killed
    lock = await in_worker(lambda: acquire(image.serving, timeout=END_TIMEOUT))
    lock.release()


async def prune(store: Store, keep: int) -> list[Facts]:
    """Remove images that are not needed, those first that were used longest ago, until all images
    together take at most ``keep`` bytes. Returns what was removed. Raises as `remove` does."""
    found = await in_worker(all_facts, store)
    total = sum(facts.stored for facts in found)
    removed: list[Facts] = []

    def is_enough() -> bool:
        return total - sum(facts.stored for facts in removed) <= keep

    async for facts in _removals(store, found, is_enough):
        removed.append(facts)
    return removed


async def make_room(store: Store, space: Space, own: Image) -> None:
    """Remove images that are not needed while there is little ``space``, those first that were
    used longest ago, and not our ``own``. Raises as `remove` does."""
    found = await in_worker(all_facts, store)
    others = [facts for facts in found if facts.image.id != own.id]
    async for facts in _removals(store, others, lambda: not space.low):
        space.look_again()
        log.warning(
            "removed image %s (%s), which no guest needs: the file system was almost full, "
            "and %s are free now",
            facts.image.id,
            facts.image.record.uri,
            format_size(space.free),
        )


async def _removals(
    store: Store, found: list[Facts], is_enough: Callable[[], bool]
) -> AsyncGenerator[Facts, None]:
    """Remove one unused image after the other; each that was removed."""
    await in_worker(store.clean)
    for facts in sorted(found, key=lambda facts: facts.last_used):
        if is_enough():
            break
        if facts.users or facts.pulling:
            continue
        try:
            await remove(store, facts.image)
        except ImageGoneError:
            pass
        except StoreError as error:
            log.info("%s", error)  # a server has begun to use it
            continue
        yield facts
