# SPDX-License-Identifier: Apache-2.0
"""What cannot be opened as a backing is refused in one clear line."""

from pathlib import Path

import pytest
import trio

from testbed import peers
from tests.backing_support import image_file, opens_with

image = pytest.fixture(image_file, scope="module")


async def test_no_server_there(tmp_path: Path) -> None:
    assert "no server listens" in await opens_with("nbd://127.0.0.1:1/")
    assert "no server listens" in await opens_with(peers.unix_uri(tmp_path / "none"))


async def test_no_such_export(image: Path) -> None:
    with peers.qemu_nbd(image, "raw", "--export-name", "disk", readonly=True) as peer:
        message = await opens_with(peers.unix_uri(peer.socket, "other"))
        assert "no export 'other'" in message
        assert "'disk'" in message


async def test_an_empty_export(tmp_path: Path) -> None:
    with peers.nbdkit("null", "0") as peer:
        assert "0 bytes" in await opens_with(peer.uri)


async def test_not_nbd_at_all(tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n" * 4)

    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, greet, [trio.SocketListener(listener)])
            assert "no NBD server" in await opens_with(peers.unix_uri(path))
            nursery.cancel_scope.cancel()


async def test_a_uri_that_makes_no_sense() -> None:
    assert "unknown kind" in await opens_with("gopher://host/image")
    assert "port makes no sense" in await opens_with("nbd://host:port/")
