# SPDX-License-Identifier: Apache-2.0
"""The recipe of a small disk with the host's fio and its libraries, for a guest to mount.

The guest needs nothing but a kernel of the same architecture: fio is started through its own
dynamic loader (`COMMAND`).
"""

import re
import shutil
import subprocess
from pathlib import Path

from nbdstream.guest.qemu import MiB
from testbed.guests.bootdisk import run
from testbed.peers import binary

SIZE = 192 * MiB
MOUNT_POINT = "/fio"
COMMAND = f"{MOUNT_POINT}/loader --library-path {MOUNT_POINT} {MOUNT_POINT}/fio"


def versions() -> str:
    """What the image depends on besides this recipe, for the cache's key."""
    done = subprocess.run([binary("FIO"), "--version"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def build(result: Path, scratch: Path) -> None:
    """Write ``disk.raw`` to *result*; *scratch* is empty."""
    program, tree = binary("FIO"), scratch / "tree"
    tree.mkdir()
    shutil.copy(program, tree / "fio")
    needed = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    for library in map(Path, re.findall(r"/\S+", needed)):
        name = "loader" if library.name.startswith("ld-linux") else library.name
        shutil.copy(library, tree / name)
    disk = result / "disk.raw"
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, disk, f"{SIZE // MiB}M")
