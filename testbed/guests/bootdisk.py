# SPDX-License-Identifier: Apache-2.0
"""Make a disk that a PC boots by itself: MBR, GRUB, and one ext4 partition.

No root, no loop devices: ``mke2fs -d`` fills the file system, and GRUB's own images are put
where a BIOS looks for them. The boot sector loads the core image from the sectors
that follow (where GRUB expects it unless told otherwise), which holds the drivers for
the partition and its file system, reads ``/boot/grub/grub.cfg`` there and starts Linux.

    sector 0        boot.img, and the partition table
    sector 1…       core.img
    1 MiB…          ext4: everything else
"""

import hashlib
import os
import random
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

MiB = 1 << 20
SECTOR = 512
PARTITION_OFFSET = MiB
"""Byte at which the file system begins; e2fsck takes it as ``disk.raw?offset=…``."""

FILESYSTEM_UUID = "6e626473-7472-4561-ad00-000000000001"
_GRUB = Path("/usr/lib/grub/i386-pc")
_GRUB_MODULES = ["biosdisk", "part_msdos", "ext2", "normal", "linux", "echo"]
# GRUB 2.06 cannot read file systems with these.
_FEATURES = "^metadata_csum_seed,^orphan_file"
_LINUX_PARTITION, _BOOTABLE = 0x83, 0x80


@dataclass(frozen=True)
class BootEntry:
    """What GRUB starts: paths within the file system, and the kernel's command line."""

    kernel: str
    initrd: str
    arguments: str

    def grub_config(self) -> str:
        """Return the text of ``/boot/grub/grub.cfg``."""
        root = f"root=UUID={FILESYSTEM_UUID}"
        return f"linux {self.kernel} {root} {self.arguments}\ninitrd {self.initrd}\nboot\n"


def run(*command: str | Path, **options: object) -> None:
    """Run *command*; what it says is shown only if it fails."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    result = subprocess.run(  # type: ignore[call-overload]
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PATH": path, "LC_ALL": "C"},
        **options,
    )
    if result.returncode != 0:
        words = result.stdout.decode(errors="replace")[-4000:]
        raise RuntimeError(f"{command[0]} ended with status {result.returncode}:\n{words}")


def make_boot_disk(disk: Path, tree: Path, size: int, entry: BootEntry, unpack: str = ":") -> None:
    """Write a bootable raw disk of *size* bytes with the files under *tree* to *disk*.

    *unpack*, a shell command, is run in *tree* first, under the same ``fakeroot`` as
    mke2fs: so it may unpack files of any owner. All other files will be root's.
    """
    config = tree / "boot/grub/grub.cfg"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(entry.grub_config())
    with open(disk, "wb") as file:
        file.truncate(size)
    mke2fs = (
        f"mke2fs -q -t ext4 -O {_FEATURES} -m 1 -U {FILESYSTEM_UUID} -L root"
        f" -E offset={PARTITION_OFFSET},hash_seed={FILESYSTEM_UUID} -d . '{disk}'"
        f" {(size - PARTITION_OFFSET) // 1024}k"
    )
    run("fakeroot", "sh", "-ec", f"{unpack}; {mke2fs}", cwd=tree)
    _install_grub(disk, size)


def _install_grub(disk: Path, size: int) -> None:
    core = disk.with_suffix(".core")
    run(
        "grub-mkimage", "-O", "i386-pc", "-o", core,
        "-p", "(hd0,msdos1)/boot/grub", *_GRUB_MODULES,
    )  # fmt: skip
    core_image = core.read_bytes()
    core.unlink()
    if len(core_image) > PARTITION_OFFSET - SECTOR:
        raise RuntimeError(f"GRUB's core image is too long: {len(core_image)} bytes")
    with open(disk, "r+b") as file:
        file.write(_boot_sector((_GRUB / "boot.img").read_bytes(), size) + core_image)


def _boot_sector(code: bytes, size: int) -> bytes:
    """Boot code (440 bytes), disk signature (6), four partition entries (64), 55 AA.

    The entry gives its place by sector number; FE FF FF is "see there" in the old
    cylinder, head, sector fields.
    """
    start, length = PARTITION_OFFSET // SECTOR, (size - PARTITION_OFFSET) // SECTOR
    far = b"\xfe\xff\xff"
    entry = struct.pack("<B3sB3sII", _BOOTABLE, far, _LINUX_PARTITION, far, start, length)
    return code[:440] + b"nbds\0\0" + entry.ljust(64, b"\0") + b"\x55\xaa"


def write_payload(directory: Path, seed: int, files: int, file_size: int) -> None:
    """Fill *directory* with incompressible files, the same on every run, and SHA256SUMS."""
    directory.mkdir(parents=True)
    generator = random.Random(seed)
    sums = []
    for number in range(files):
        data = generator.randbytes(file_size)
        name = f"{number:03}.bin"
        (directory / name).write_bytes(data)
        sums.append(f"{hashlib.sha256(data).hexdigest()}  {name}\n")
    (directory / "SHA256SUMS").write_text("".join(sums))
