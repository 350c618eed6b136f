# SPDX-License-Identifier: Apache-2.0
"""A user's collection of boot profiles, by what they are of: one file for each image.

No profile has to be named: the second boot of an image on a host finds the one that the first
boot recorded. An image is known by its fingerprint and its size (`nbdstream.backing.identity`),
so the same image is found under any URI.

- A file appears whole or not at all. What has to be read before it is replaced is done under a
  lock, so two servers that end together lose nothing.
- The collection is bounded (`COUNT_MOST`, `BYTES_MOST`): what was not used for longest goes first.
  A file's time of modification is that of its last use.
- It is only advice. A damaged file costs one line in the log and is replaced by the next
  recording. A directory that cannot be written is no error.

All of it is blocking code, for a worker thread.
"""

import errno
import fcntl
import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nbdstream.errors import ProfileError
from nbdstream.streamer.profile import (
    SUFFIX,
    Profile,
    combine,
    read_profile,
    require_of,
    write_profile,
)

log = logging.getLogger(__name__)

COUNT_MOST = 256
BYTES_MOST = 64 << 20
# A recording replaces a complete profile that names less than this part of what it read.
USEFUL_PART = 0.5
# How long another server may hold the lock before this one does without.
LOCK_SECONDS = 2.0
# Temporary files that are older belong to a server that was killed.
LEFT_BEHIND_SECONDS = 3600.0

_IDENTITY = re.compile(r"[a-z0-9]{1,8}:[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9]{1,8}-[0-9a-f]{64}-[0-9]{1,19}\.profile")


@dataclass(frozen=True)
class Entry:
    """A stored profile. ``used``: POSIX time of its last use; ``bytes``: of the file."""

    path: Path
    used: float
    bytes: int


def default_directory() -> Path:
    """``$XDG_STATE_HOME/nbdstream/profiles``. Where that is not set, or relative (which the
    specification has ignored): in ``/var/lib`` for root, else in ``~/.local/state``."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        state = Path("/var/lib") if os.geteuid() == 0 else Path.home() / ".local/state"
    return state / "nbdstream" / "profiles"


class ProfileStore:
    """The profiles in one directory, which is made when the first one is kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def find(self, identity: str, size: int) -> Profile | None:
        """The profile of an image, which counts as used now; None without one that is usable."""
        path = self._path(identity, size)
        found = self._read(path, identity, size) if path is not None else None
        if found is not None and path is not None:
            try:
                os.utime(path)
            except OSError:
                pass  # another user's store, or it was removed just now
        return found

    def keep(self, new: Profile) -> bool:
        """Keep a profile, alone or together with the one that is there (see `merged`). Returns
        whether it was; what prevents it is logged. Raises nothing."""
        path = self._path(new.backing_identity, new.backing_size)
        if path is None:
            return False
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.directory.stat().st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "it belongs to another user")
            with self._locked():
                old = self._read(path, new.backing_identity, new.backing_size)
                better = merged(old, new) if old is not None else new
                if better is old:
                    return False
                write_profile(str(path), better)
                self._make_room(path)
        except OSError as error:
            log.info("the boot profile is not kept in %s: %s", self.directory, error)
            return False
        return True

    def entries(self) -> list[Entry]:
        """All profiles, the last used first. Raises OSError."""
        try:
            paths = list(self.directory.iterdir())
        except FileNotFoundError:
            return []
        found = [
            entry
            for path in paths
            if _NAME.fullmatch(path.name) and (entry := _entry(path)) is not None
        ]
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def _path(self, identity: str, size: int) -> Path | None:
        """Where an image's profile is. A leaf may come from a stranger, and so may the identity
        that it records: what is no fingerprint has no file."""
        if not _IDENTITY.fullmatch(identity):
            return None
        return self.directory / f"{identity.replace(':', '-')}-{size}{SUFFIX}"

    def _read(self, path: Path, identity: str, size: int) -> Profile | None:
        """The profile in a file, if it is one, and of this image."""
        try:
            found = read_profile(str(path))
            require_of(found, identity, size, str(path))
        except FileNotFoundError:
            return None
        except (ProfileError, OSError) as error:
            log.warning("a stored boot profile is ignored: %s", error)
            return None
        return found

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other servers from replacing files. One that holds the lock for long (it may be
        stopped) is not waited for: files stay whole without the lock, too."""
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        deadline = time.monotonic() + LOCK_SECONDS
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.02)
            yield
        finally:
            os.close(fd)

    def _make_room(self, new: Path) -> None:
        """Remove what was not used for longest, but not ``new``, until the bounds hold."""
        entries = self.entries()
        count, total = len(entries), sum(entry.bytes for entry in entries)
        for entry in reversed(entries):
            if count <= COUNT_MOST and total <= BYTES_MOST:
                break
            if entry.path != new:
                entry.path.unlink(missing_ok=True)
                count, total = count - 1, total - entry.bytes
        for path in self.directory.glob(f".*{SUFFIX}.*"):
            if time.time() - path.lstat().st_mtime > LEFT_BEHIND_SECONDS:
                path.unlink(missing_ok=True)


def _entry(path: Path) -> Entry | None:
    try:
        status = path.lstat()
    except OSError:
        return None  # removed just now
    return Entry(path, status.st_mtime, status.st_size) if stat.S_ISREG(status.st_mode) else None


def merged(old: Profile, new: Profile) -> Profile:
    """What becomes of a stored profile when the same image was booted again.

    - A complete one stays, unless this boot shows that it is of little use now: it names less
      than `USEFUL_PART` of what was read. Then a complete new one replaces it.
    - One that is not complete is replaced by a complete one. Two that are not complete are
      combined.
    """
    if old.complete:
        stale = new.complete and common_bytes(old, new) < USEFUL_PART * new.bytes
        return new if stale else old
    return new if new.complete else combine([old, new])


def common_bytes(a: Profile, b: Profile) -> int:
    """How many bytes both name."""
    common = 0
    others = iter(sorted(b.ranges))
    other = next(others, None)
    for found in sorted(a.ranges):
        while other is not None and other.offset < found.end:
            common += max(0, min(found.end, other.end) - max(found.offset, other.offset))
            if other.end > found.end:
                break
            other = next(others, None)
    return common
