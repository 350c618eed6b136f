# SPDX-License-Identifier: Apache-2.0
"""Backings in object storage and behind SSH, from real servers."""

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import nbd
import pytest
import trio

from nbdstream.backing import fingerprint, open_backing
from nbdstream.errors import BackingError
from testbed.peers import (
    READY_SECONDS,
    Peer,
    PeerError,
    assert_same,
    nbdstream_serve,
    run,
    started,
)
from testbed.processes import children
from testbed.remotes import ObjectStore, SshServer, s3_server, ssh_server
from tests.backing_support import MIB, image_file, read

image = pytest.fixture(image_file, scope="module")


@pytest.fixture(scope="module")
def store(image: Path) -> Iterator[ObjectStore]:
    with s3_server() as server:
        server.put("images")
        server.put("images", "disks/image.raw", image.read_bytes())
        yield server


@pytest.fixture
def aws(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    return store


@pytest.fixture
def ssh() -> Iterator[SshServer]:
    with ssh_server() as server:
        yield server


def serve(ssh: SshServer, leaf: Path, backing: str, *options: str) -> AbstractContextManager[Peer]:
    """`nbdstream serve` as a user whom the SSH server knows."""
    return nbdstream_serve(leaf, backing, *options, prefix=ssh.prefix)


async def assert_serves(uri: str, image: Path) -> None:
    content = image.read_bytes()  # noqa: ASYNC240
    with trio.fail_after(30):
        async with open_backing(uri) as backing:
            assert backing.size == len(content)
            assert await read(backing, 0, backing.size) == content
            assert await read(backing, MIB + 5, 1000) == content[MIB + 5 : MIB + 1005]
            assert (await fingerprint(backing)).startswith("s1:")


@pytest.mark.usefixtures("aws")
async def test_an_object(image: Path) -> None:
    await assert_serves("s3://images/disks/image.raw", image)


async def test_a_chain_from_two_kinds_of_servers(
    image: Path, aws: ObjectStore, ssh: SshServer, tmp_path: Path
) -> None:
    top, shown = tmp_path / "top.qcow2", tmp_path / "shown.raw"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "raw", top])
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 9 100k 1M", top])
    run(["qemu-img", "convert", "-O", "raw", top, shown])
    uri = f"qcow2+{ssh.uri(top)} on s3://images/disks/image.raw"
    with serve(ssh, tmp_path / "leaf.qcow2", uri) as peer:
        assert_same(peer.uri, shown)


@pytest.mark.usefixtures("aws")
@pytest.mark.parametrize("uri", ["s3://images/none", "s3://nowhere/image.raw"])
async def test_an_object_that_is_not_there(uri: str) -> None:
    with pytest.raises(BackingError) as caught, trio.fail_after(30):
        async with open_backing(uri):
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("aws")
def test_a_leaf_streams_from_an_object(image: Path, tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.raw"
    with nbdstream_serve(leaf, "s3://images/disks/image.raw", "--exit-when-complete") as server:
        assert server.wait(30) == 0
    assert_same(leaf, image)


def test_a_leaf_streams_by_ssh(ssh: SshServer, image: Path, tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.raw"
    with serve(ssh, leaf, ssh.uri(image), "--exit-when-complete") as server:
        assert server.wait(30) == 0
    assert_same(leaf, image)


def test_an_image_format_by_ssh(ssh: SshServer, image: Path, tmp_path: Path) -> None:
    path, leaf = tmp_path / "image.qcow2", tmp_path / "leaf.raw"
    run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", image, path])
    with serve(ssh, leaf, f"qcow2+{ssh.uri(path)}") as server:
        assert_same(server.uri, image)


def refusal(ssh: SshServer, path: Path, directory: Path) -> str:
    """What `serve` says of a backing that it cannot open: one line."""
    with pytest.raises(PeerError) as caught, serve(ssh, directory / "l.raw", ssh.uri(path)):
        pass
    words = [line for line in str(caught.value).splitlines() if "nbdstream: error" in line]
    assert len(words) == 1
    return words[0]


def test_a_file_that_ssh_does_not_have(ssh: SshServer, tmp_path: Path) -> None:
    assert "o such file" in refusal(ssh, tmp_path / "none", tmp_path)


def test_an_ssh_server_that_does_not_know_us(ssh: SshServer, image: Path, tmp_path: Path) -> None:
    (ssh.client / "id_ed25519").unlink()
    assert "auth" in refusal(ssh, image, tmp_path)


def test_a_key_that_only_the_agent_has(
    ssh: SshServer, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket, key = ssh.client / "agent", ssh.client / "id_ed25519"
    with started(["ssh-agent", "-D", "-a", str(socket)], tmp_path) as agent:
        agent.wait_until(socket.exists, "socket", READY_SECONDS)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        run(["ssh-add", "-q", key])
        key.unlink()
        with serve(ssh, tmp_path / "leaf.raw", ssh.uri(image)) as server:
            assert_same(server.uri, image)


def test_an_ssh_server_that_we_do_not_know(ssh: SshServer, image: Path, tmp_path: Path) -> None:
    (ssh.client / "known_hosts").write_text("")
    assert "host key" in refusal(ssh, image, tmp_path)


def test_reads_wait_for_an_ssh_connection_that_was_lost(
    ssh: SshServer, image: Path, tmp_path: Path
) -> None:
    leaf = tmp_path / "leaf.raw"
    with serve(ssh, leaf, ssh.uri(image), "--stream", "off") as server:
        with nbd_client(server.uri) as client:
            client.pread(4096, 0)
            for pid in children(ssh.peer.pid):
                os.kill(pid, signal.SIGKILL)
            assert client.pread(65536, 2 * MIB) == image.read_bytes()[2 * MIB :][:65536]


@contextmanager
def nbd_client(uri: str) -> Iterator[Any]:
    """A libnbd handle."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    yield handle
    handle.shutdown()
