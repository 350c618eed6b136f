# SPDX-License-Identifier: Apache-2.0
"""The register of an image's users: who needs the image, now or later.

Each user has a file in the image's directory ``users``, and holds the lock on it while it runs
(`nbdstream.store.locks`). The file is durable *before* the user's leaf depends on the image,
and it stays when the user ends without having made its leaf whole: a guest that is switched
off, or was killed, needs the rest of its disk when it is started again. So a user is

- RUNNING: its lock is held;
- WAITING: no process holds the lock, and the leaf exists and still has this image as its backing,
  or it cannot be read (its file system is not mounted, another process has it open);
- GONE: anything else. The file is then deleted by the holder of the image's lock.

A user that pauses adds its leaf's inode number to the name of its file. So a leaf that is renamed
in its directory is still found.

All functions may block: they are for worker threads.
"""

import enum
import errno
import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nbdstream.errors import LeafError
from nbdstream.leaf.files import sync_directory
from nbdstream.leaf.peek import backing_of
from nbdstream.store.files import read_record, write_record
from nbdstream.store.layout import Image
from nbdstream.store.locks import FileLock, is_held

_SUFFIX = ".json"


class UserState(enum.Enum):
    """Whether an image is still needed by a user."""

    RUNNING = "running"
    WAITING = "waiting"
    GONE = "gone"


@dataclass(frozen=True)
class User:
    """An entry of the register.

    ``leaf`` is the user's own image, an absolute path. ``device`` is the file system that it was
    on. ``temporary``: nothing of it is needed once its process has ended. ``since``: POSIX time.
    """

    leaf: str
    pid: int
    since: float
    device: int
    temporary: bool
    state: UserState


class Membership:
    """This process's own entry."""

    def __init__(self, path: Path, lock: FileLock, leaf: Path) -> None:
        self._path = path
        self._lock = lock
        self._leaf = leaf

    def leave(self) -> None:
        """Nothing of ours needs the image any more. Raises OSError."""
        self._path.unlink(missing_ok=True)
        self._lock.release()

    def pause(self) -> None:
        """We end, and the leaf still needs the image. Raises nothing: the entry stays."""
        with suppress(OSError):
            marked = f"{self._path.stem}.{self._leaf.stat().st_ino}{_SUFFIX}"
            self._path.rename(self._path.with_name(marked))
            sync_directory(str(self._path))
        self._lock.release()


def join(image: Image, leaf: str, *, temporary: bool) -> Membership:
    """Enter a user of an image, durably. It counts from the moment in which this returns.

    Raises:
        ImageGoneError: the image is not in the store any more.
        StoreError, OSError: it cannot be entered.
    """
    path = os.path.realpath(leaf)
    values = {
        "leaf": path,
        "pid": os.getpid(),
        "since": time.time(),
        "device": _device(Path(path)),
        "temporary": temporary,
    }
    token = secrets.token_hex(8)
    entry, new = image.users / f"{token}{_SUFFIX}", image.users / f".{token}"
    with image.lock():
        try:
            write_record(new, values)
        except OSError as error:
            # On a full file system, a guest that is known can be started again.
            known = _known(image, path) if error.errno == errno.ENOSPC else None
            if known is None:
                raise
            return known
        # Locked under a name that does not count yet: it is never seen without its lock.
        lock = FileLock(os.open(new, os.O_RDWR | os.O_CLOEXEC))
        try:
            new.rename(entry)
            sync_directory(str(entry))
            image.use()
            sweep(image)
        except BaseException:
            lock.release()
            new.unlink(missing_ok=True)
            entry.unlink(missing_ok=True)
            raise
    return Membership(entry, lock, Path(path))


def _known(image: Image, leaf: str) -> Membership | None:
    """The entry that a leaf has from before, taken over. Raises OSError."""
    for path, user in _entries(image):
        if user.leaf == leaf and user.state is UserState.WAITING:
            return Membership(path, FileLock(os.open(path, os.O_RDWR | os.O_CLOEXEC)), Path(leaf))
    return None


def users(image: Image) -> list[User]:
    """All users that count, in the order in which they came. A leaf that has
    several entries, because its server was killed, is one user. Raises OSError."""
    found: dict[str, User] = {}
    for _, user in _entries(image):
        known = found.get(user.leaf)
        if user.state is UserState.RUNNING or (user.state is UserState.WAITING and not known):
            found[user.leaf] = user
    return sorted(found.values(), key=lambda user: (user.since, user.leaf))


def sweep(image: Image) -> list[User]:
    """Delete entries that do not count, and return the users. The caller holds the image's lock.
    Raises OSError."""
    entries = _entries(image)
    running = {user.leaf for _, user in entries if user.state is UserState.RUNNING}
    for path, user in entries:
        replaced = user.state is UserState.WAITING and user.leaf in running
        if user.state is UserState.GONE or replaced:
            path.unlink(missing_ok=True)
    return users(image)


def _entries(image: Image) -> list[tuple[Path, User]]:
    try:
        paths = sorted(image.users.iterdir())
    except FileNotFoundError:
        return []
    return [(path, _look(path, image)) for path in paths if path.suffix == _SUFFIX]


def _look(path: Path, image: Image) -> User:
    """An entry and its state. What cannot be read counts as a user that waits."""
    running = is_held(path)
    values = read_record(path) or {}
    leaf = _place_now(str(values.get("leaf", "")), path.name.split(".")[1])
    temporary = values.get("temporary") is True
    device, since = _number(values.get("device")), values.get("since")
    if running:
        state = UserState.RUNNING
    elif temporary or not path.exists() or (leaf and not _needs(Path(leaf), device, image)):
        state = UserState.GONE
    else:
        state = UserState.WAITING
    return User(
        leaf or f"(unreadable entry {path})",
        _number(values.get("pid")),
        since if isinstance(since, float) else 0.0,
        device,
        temporary,
        state,
    )


def _place_now(leaf: str, inode: str) -> str:
    """Where a leaf is by now, if it was renamed in its directory; ``inode`` is its number, where
    it is known."""
    if not inode.isdecimal():
        return leaf
    try:
        if str(Path(leaf).stat().st_ino) == inode:
            return leaf
    except OSError:
        pass
    try:
        with os.scandir(Path(leaf).parent) as files:
            return next((file.path for file in files if str(file.inode()) == inode), leaf)
    except OSError:
        return leaf


def _needs(leaf: Path, device: int, image: Image) -> bool:
    """Whether a leaf that is not open through us still needs the image, or may need it."""
    if not os.path.lexists(leaf):
        return _device(leaf) != device
    try:
        backing = backing_of(str(leaf))
    except (LeafError, OSError):
        return True  # damaged, or just being changed: not ours to judge
    return backing is not None and backing.identity in ("", image.record.identity)


def _device(path: Path) -> int:
    """The file system that a path is on, or would be on; -1 if that cannot be told."""
    for place in (path, *path.parents):
        try:
            return place.stat().st_dev
        except FileNotFoundError:
            continue
        except OSError:
            break
    return -1


def _number(value: object) -> int:
    return value if isinstance(value, int) else -1
