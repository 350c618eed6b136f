# SPDX-License-Identifier: Apache-2.0
"""The directory of a store: what is where, how an image comes into it and how it leaves.

    images/ID/          an image
        image.raw           its leaf, with image.raw.map beside it until it is wholly local
        live-BOOT           what is in the leaf now (`nbdstream.store.live`)
        record.json         where it is from, which content it has, its size
        lock                held by who changes the directory or looks at all users
        users/              the register (`nbdstream.store.register`)
        start, serving      locks: of who starts the image's process; of that process
        nbd, control        that process' sockets
        used, pull, log     time of the last use; fetch all of it; what the process said
    names/              what each URI led to when it was last looked at
    building/, trash/   what is not yet, or not any more, an image

An image enters by one rename, whole, and leaves by one rename. So at every instant of any
crash each ID is either an image or nothing; what a crash leaves in ``building`` and ``trash``
is deleted by `clean`. All functions here may block: they are for worker threads.
"""

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nbdstream.errors import ImageGoneError, StoreError, UsageError
from nbdstream.leaf import MAP_SUFFIX, create_leaf
from nbdstream.leaf.base import BackingReference
from nbdstream.leaf.files import sync_directory
from nbdstream.net.address import UNIX_PATH_MOST
from nbdstream.store.files import read_record, touch, write_record
from nbdstream.store.locks import FileLock, acquire, is_held

LEAF_NAME = "image.raw"
ROOT_PLACE = "/var/lib/nbdstream"
# Seconds for which another process may change an image's directory before we give up.
LOCK_TIMEOUT = 30.0
# Characters of an image's ID: 64 bits of a hash.
ID_LENGTH = 16
# Seconds that making an image takes at the most.
BUILDING_MOST = 3600.0


@dataclass(frozen=True)
class Record:
    """What an image is.

    ``uri`` is where it comes from, without secrets; ``identity`` its fingerprint
    (`nbdstream.backing.identity`); ``created`` a POSIX time.
    """

    uri: str
    identity: str
    size: int
    created: float

    @property
    def id(self) -> str:
        """The image's name in the store. Images with the same fingerprint from two addresses are
        two images: samples do not prove that the rest is the same, and the server of one
        address must not choose what users of the other one see."""
        named = f"{self.uri}\0{self.identity}".encode(errors="surrogateescape")
        return hashlib.sha256(named).hexdigest()[:ID_LENGTH]


@dataclass(frozen=True)
class Image:
    """An image in a store."""

    directory: Path
    record: Record

    @property
    def id(self) -> str:
        return self.directory.name

    @property
    def leaf(self) -> Path:
        return self.directory / LEAF_NAME

    @property
    def users(self) -> Path:
        return self.directory / "users"

    @property
    def socket(self) -> Path:
        return self.directory / "nbd"

    @property
    def control(self) -> Path:
        return self.directory / "control"

    @property
    def start(self) -> Path:
        return self.directory / "start"

    @property
    def serving(self) -> Path:
        return self.directory / "serving"

    @property
    def pull(self) -> Path:
        return self.directory / "pull"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def complete(self) -> bool:
        """Whether all of it is local."""
        return not os.path.lexists(f"{self.leaf}{MAP_SUFFIX}")

    @property
    def served(self) -> bool:
        """Whether its process runs. Raises OSError."""
        return is_held(self.serving)

    @property
    def last_used(self) -> float:
        """POSIX time of the last use."""
        try:
            return (self.directory / "used").stat().st_mtime
        except OSError:
            return self.record.created

    def use(self) -> None:
        """Note that it is used now. Raises OSError."""
        touch(self.directory / "used")

    def lock(self) -> FileLock:
        """Lock the directory. Raises ImageGoneError, StoreError, OSError."""
        try:
            return acquire(self.directory / "lock", timeout=LOCK_TIMEOUT)
        except FileNotFoundError as error:
            raise ImageGoneError(f"image {self.id} is not in the store any more") from error


def default_place() -> Path:
    """Where the store is if nothing else is said."""
    if os.geteuid() == 0:
        return Path(ROOT_PLACE)
    data = Path(os.environ.get("XDG_DATA_HOME", ""))
    return (data if data.is_absolute() else Path.home() / ".local" / "share") / "nbdstream"


