# SPDX-License-Identifier: Apache-2.0
"""The NBD backing against real servers."""

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from nbdstream.backing import Backing, Priority, fingerprint, open_backing
from nbdstream.backing import connection as connection_module
from nbdstream.backing import pool as pool_module
from nbdstream.errors import (
    BackingError,
    BackingGoneError,
    BackingMismatchError,
    UsageError,
)
from testbed import peers
from testbed.link.control import link_process
from testbed.link.model import Shape
from tests.backing_support import MIB, SIZE, content_of, image_file, opens_with, read, until

image = pytest.fixture(image_file, scope="module")
content = pytest.fixture(content_of, scope="module")


async def read_all(backing: Backing) -> bytes:
    """Everything, the way the stream job does it."""
    data = bytearray(backing.size)
    view = memoryview(data)
    async with trio.open_nursery() as nursery:
        offset = 0
        while offset < backing.size:
            grant = await backing.wait_for_room(Priority.STREAM)
            unit = min(grant.length, backing.size - offset)
            part = view[offset : offset + unit]
            nursery.start_soon(backing.read, part, offset, Priority.STREAM, grant)
            offset += unit
    return bytes(data)


SERVERS = {
    "nbdkit": lambda path: peers.nbdkit("file", path),
    "nbdkit, single connection": lambda path: peers.nbdkit(
        "file", path, "multi-conn-mode=disable", filters=["multi-conn"]
    ),
    "qemu-nbd": lambda path: peers.qemu_nbd(path, readonly=True),
    "simple replies": lambda path: peers.nbdkit("--no-sr", "file", path),
    "blocks of 4 KiB": lambda path: peers.nbdkit(
        "file",
        path,
        "blocksize-minimum=512",
        "blocksize-maximum=65536",
        "blocksize-error-policy=error",
        filters=["blocksize-policy"],
    ),
}


@pytest.mark.parametrize("server", SERVERS)
async def test_reads_what_is_there(image: Path, content: bytes, server: str) -> None:
    with SERVERS[server](image) as peer:
        async with open_backing(peer.uri) as backing:
            assert backing.size == SIZE
            assert await read_all(backing) == content
            for offset, length in (
                (0, 1),
                (511, 3),
                (SIZE - 1, 1),
                (SIZE - 700, 700),
                (4097, 99999),
            ):
                assert await read(backing, offset, length) == content[offset : offset + length]
            statistics = backing.statistics()
            assert statistics.bytes["stream"] == SIZE
            assert statistics.requests["demand"] == 5
            assert statistics.in_flight == 0
            assert statistics.retries == 0


@pytest.mark.parametrize("server", SERVERS)
async def test_extents_never_call_data_zero(image: Path, content: bytes, server: str) -> None:
    with SERVERS[server](image) as peer:
        async with open_backing(peer.uri) as backing:
            assert not backing.known_zero(0, 1)
            offset = zeroes = 0
            while offset < SIZE:
                for extent in await backing.extents(offset, SIZE - offset):
                    assert extent.offset == offset
                    assert extent.length > 0
                    offset = extent.end
                    if extent.zero:
                        zeroes += extent.length
                        assert not any(content[extent.offset : extent.end])
                        assert backing.known_zero(extent.offset, extent.length)
            assert offset == SIZE
            if server != "simple replies":
                assert zeroes > 0
            assert len(await backing.extents(1000, 24)) == 1


async def test_out_of_bounds_is_the_callers_mistake(image: Path) -> None:
    with peers.nbdkit("file", image) as peer:
        async with open_backing(peer.uri) as backing:
            with pytest.raises(UsageError):
                await read(backing, SIZE - 10, 11)


# --- identity ---------------------------------------------------------------------------


async def test_fingerprint_is_that_of_content_and_size(
    image: Path, content: bytes, tmp_path: Path
) -> None:
    async def of(path: Path) -> str:
        with peers.nbdkit("file", path) as peer:
            async with open_backing(peer.uri) as backing:
                return await fingerprint(backing)

    same, other, longer = (tmp_path / name for name in ("same", "other", "longer"))
    same.write_bytes(content)
    other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    longer.write_bytes(content + bytes(512))
    assert await of(image) == await of(same)
    assert (await of(image)).startswith("s1:")
    assert len({await of(image), await of(other), await of(longer)}) == 3


async def test_another_image_is_refused_at_open(image: Path) -> None:
    with peers.nbdkit("file", image) as peer:
        with pytest.raises(BackingMismatchError, match="bytes"):
            async with open_backing(peer.uri, size=SIZE + 1):
                pass
        with pytest.raises(BackingMismatchError, match="fingerprint"):
            async with open_backing(peer.uri, size=SIZE, identity="s1:00"):
                pass


async def test_another_image_after_a_restart_is_refused_for_good(
    image: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_bytes(os.urandom(SIZE))
    with peers.temporary_directory() as directory:
        path = directory / "nbd"
        with peers.nbdkit("file", image, socket_path=path) as peer:
            async with open_backing(peer.uri) as backing:
                backing.expect(await fingerprint(backing))
                peer.kill()
                with peers.nbdkit("file", other, socket_path=path):
                    with pytest.raises(BackingMismatchError):
                        await read(backing, 0, 512)
                # The right one does not help any more: who knows what was read meanwhile.
                with peers.nbdkit("file", image, socket_path=path):
                    with pytest.raises(BackingMismatchError):
                        await read(backing, 0, 512)


# --- trouble ----------------------------------------------------------------------------


async def test_reads_wait_for_a_server_that_comes_back(image: Path, content: bytes) -> None:
    got: list[bytes] = []
    with peers.temporary_directory() as directory:
        path = directory / "nbd"
        with peers.nbdkit("file", image, socket_path=path) as peer:
            async with open_backing(peer.uri) as backing:
                await read(backing, 0, 512)
                peer.kill()

                async def wait_and_read() -> None:
                    got.append(await read(backing, 1000, 5000))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait_and_read)
                    await until(lambda: not backing.statistics().connected)
                    assert not got
                    with peers.nbdkit("file", image, socket_path=path) as second:
                        await until(lambda: got)
                        second.kill()
                assert got == [content[1000:6000]]
                assert backing.statistics().reconnects >= 1


