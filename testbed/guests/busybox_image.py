# SPDX-License-Identifier: Apache-2.0
"""The recipe of the small guest: the host's cloud kernel, busybox, and a shell in seconds.

It boots from its disk like any PC, or in half the time with ``-kernel`` and ``-initrd``,
which lie beside the disk image. An initramfs of a few hundred KiB loads the virtio
drivers and mounts the root file system; init there runs ``/autorun`` if there is one, says
``GUEST READY`` on the serial console and gives it a root shell. ``poweroff -f``
ends the guest.
"""

import shutil
import subprocess
from pathlib import Path

from testbed.guests.bootdisk import BootEntry, MiB, make_boot_disk, run, write_payload

SIZE = 384 * MiB
KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1"
PAYLOAD_FILES, PAYLOAD_FILE_SIZE = 24, MiB
_BUSYBOX = Path("/bin/busybox")
# What it takes to see the disk; ext4 is built in.
_DRIVERS = ("virtio_pci", "virtio_blk")

_INITRAMFS_INIT = """#!/bin/busybox sh
mount -t devtmpfs dev /dev
for module in {modules}; do insmod /lib/$module; done
mount -t ext4 /dev/vda1 /root
exec switch_root /root /sbin/init
"""

_INIT = """#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -o remount,rw /
[ -x /autorun ] && /autorun
echo GUEST READY
export PS1='guest# ' HOME=/root
while :; do setsid cttyhack sh; done
"""


def kernel_release() -> str:
    """The newest installed cloud kernel. Raises RuntimeError if there is none."""
    releases = sorted(path.name.removeprefix("vmlinuz-") for path in _kernels())
    if not releases:
        raise RuntimeError("no cloud kernel in /boot: install linux-image-cloud-amd64")
    return releases[-1]


def _kernels() -> list[Path]:
    return list(Path("/boot").glob("vmlinuz-*-cloud-amd64"))


def versions() -> str:
    """What the image depends on besides this recipe, for the cache's key."""
    return f"{kernel_release()} {_BUSYBOX.stat().st_size}"


def build(result: Path, scratch: Path) -> None:
    """Write ``disk.raw``, ``vmlinuz`` and ``initrd`` to *result*; *scratch* is empty."""
    tree = scratch / "tree"
    for name in ("bin", "boot", "dev", "etc", "proc", "root", "sbin", "sys", "tmp"):
        (tree / name).mkdir(parents=True)
    _install_busybox(tree)
    _write_script(tree / "sbin/init", _INIT)
    shutil.copy(f"/boot/vmlinuz-{kernel_release()}", result / "vmlinuz")
    _make_initramfs(result / "initrd", scratch / "initramfs")
    for name in ("vmlinuz", "initrd"):
        shutil.copy(result / name, tree / "boot")
    write_payload(tree / "data", 1, PAYLOAD_FILES, PAYLOAD_FILE_SIZE)
    entry = BootEntry("/boot/vmlinuz", "/boot/initrd", KERNEL_ARGUMENTS)
    make_boot_disk(result / "disk.raw", tree, SIZE, entry)


def _install_busybox(tree: Path) -> None:
    shutil.copy(_BUSYBOX, tree / "bin/busybox")
    applets = subprocess.run([_BUSYBOX, "--list"], check=True, capture_output=True, text=True)
    for applet in applets.stdout.split():
        if applet not in ("busybox", "init"):
            (tree / "bin" / applet).symlink_to("busybox")


def _write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _make_initramfs(archive: Path, tree: Path) -> None:
    for name in ("bin", "dev", "lib", "root"):
        (tree / name).mkdir(parents=True)
    _install_busybox(tree)
    modules = _modules()
    for module in modules:
        shutil.copy(module, tree / "lib")
    names = [module.name for module in modules]
    _write_script(tree / "init", _INITRAMFS_INIT.format(modules=" ".join(names)))
    run("sh", "-ec", f"find . | sort | cpio -o -H newc -R 0:0 > '{archive}'", cwd=tree)


def _modules() -> list[Path]:
    """The drivers and what they depend on, in the order in which they must be loaded."""
    modules: dict[Path, None] = {}
    for driver in _DRIVERS:
        command = ["/sbin/modprobe", "-S", kernel_release(), "--show-depends", driver]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        modules |= {Path(line.split()[1]): None for line in output.splitlines()}
    return list(modules)
