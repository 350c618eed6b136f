# SPDX-License-Identifier: Apache-2.0
"""Boot profiles by themselves: the one that is known of an image is found and fetched by.

Asked in this order: the user's collection, the profile beside the leaf (an older recording, or one
that was removed from the collection), what is published beside the image. What is found elsewhere
goes into the collection. It is a task of the running server: a guest may boot meanwhile.
"""

from pathlib import Path

from nbdstream.disk import StreamedDisk
from nbdstream.errors import ProfileError
from nbdstream.streamer.prefetch import Prefetcher
from nbdstream.streamer.profile import Profile, path_beside, read_profile
from nbdstream.streamer.profile_published import fetch_published
from nbdstream.streamer.profile_store import ProfileStore
from nbdstream.tasks import in_worker


async def prefetch(disk: StreamedDisk, profile: Profile | None, store: ProfileStore | None) -> None:
    """Fetch what a profile names; without one, what the profile names that is known of the disk's
    backing, where there is a store to look in. A task."""
    if profile is None and store is not None:
        profile = await _find(disk, store)
    if profile is not None and disk.backing is not None:
        await Prefetcher(disk, profile).run()


async def _find(disk: StreamedDisk, store: ProfileStore) -> Profile | None:
    reference = disk.leaf.backing
    if reference is None or disk.backing is None or not reference.identity:
        return None
    identity, size = reference.identity, reference.size
    found = await in_worker(store.find, identity, size)
    if found is not None:
        return found
    found = await in_worker(_beside, disk.leaf.path)
    if found is None or (found.backing_identity, found.backing_size) != (identity, size):
        found = await fetch_published(disk.backing.uri, identity, size)
    if found is not None:
        await in_worker(store.keep, found)
    return found


def _beside(leaf: str) -> Profile | None:
    """Worker: the complete profile beside a leaf, if there is one."""
    path = path_beside(leaf)
    try:
        found = read_profile(path) if Path(path).exists() else None
    except (ProfileError, OSError):
        return None  # the recorder says so
    return found if found is not None and found.complete else None
