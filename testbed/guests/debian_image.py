# SPDX-License-Identifier: Apache-2.0
"""The recipe of the real guest: Debian 12 with systemd, as small as it comes.

It boots with nothing but its disk: firmware, GRUB, the cloud kernel, Debian's own
initramfs, systemd, a getty that logs root in on the serial console. ``/srv/check`` holds a
few MiB to verify, ``/srv/payload`` enough incompressible data for streaming to take a
while; each has its SHA256SUMS.
"""

import os
from pathlib import Path

from testbed.guests.bootdisk import (
    FILESYSTEM_UUID,
    BootEntry,
    MiB,
    make_boot_disk,
    run,
    write_payload,
)

SIZE = 1536 * MiB
SUITE = "bookworm"
_PACKAGES = ["systemd-sysv", "dbus", "linux-image-cloud-amd64", "initramfs-tools", "udev", "kmod"]
_CHECK_FILES, _PAYLOAD_FILES = 8, 16
_CHECK_FILE_SIZE, _PAYLOAD_FILE_SIZE = MiB, 16 * MiB

# dpkg leaves out what no program in the guest reads.
_LEFT_OUT = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"]

_FILES = {
    "etc/hostname": "debian\n",
    "etc/fstab": f"UUID={FILESYSTEM_UUID} / ext4 defaults,discard 0 1\n",
    # Log root in without a password, on the serial console only.
    "etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf": (
        "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --noclear"
        " --keep-baud 115200 %I vt220\n"
    ),
}
# Nothing shall start by the clock in the middle of a measurement.
_MASKED_UNITS = ["apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "fstrim.timer"]


def mirror() -> str:
    """Where packages come from: ``$NBDSTREAM_DEBIAN_MIRROR``, or Debian's own mirrors."""
    return os.environ.get("NBDSTREAM_DEBIAN_MIRROR", "http://deb.debian.org/debian")


def versions() -> str:
    """What the image depends on besides this recipe, for the cache's key: nothing.

    A newer Debian would do as well, but is no reason to build the image again.
    """
    return ""


def build(result: Path, scratch: Path) -> None:
    """Write ``disk.raw`` to *result*; *scratch* is empty. Downloads some 100 MB."""
    archive, tree = scratch / "root.tar", scratch / "tree"
    options = [f"--dpkgopt=path-exclude={path}" for path in _LEFT_OUT]
    run(
        "mmdebstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", *options,
        SUITE, archive, mirror(),
    )  # fmt: skip
    tree.mkdir()
    write_payload(tree / "srv/check", 2, _CHECK_FILES, _CHECK_FILE_SIZE)
    write_payload(tree / "srv/payload", 3, _PAYLOAD_FILES, _PAYLOAD_FILE_SIZE)
    # Device nodes come from devtmpfs; our own files replace the archive's.
    unpack = f"tar -xf '{archive}' --exclude='./dev/*' && cp -a '{_overlay(scratch)}/.' ."
    # An emulated processor has no leaks to mitigate, only time to lose by it.
    arguments = "ro console=ttyS0 quiet systemd.show_status=1 mitigations=off"
    entry = BootEntry("/vmlinuz", "/initrd.img", arguments)
    make_boot_disk(result / "disk.raw", tree, SIZE, entry, unpack)


def _overlay(scratch: Path) -> Path:
    overlay = scratch / "overlay"
    for name, text in _FILES.items():
        path = overlay / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for unit in _MASKED_UNITS:
        (overlay / "etc/systemd/system" / unit).symlink_to("/dev/null")
    return overlay
