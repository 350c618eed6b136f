# SPDX-License-Identifier: Apache-2.0
"""What is recorded of a boot, when that ends, and what becomes of it."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from nbdstream.backing.base import Priority
from nbdstream.disk import StreamedDisk, open_disk
from nbdstream.export import Hit
from nbdstream.leaf.base import BackingReference
from nbdstream.streamer.profile import Profile, Range, read_profile, write_profile
from nbdstream.streamer.recorder import (
    BYTES_LEAST,
    LOOK_INTERVAL,
    QUIET_TIME,
    RECORD_TIME,
    record_boot,
)
from tests.doubles import MemoryLeaf
from tests.far_backing import FarBacking

KIB = 1024
MIB = 1024 * KIB
SIZE = 16 * MIB
CLUSTER = 64 * KIB
CONTENT = random.Random(3).randbytes(SIZE)
REFERENCE = BackingReference("memory:", "raw", SIZE, "s1:abc")


@asynccontextmanager
async def booting(path: Path, *, backing: bool = True) -> AsyncIterator[StreamedDisk]:
    """A disk whose boot is recorded beside ``path``."""
    leaf = MemoryLeaf(SIZE, block_size=4 * KIB, cluster_size=CLUSTER)
    leaf.path = str(path)
    leaf.backing = REFERENCE if backing else None
    far = FarBacking(CONTENT, rate=100e6, rtt=0.001) if backing else None
    async with open_disk(leaf, far) as disk, trio.open_nursery() as nursery:
        nursery.start_soon(record_boot, disk)
        while backing and disk.on_read is None and not path_of(path).exists():
            await trio.lowlevel.checkpoint()  # a worker looks for an old profile
        yield disk
        nursery.cancel_scope.cancel()
    leaf.close()


def path_of(leaf: Path) -> Path:
    return leaf.with_name(leaf.name + ".profile")


async def read(disk: StreamedDisk, offset: int, length: int = 4 * KIB) -> None:
    view = memoryview(bytearray(length))
    if disk.read_nowait(view, offset) is Hit.MISS:
        await disk.read(view, offset)


ORDER = random.Random(4).sample(range(SIZE // CLUSTER - 1), 40)


async def boot(disk: StreamedDisk) -> None:
    for unit in ORDER:
        await read(disk, unit * CLUSTER + 8 * KIB)
        await read(disk, ORDER[0] * CLUSTER)  # again and again


async def written(disk: StreamedDisk) -> Profile:
    """The profile, once the worker that writes it is done: virtual time does not wait for it."""
    path = path_of(Path(disk.leaf.path))
    while not path.exists():
        await trio.lowlevel.checkpoint()
    assert disk.on_read is None
    return read_profile(str(path))


def units(profile: Profile) -> list[int]:
    return [
        unit
        for offset, length in profile.ranges
        for unit in range(offset // CLUSTER, (offset + length) // CLUSTER)
    ]


async def test_the_order_of_first_touch_is_recorded(tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.raw"
    async with booting(leaf) as disk:
        await disk.populate(ORDER[5] * CLUSTER, CLUSTER, Priority.STREAM)  # hits count too
        await boot(disk)
    profile = read_profile(str(path_of(leaf)))
    assert units(profile) == ORDER
    assert (profile.backing_size, profile.backing_identity) == (SIZE, "s1:abc")
    assert profile.unit == CLUSTER
    assert not profile.complete  # it was ended before


async def test_what_a_write_has_to_fetch_counts_other_writes_do_not(tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.raw"
    async with booting(leaf) as disk:
        await boot(disk)
        rest = [unit for unit in range(SIZE // CLUSTER) if unit not in ORDER]
        await disk.write(memoryview(b"w" * 4 * KIB), rest[0] * CLUSTER, fua=False)
        await disk.write(memoryview(b"w"), rest[9] * CLUSTER + 1, fua=False)
        await disk.trim(rest[3] * CLUSTER, CLUSTER, fua=False)
    assert units(read_profile(str(path_of(leaf)))) == [*ORDER, rest[9]]


async def test_it_ends_when_the_guest_is_quiet(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    leaf = tmp_path / "leaf.raw"
    async with booting(leaf) as disk:
        await trio.sleep(1000)  # it waits for the first read for as long as it takes
        await boot(disk)
        await trio.sleep(QUIET_TIME / 2)
        await read(disk, (SIZE // CLUSTER - 1) * CLUSTER)
        await trio.sleep(QUIET_TIME + 3 * LOOK_INTERVAL)
        profile = await written(disk)
        assert profile.complete
        assert QUIET_TIME / 2 <= profile.seconds < QUIET_TIME
        assert units(profile) == [*ORDER, SIZE // CLUSTER - 1]
        await read(disk, 64 * KIB)
    assert read_profile(str(path_of(leaf))) == profile


async def test_it_ends_after_a_time_however_busy_the_guest_is(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with booting(tmp_path / "leaf.raw") as disk:
        others = [unit for unit in range(SIZE // CLUSTER) if unit not in ORDER]
        await boot(disk)
        start = trio.current_time()
        while disk.on_read is not None:
            if others:
                await read(disk, others.pop(-1 if len(others) % 2 else 0) * CLUSTER)
            await trio.sleep(min(QUIET_TIME / 2, RECORD_TIME / 30))
        assert trio.current_time() - start < RECORD_TIME + QUIET_TIME
        profile = await written(disk)
        assert profile.complete and profile.bytes < SIZE


async def only_the_boot_is_recorded(disk: StreamedDisk) -> None:
    """What was read so far is dropped once the disk is quiet, and then a guest boots."""
    await trio.sleep(QUIET_TIME * 2)
    assert disk.on_read is not None
    await boot(disk)
    await trio.sleep(QUIET_TIME * 2)
    assert units(await written(disk)) == ORDER


async def test_a_look_at_the_disk_is_no_boot(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    leaf = tmp_path / "leaf.raw"
    async with booting(leaf) as disk:
        for offset in range(0, BYTES_LEAST - CLUSTER, CLUSTER):
            await read(disk, SIZE - CLUSTER - offset)
        await only_the_boot_is_recorded(disk)
    async with booting(tmp_path / "other.raw") as disk:
        await read(disk, 0)
    assert not path_of(tmp_path / "other.raw").exists()


async def test_a_copy_is_no_boot(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with booting(tmp_path / "leaf.raw") as disk:
        for offset in range(0, SIZE, CLUSTER):
            await read(disk, offset, CLUSTER)
        await only_the_boot_is_recorded(disk)
    async with booting(tmp_path / "other.raw") as disk:
        for offset in range(0, SIZE, CLUSTER):
            await read(disk, offset, CLUSTER)
    assert not path_of(tmp_path / "other.raw").exists()


async def test_a_complete_profile_is_left_alone_and_one_cut_short_is_improved(
    tmp_path: Path,
) -> None:
    leaf = tmp_path / "leaf.raw"
    name = str(path_of(leaf))
    mine = Profile(SIZE, "s1:abc", CLUSTER, 1.0, True, (Range(0, 2 * BYTES_LEAST),))
    write_profile(name, mine)
    async with booting(leaf) as disk:
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        await boot(disk)
    assert read_profile(name) == mine

    async def boot_again() -> Profile:
        async with booting(leaf) as disk:
            while disk.on_read is None:
                await trio.lowlevel.checkpoint()
            await boot(disk)
        return read_profile(name)

    shorter = replace(mine, complete=False)
    write_profile(name, shorter)
    assert units(await boot_again()) == ORDER
    longer = replace(shorter, ranges=(Range(0, SIZE),))
    write_profile(name, longer)
    assert await boot_again() == longer


async def test_a_damaged_profile_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leaf = tmp_path / "leaf.raw"
    path_of(leaf).write_text("my notes\n")
    async with booting(leaf) as disk:
        while not caplog.records:
            await trio.lowlevel.checkpoint()
        await boot(disk)
    assert path_of(leaf).read_text() == "my notes\n"
    assert "not a boot profile" in caplog.text


async def test_a_profile_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "gone"
    directory.mkdir()
    async with booting(directory / "leaf.raw") as disk:
        await boot(disk)
        directory.rmdir()
    assert "cannot keep the boot profile" in caplog.text


async def test_a_disk_without_a_backing_has_no_profile(tmp_path: Path) -> None:
    async with booting(tmp_path / "leaf.raw", backing=False) as disk:
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        assert disk.on_read is None
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240


async def test_what_lies_beyond_the_backing_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 10 * MIB + 512
    reference = BackingReference("memory:", "raw", size, "s1:abc")
    monkeypatch.setattr("tests.test_profile_recorder.REFERENCE", reference)
    leaf = tmp_path / "leaf.raw"
    async with booting(leaf) as disk:
        for unit in reversed(range(SIZE // CLUSTER)):
            await read(disk, unit * CLUSTER)
    profile = read_profile(str(path_of(leaf)))
    assert profile.ranges[0] == (10 * MIB, 512)
    assert profile.backing_size == size and profile.bytes == size
