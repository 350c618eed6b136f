# SPDX-License-Identifier: Apache-2.0
"""Real clients against the server: nbdinfo, nbdcopy, qemu-img, qemu-io, libnbd, fio."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from testbed.peers import assert_same, make_image, unix_uri
from tests.file_export import FileExport
from tests.memory_export import MemoryExport
from tests.server_support import client, clients_gone, in_thread, serving

SIZE = 20 << 20
UNIT = MemoryExport.granularity


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    make_image(path, SIZE)
    return path


@pytest.fixture
def disk(image: Path) -> Iterator[FileExport]:
    export = FileExport(image, description="a file")
    yield export
    export.close()


def content(path: Path) -> bytes:
    """All of a small file."""
    return path.read_bytes()


# --- nbdinfo ----------------------------------------------------------------------------


async def test_nbdinfo_lists_exports_with_all_they_offer(disk: FileExport) -> None:
    other = MemoryExport(4096, name="other/one", read_only=True)
    async with serving([disk, other]) as (_, path):
        found = json.loads(await client("nbdinfo", "--json", "--list", unix_uri(path)))
        exports = {export["export-name"]: export for export in found["exports"]}
        assert set(exports) == {"disk", "other/one"}
        one = exports["disk"]
        assert one["export-size"] == SIZE
        assert one["description"] == "a file"
        assert one["contexts"] == ["base:allocation", "qemu:allocation-depth", "nbdstream:local"]
        can = ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero")
        assert all(one[f"can_{what}"] for what in can)
        assert not one["is_read_only"]
        assert (one["block_size_minimum"], one["block_size_preferred"]) == (1, 4096)
        assert one["block_size_maximum"] == 32 << 20
        assert exports["other/one"]["is_read_only"]


async def test_nbdinfo_of_one_export_by_name_and_by_default(disk: FileExport) -> None:
    async with serving([disk]) as (_, path):
        for name in ("", "disk"):
            found = json.loads(await client("nbdinfo", "--json", unix_uri(path, name)))
            assert found["structured"]
            assert found["exports"][0]["export-size"] == SIZE


async def test_nbdinfo_maps_each_context() -> None:
    disk = MemoryExport(4 * UNIT)
    disk.data[2 * UNIT : 3 * UNIT] = bytes(UNIT)
    async with serving([disk]) as (_, path):

        async def mapped(context: str) -> list[tuple[int, int, int]]:
            shown = await client("nbdinfo", "--json", f"--map={context}", unix_uri(path))
            return [(e["offset"], e["length"], e["type"]) for e in json.loads(shown)]

        assert await mapped("base:allocation") == [
            (0, 2 * UNIT, 0),
            (2 * UNIT, UNIT, 3),
            (3 * UNIT, UNIT, 0),
        ]
        depths = [(unit * UNIT, UNIT, 1 + unit % 2) for unit in range(4)]
        assert await mapped("qemu:allocation-depth") == depths
        local = [(unit * UNIT, UNIT, (unit + 1) % 2) for unit in range(4)]
        assert await mapped("nbdstream:local") == local


# --- copies and comparisons -------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [(), ("--connections=4",), ("--synchronous",), ("--request-size=33554432",)]
)
async def test_nbdcopy_reads_and_writes(
    image: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    target = tmp_path / "target.raw"
    target.write_bytes(os.urandom(1 << 20) * (SIZE >> 20))  # everything must be overwritten
    source, sink = FileExport(image), FileExport(target)
    async with serving([source]) as (_, path):
        copied = tmp_path / "copied.raw"
        await client("nbdcopy", *options, unix_uri(path), copied)
        assert_same(image, copied)
    async with serving([sink]) as (_, path):
        await client("nbdcopy", "--flush", *options, image, unix_uri(path))
        await client("nbdcopy", "--flush", *options, image, unix_uri(path))
    assert_same(image, target)
    source.close()
    sink.close()


async def test_copies_through_misses_only(image: Path, tmp_path: Path) -> None:
    disk = MemoryExport(SIZE)
    disk.data[:] = content(image)
    disk.misses = True
    async with serving([disk]) as (_, path):
        await client("nbdcopy", unix_uri(path), tmp_path / "copied.raw")
        assert_same(image, tmp_path / "copied.raw")
        make_image(image, SIZE, seed=1)
        await client("nbdcopy", image, unix_uri(path))
    assert disk.data == content(image)


async def test_qemu_img_compares_converts_and_maps(disk: FileExport, image: Path) -> None:
    async with serving([disk]) as (_, path):
        uri = unix_uri(path, "disk")
        await in_thread(lambda: assert_same(image, uri))
        copied = image.with_name("copied.qcow2")
        await client("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, copied)
        await in_thread(lambda: assert_same(image, copied, "raw", "qcow2"))
        target = image.with_name("target.raw")
        target.write_bytes(bytes(SIZE))
        shown = await client("qemu-img", "map", "--output=json", "-f", "raw", uri)
        extents = json.loads(shown)
        assert sum(extent["length"] for extent in extents) == SIZE
        data = content(image)
        for extent in extents:
            if extent["zero"]:
                assert not any(data[extent["start"] : extent["start"] + extent["length"]])
        assert any(extent["zero"] for extent in extents)


async def test_qemu_img_convert_writes(image: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.raw"
    target.write_bytes(b"x" * SIZE)
    sink = FileExport(target)
    async with serving([sink]) as (_, path):
        await client("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, unix_uri(path))
    assert_same(image, target)
    sink.close()


async def test_qemu_io_verifies_what_it_wrote(disk: FileExport) -> None:
    commands = [
        "write -P 1 0 64k",
        "write -P 2 -f 4097 8191",
        "write -z 32k 16k",
        "write -z -u 128k 1M",
        "discard 60k 4k",
        "flush",
        "read -P 1 0 4097",
        "read -P 2 4097 8191",
        "read -P 0 32k 16k",
        "read -P 0 128k 1M",
        "aio_write -P 3 2M 2M",
        "aio_write -P 4 4M 64k",
        "aio_flush",
        "read -P 3 2M 2M",
        "read -P 4 4M 64k",
    ]
    argv = [part for command in commands for part in ("-c", command)]
    async with serving([disk]) as (_, path):
        shown = await client("qemu-io", "-f", "raw", *argv, unix_uri(path))
    assert "failed" not in shown
    assert "mismatch" not in shown


@pytest.mark.parametrize("connections", [1, 4])
async def test_fio_verifies_what_it_wrote(disk: FileExport, connections: int) -> None:
    async with serving([disk]) as (server, path):
        shown = await client(
            "fio",
            "--name=verify",
            "--ioengine=nbd",
            f"--uri={unix_uri(path)}",
            "--rw=randwrite",
            "--bsrange=512-256k",
            "--bs_unaligned=0",
            "--iodepth=16",
            f"--numjobs={connections}",
            f"--size={SIZE // connections}",
            f"--offset_increment={SIZE // connections}",
            "--verify=crc32c",
            "--verify_state_save=0",
            "--verify_fatal=1",
            "--output-format=json",
        )
        jobs = json.loads(shown[shown.index("{") :])["jobs"]
        assert [job["error"] for job in jobs] == [0] * connections
        assert all(job["write"]["total_ios"] > 0 and job["read"]["total_ios"] > 0 for job in jobs)
        await clients_gone(server)


# --- libnbd -----------------------------------------------------------------------------


def connected(path: Path, *, structured: bool = True, contexts: tuple[str, ...] = ()) -> Any:
    """A libnbd handle that sends even what it knows to be wrong."""
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.set_request_structured_replies(structured)
    for context in contexts:
        handle.add_meta_context(context)
    handle.connect_uri(unix_uri(path))
    return handle


@pytest.mark.parametrize("structured", [True, False])
async def test_every_command_with_every_flag(structured: bool) -> None:
    disk = MemoryExport(1 << 20)
    disk.data[8192:16384] = bytes(8192)
    expected = bytes(disk.data)

    def run() -> None:
        handle = connected(path, structured=structured)
        assert handle.get_structured_replies_negotiated() == structured
        assert handle.get_size() == disk.size
        assert handle.pread(100_000, 3) == expected[3:100_003]
        assert handle.pread(8192, 8192) == bytes(8192)
        if structured:
            assert handle.pread(16384, 4096, nbd.CMD_FLAG_DF) == expected[4096:20480]
        handle.pwrite(b"first", 10)
        handle.pwrite(b"second", 20, nbd.CMD_FLAG_FUA)
        handle.zero(4096, 30_000)
        handle.zero(4096, 40_960, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
        handle.zero(4096, 49_152, nbd.CMD_FLAG_FAST_ZERO)
        with pytest.raises(nbd.Error) as refused:
            handle.zero(100, 50_000, nbd.CMD_FLAG_FAST_ZERO)
        assert refused.value.errnum == errno.ENOTSUP
        handle.trim(4096, 100_000)
        handle.trim(4096, 100_000, nbd.CMD_FLAG_FUA)
        handle.cache(4096, 100_000)
        handle.flush()
        assert handle.pread(26, 0)[10:] == b"first" + expected[15:20] + b"second"
        assert handle.pread(4096, 30_000) == bytes(4096)
        handle.shutdown()

    async with serving([disk]) as (_, path):
        await in_thread(run)
    assert ("write", 20, 6, True) in disk.calls
    assert ("zero", 40_960, 4096, False, False, True) in disk.calls
    assert ("trim", 100_000, 4096, True) in disk.calls
    assert ("cache", 100_000, 4096) in disk.calls


@pytest.mark.parametrize("structured", [True, False])
async def test_errors_of_the_disk_reach_the_client(structured: bool) -> None:
    disk = MemoryExport(1 << 20)
    disk.error = OSError(errno.ENOSPC, "no room")

    def run() -> None:
        handle = connected(path, structured=structured)
        calls: list[Callable[[], object]] = [
            lambda: handle.pread(4096, 0),
            lambda: handle.pwrite(b"data", 0),
            lambda: handle.trim(4096, 0),
            lambda: handle.zero(4096, 0),
            lambda: handle.cache(4096, 0),
            lambda: handle.flush(),
        ]
        for call in calls:
            with pytest.raises(nbd.Error) as failed:
                call()
            assert failed.value.errnum == errno.ENOSPC
        disk.error = None
        assert handle.pread(4, 0) == b"nbd "
        handle.shutdown()

    async with serving([disk]) as (_, path):
        await in_thread(run)


@pytest.mark.parametrize("structured", [True, False])
async def test_requests_beyond_the_end_fail_and_the_connection_goes_on(structured: bool) -> None:
    disk = MemoryExport(1 << 20)

    def run() -> None:
        handle = connected(path, structured=structured)
        end = disk.size
        calls: list[tuple[Callable[[], object], int]] = [
            (lambda: handle.pread(2, end - 1), errno.EINVAL),
            (lambda: handle.pread(1, 1 << 62), errno.EINVAL),
            (lambda: handle.pwrite(b"xx", end - 1), errno.ENOSPC),
            (lambda: handle.zero(2, end - 1), errno.ENOSPC),
            (lambda: handle.trim(2, end - 1), errno.EINVAL),
            (lambda: handle.cache(1, end), errno.EINVAL),
            (lambda: handle.pread(0, 0), errno.EINVAL),
        ]
        for call, number in calls:
            with pytest.raises(nbd.Error) as failed:
                call()
            assert failed.value.errnum == number
        assert handle.pread(1, end - 1) == disk.data[-1:]
        handle.shutdown()

    async with serving([disk]) as (_, path):
        await in_thread(run)


async def test_a_read_only_export_refuses_changes() -> None:
    disk = MemoryExport(1 << 20, read_only=True)

    def run() -> None:
        handle = connected(path)
        assert handle.is_read_only()
        calls: list[Callable[[], object]] = [
            lambda: handle.pwrite(b"data", 0),
            lambda: handle.zero(4096, 0),
            lambda: handle.trim(4096, 0),
        ]
        for call in calls:
            with pytest.raises(nbd.Error) as failed:
                call()
            assert failed.value.errnum == errno.EPERM
        assert handle.pread(3, 0) == b"nbd"
        handle.shutdown()

    async with serving([disk]) as (_, path):
        await in_thread(run)


async def test_block_status_through_libnbd() -> None:
    disk = MemoryExport(8 * UNIT)
    disk.data[4 * UNIT :] = bytes(4 * UNIT)
    found: dict[str, list[int]] = {}

    def note(context: str, _offset: int, entries: list[int], _error: int) -> None:
        found[context] = entries

    def run() -> None:
        handle = connected(path, contexts=("base:allocation", "nbdstream:local", "x-what:ever"))
        assert handle.can_meta_context("nbdstream:local")
        assert not handle.can_meta_context("x-what:ever")
        handle.block_status(8 * UNIT, 0, note)
        assert found["base:allocation"] == [4 * UNIT, 0, 4 * UNIT, 3]
        assert found["nbdstream:local"] == [UNIT, 1, UNIT, 0] * 4
        handle.block_status(6 * UNIT, UNIT, note, nbd.CMD_FLAG_REQ_ONE)
        assert found == {"base:allocation": [3 * UNIT, 0], "nbdstream:local": [UNIT, 0]}
        handle.shutdown()

    async with serving([disk]) as (_, path):
        await in_thread(run)


async def test_what_one_connection_wrote_another_one_reads() -> None:
    disk = MemoryExport(1 << 20)

    def run() -> None:
        one, two = connected(path), connected(path)
        assert one.can_multi_conn()
        for value in range(50):
            one.pwrite(bytes([value]) * 512, 4096)
            one.flush()
            assert two.pread(512, 4096) == bytes([value]) * 512
        one.shutdown()
        two.shutdown()

    async with serving([disk]) as (server, path):
        await in_thread(run)
        await clients_gone(server)


async def test_the_longest_payload_both_ways() -> None:
    disk = MemoryExport(32 << 20)
    payload = os.urandom(1 << 20) * 32

    def run() -> None:
        handle = connected(path)
        handle.pwrite(payload, 0)
        assert handle.pread(len(payload), 0) == payload
        handle.shutdown()

    async with serving([disk]) as (_, path):
        await in_thread(run)


async def test_an_unknown_export_is_refused_by_name(disk: FileExport) -> None:
    def run() -> None:
        handle = nbd.NBD()
        with pytest.raises(nbd.Error) as refused:
            handle.connect_uri(unix_uri(path, "nowhere"))
        assert refused.value.errnum == errno.ENOENT

    async with serving([disk]) as (_, path):
        await in_thread(run)
