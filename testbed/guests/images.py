# SPDX-License-Identifier: Apache-2.0
"""The guests' disk images, built when first asked for and kept in ``.cache/images``.

An image is a directory, named by a hash of its recipe: the source of the recipe and of
what makes disks bootable, and the versions it depends on. It is built beside its place and
renamed into it, so that one that exists is whole; a lock keeps two from building the same.
The images are shared by all tests: never write to them, make a copy (``copy_image``).
"""

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from nbdstream.guest.qemu import MiB
from testbed.guests import bootdisk, busybox_image, debian_image, fio_image
from testbed.processes import TOP

CACHE = TOP / ".cache" / "images"


def beside() -> Path:
    """Return the directory that has the cache, for large files that are not kept."""
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE.parent


def busybox() -> Path:
    """Return the directory of the small guest: ``disk.raw``, ``vmlinuz``, ``initrd``."""
    return _cached("busybox", busybox_image)


def debian() -> Path:
    """Return the directory of the Debian guest: ``disk.raw``. Building takes minutes."""
    return _cached("debian", debian_image)


def fio() -> Path:
    """Return the directory of a disk with fio for a guest: ``disk.raw``, see `fio_image`."""
    return _cached("fio", fio_image)


def copy_image(image: Path, copy: Path) -> Path:
    """Copy a raw image with its holes, and return the copy."""
    bootdisk.run("cp", "--sparse=always", "--reflink=auto", image, copy)
    copy.chmod(0o644)
    return copy


def grow(disk: Path, size: int, data: int) -> None:
    """Make a disk so large, with so much data (in MiB) spread over what is new, behind all
    that its guest uses."""
    begin, pieces = disk.stat().st_size, data // MiB
    with open(disk, "r+b") as file:
        for number in range(pieces):
            file.seek(begin + number * ((size - begin) // MiB) // pieces * MiB)
            file.write(os.urandom(MiB))
        file.truncate(size)


def _cached(name: str, recipe: ModuleType) -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    place = CACHE / f"{name}-{_key(recipe)}"
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            print(f"building the {name} guest image …", file=sys.stderr, flush=True)
            for old in CACHE.glob(f"{name}-*"):
                shutil.rmtree(old)
            _build(recipe, place)
    return place


def _key(recipe: ModuleType) -> str:
    digest = hashlib.sha256(recipe.versions().encode())
    for module in (bootdisk, recipe):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:16]


def _build(recipe: ModuleType, place: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-") as directory:
        result, scratch = Path(directory, "result"), Path(directory, "scratch")
        result.mkdir()
        scratch.mkdir()
        recipe.build(result, scratch)
        for image in result.glob("*.raw"):
            image.chmod(0o444)
        result.rename(place)


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ["busybox", "debian"]:
        print({"busybox": busybox, "debian": debian}[wanted]())
