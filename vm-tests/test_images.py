# SPDX-License-Identifier: Apache-2.0
"""The guests themselves: they boot from their disks alone, local or over NBD."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdstream.guest.console import GuestCommandError
from nbdstream.guest.disks import Disk
from testbed.guests import images
from testbed.guests.systems import BUSYBOX, System, boot, check_filesystem, direct_boot
from testbed.peers import nbdkit

DATA = {True: "/data", False: "/srv/check"}


@pytest.fixture(params=["file", "nbdkit"])
def disk(request: pytest.FixtureRequest, system_disk: Path) -> Iterator[Disk]:
    if request.param == "file":
        yield Disk.file(system_disk)
    else:
        with nbdkit("file", system_disk) as server:
            yield Disk.nbd(server.uri)


async def test_a_guest_boots_reads_writes_and_ends_well(
    system: System, system_disk: Path, disk: Disk, console_log: Callable[[str], None]
) -> None:
    data = DATA[system is BUSYBOX]
    async with boot(system, disk, on_console=console_log) as guest:
        await guest.run(f"cd {data} && sha256sum -c SHA256SUMS")
        await guest.run("dd if=/dev/urandom of=/root/new bs=1M count=4 conv=fsync")
        checksum = (await guest.run("sha256sum < /root/new")).split()[0]
        await guest.power_off()
    check_filesystem(system_disk)
    async with boot(system, disk, on_console=console_log) as guest:
        assert (await guest.run("sha256sum < /root/new")).split()[0] == checksum
        await guest.run("rm /root/new && fstrim -v /")
        await guest.power_off()
    check_filesystem(system_disk)


def allocated(file: Path) -> int:
    """Bytes that *file* occupies."""
    return file.stat().st_blocks * 512


async def test_a_trim_in_the_guest_frees_space_in_the_image(
    busybox_image: Path, busybox_disk: Path
) -> None:
    async with boot(BUSYBOX, Disk.file(busybox_disk), extra=direct_boot(busybox_image)) as guest:
        before = allocated(busybox_disk)
        await guest.run("rm -r /data && sync && fstrim /")
        await guest.power_off()
    assert before - allocated(busybox_disk) > 20 << 20


async def test_a_wrong_checksum_in_the_guest_is_noticed(
    busybox_image: Path, busybox_disk: Path
) -> None:
    async with boot(BUSYBOX, Disk.file(busybox_disk), extra=direct_boot(busybox_image)) as guest:
        await guest.run("echo x >> /data/003.bin")
        with pytest.raises(GuestCommandError, match=r"003\.bin: FAILED"):
            await guest.run("cd /data && sha256sum -c SHA256SUMS")


def test_an_image_is_built_once(busybox_image: Path) -> None:
    built = (busybox_image / "disk.raw").stat()
    assert images.busybox() == busybox_image
    assert (busybox_image / "disk.raw").stat() == built