async def test_a_timeout_ends_the_waiting(image: Path) -> None:
    with peers.nbdkit("file", image) as peer:
        async with open_backing(peer.uri, timeout=0.3) as backing:
            peer.kill()
            with trio.fail_after(10), pytest.raises(BackingGoneError, match=r"0\.3 s"):
                await read(backing, 0, 512)
            with trio.fail_after(1), pytest.raises(BackingGoneError):
                await read(backing, 0, 512)


async def test_what_is_expected_can_be_opened_while_out_of_reach(
    image: Path, content: bytes
) -> None:
    with peers.temporary_directory() as directory:
        path = directory / "nbd"
        with peers.nbdkit("file", image, socket_path=path) as peer:
            async with open_backing(peer.uri) as backing:
                identity = await fingerprint(backing)
            peer.kill()
            async with open_backing(peer.uri, size=SIZE, identity=identity) as backing:
                assert not backing.statistics().connected
                with peers.nbdkit("file", image, socket_path=path) as second:
                    with trio.fail_after(20):
                        assert await read(backing, 0, 512) == content[:512]
                    second.kill()


async def test_errors_of_the_server_are_retried_and_never_data(
    image: Path, content: bytes, tmp_path: Path
) -> None:
    trigger = tmp_path / "fail"
    trigger.touch()
    with peers.nbdkit(
        "file", image, "error-pread=EIO", "error-pread-rate=100%",
        f"error-pread-file={trigger}", filters=["error"],
    ) as peer:  # fmt: skip
        async with open_backing(peer.uri, timeout=0.5) as backing:
            with trio.fail_after(20), pytest.raises(BackingGoneError, match="error"):
                await read(backing, 0, 512)
            assert backing.statistics().retries > 0
            trigger.unlink()
            assert await read(backing, 0, 512) == content[:512]


@pytest.mark.parametrize("trouble", ["reset", "blackhole", "stall"])
async def test_a_lost_link_is_replaced(
    image: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.setattr(pool_module, "PATIENCE_FIRST", 0.5)
    got: list[bytes] = []
    with (
        peers.nbdkit("file", image) as peer,
        link_process("127.0.0.1:0", f"unix:{peer.socket}", Shape(rate=100e6, delay=0.005)) as link,
    ):
        async with open_backing(link.uri()) as backing:

            async def read_it() -> None:
                got.append(await read_all(backing))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_it)
                await until(lambda: backing.statistics().bytes["stream"] > MIB)
                link.command("stall" if trouble == "stall" else f"cut {trouble}")
                await until(lambda: backing.statistics().retries)
                if trouble != "reset":
                    await until(lambda: "nothing came" in backing.statistics().last_error)
                assert not got
                link.command("resume" if trouble == "stall" else "restore")
                await until(lambda: got)
            assert got == [content]


async def test_a_cancelled_read_leaves_the_buffer_alone(image: Path) -> None:
    with peers.nbdkit("file", image, "rdelay=300ms", filters=["delay"]) as peer:
        async with open_backing(peer.uri) as backing:
            data = bytearray(b"x" * 4096)
            with trio.move_on_after(0.05):
                await backing.read(memoryview(data), 0, Priority.DEMAND)
            kept = bytes(data)
            await trio.sleep(0.5)
            assert bytes(data) == kept
            data.append(0)  # the buffer is not held
            assert backing.statistics().in_flight == 0


async def test_a_cancelled_read_gives_up_a_connection_that_does_not_answer(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "CANCEL_GRACE", 0.05)
    with peers.nbdkit("file", image, "rdelay=3600", filters=["delay"]) as peer:
        async with open_backing(peer.uri) as backing:
            data = bytearray(4096)
            with trio.fail_after(5):
                with trio.move_on_after(0.05):
                    await backing.read(memoryview(data), 0, Priority.DEMAND)
            data.append(0)
            peer.kill()


async def test_closing_ends_reads_at_once(image: Path) -> None:
    failures: list[BackingError] = []
    with peers.nbdkit("file", image, "rdelay=3600", filters=["delay"]) as peer:
        async with trio.open_nursery() as nursery:
            async with open_backing(peer.uri) as backing:

                async def wait() -> None:
                    try:
                        await read(backing, 0, 512)
                    except BackingGoneError as error:
                        failures.append(error)

                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
            await until(lambda: failures)
        peer.kill()


async def test_tls(image: Path, content: bytes, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("guest:" + 32 * "5a" + "\n")
    with peers.nbdkit("--tls=require", f"--tls-psk={keys}", "file", image) as peer:
        uri = f"nbds+unix://guest@/?socket={peer.socket}&tls-psk-file={keys}"
        async with open_backing(uri) as backing:
            # Idle connections have session tickets waiting in their sockets.
            await trio.sleep(0.1)
            assert await read_all(backing) == content
            await trio.sleep(0.1)
            assert await read(backing, 0, 512) == content[:512]
        assert "wants TLS" in await opens_with(peer.uri)