class Store:
    """A host's store. ``root`` is its directory."""

    def __init__(self, root: Path) -> None:
        """Open a store, and create what it lacks.

        Raises:
            StoreError: the directory cannot be a store, in one line.
        """
        self.root = root.absolute()
        self._require_short()
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("images", "names", "building", "trash"):
                (self.root / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"the image store {self.root} cannot be used: {error.strerror} ({error.filename}); "
                "choose another place with --store"
            ) from error
        self._require_private()

    def _require_short(self) -> None:
        """The images' sockets are in the store. Raises StoreError."""
        longest = self.root / "images" / ("0" * ID_LENGTH) / "control"
        if (excess := len(os.fsencode(longest)) - UNIX_PATH_MOST) > 0:
            raise StoreError(
                f"the path of the image store {self.root} is {excess} bytes too long for the "
                "sockets in it: choose another place with --store"
            )

    def _require_private(self) -> None:
        """A user who can write to a store chooses what guests see. Raises StoreError."""
        status = self.root.stat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            raise StoreError(
                f"other users can write to the image store {self.root}: make it its owner's alone "
                "(chmod 700), or choose another place with --store"
            )

    # -- looking -----------------------------------------------------------------------

    def images(self) -> list[Image]:
        """All images, the oldest first. Raises OSError."""
        found = (self._load(path) for path in (self.root / "images").iterdir())
        return sorted(filter(None, found), key=lambda image: (image.record.created, image.id))

    def find(self, uri: str, identity: str) -> Image | None:
        """The image with this content from there, if there is one. Raises OSError."""
        wanted = Record(uri, identity, 0, 0.0).id
        image = self._load(self.root / "images" / wanted)
        if image is not None and (image.record.uri, image.record.identity) != (uri, identity):
            raise StoreError(f"image {wanted} is not what its name says: remove it")
        return image

    def at(self, path: str) -> Image | None:
        """The image whose file this path leads to, if there is one. Raises OSError."""
        place = Path(os.path.realpath(path))
        directory = self.root.resolve() / "images" / place.parent.name
        return self._load(directory) if place == directory / LEAF_NAME else None

    def latest(self, uri: str) -> Image | None:
        """The newest image from there, if there is one. Raises OSError."""
        return next((image for image in reversed(self.images()) if image.record.uri == uri), None)

    def named(self, name: str) -> Image:
        """The image that a user means: by the beginning of its ID, or by its URI, which means the
        newest one. Raises UsageError."""
        if not name:
            raise UsageError("an image's name is its ID or its URI")
        images = self.images()
        found = [image for image in images if image.id.startswith(name)]
        found = found or [image for image in images if image.record.uri == name][-1:]
        if not found:
            raise UsageError(f"no image '{name}' in {self.root} ('nbdstream image ls' lists them)")
        if len(found) > 1:
            raise UsageError(f"'{name}' can mean {', '.join(image.id for image in found)}")
        return found[0]

    def _load(self, directory: Path) -> Image | None:
        values = read_record(directory / "record.json")
        if values is None:
            return None
        try:
            record = Record(
                str(values["uri"]),
                str(values["identity"]),
                int(values["size"]),
                float(values["created"]),
            )
        except (KeyError, TypeError, ValueError):
            return None
        return Image(directory, record)

    # -- coming and going --------------------------------------------------------------

    def create(self, reference: BackingReference) -> Image:
        """The image that this backing is: the one that is there, or a new one with nothing in it.

        ``reference``: with size and identity. Raises OSError, LeafError, StoreError.
        """
        record = Record(reference.uri, reference.identity, reference.size, time.time())
        place = self.root / "images" / record.id
        building = self.root / "building" / f"{record.id}.{secrets.token_hex(4)}"
        (building / "users").mkdir(mode=0o700, parents=True)
        try:
            create_leaf(
                str(building / LEAF_NAME),
                format="raw",
                size=record.size,
                cluster_size=None,
                backing=reference,
            )
            write_record(building / "record.json", asdict(record))
            try:
                building.rename(place)
            except OSError:
                if not place.is_dir():
                    raise
            sync_directory(str(place))
        finally:
            shutil.rmtree(building, ignore_errors=True)
        image = self.find(record.uri, record.identity)
        if image is None:
            raise StoreError(f"{place} is no image, and in the way of one: remove it")
        return image

    def discard(self, image: Image) -> None:
        """Remove an image, whose lock the caller holds and which is not in use. Raises OSError."""
        trash = self.root / "trash" / f"{image.id}.{secrets.token_hex(4)}"
        image.directory.rename(trash)
        sync_directory(str(image.directory))
        shutil.rmtree(trash)

    def clean(self) -> None:
        """Delete what crashes have left. Raises nothing: it is tried again."""
        for path in (self.root / "trash").iterdir():
            shutil.rmtree(path, ignore_errors=True)
        for path in self._abandoned():
            shutil.rmtree(path, ignore_errors=True)

    def _abandoned(self) -> Iterator[Path]:
        """What is being built for longer than building takes. A clock that jumps ahead may make
        a builder fail, which says so; nothing else depends on it."""
        for path in (self.root / "building").iterdir():
            try:
                age = time.time() - path.stat().st_mtime
            except OSError:
                continue
            if abs(age) > BUILDING_MOST:
                yield path
