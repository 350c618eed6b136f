# SPDX-License-Identifier: Apache-2.0
"""Pre-shared keys for clients: the way that docs/security.md shows, by nbdkit in front."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbd
import pytest

from testbed.certificates import make_psk_file
from testbed.peers import (
    PeerError,
    assert_same,
    binary,
    make_image,
    nbdkit,
    nbdstream_serve,
    run,
    temporary_directory,
)
from testbed.remotes import free_port

MIB = 1 << 20


@dataclass(frozen=True)
class Door:
    """nbdkit with keys in front of a server, at ``port``."""

    port: int
    keys: Path
    far: Path


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    far = tmp_path / "far.raw"
    make_image(far, 8 * MIB)
    with temporary_directory() as directory:
        keys = make_psk_file(directory / "keys.psk", "alice")
        port = free_port()
        with nbdkit("file", far, readonly=True) as remote:
            with nbdstream_serve(tmp_path / "leaf.qcow2", remote.uri, "--stream", "off") as server:
                options = ["--tls=require", f"--tls-psk={keys}", "nbd", f"uri={server.uri}"]
                with nbdkit(*options, port=port):
                    yield Door(port, keys, far)


def connected(door: Door, user: str, keys: Path | None) -> nbd.NBD:
    client = nbd.NBD()
    if keys is not None:
        client.set_tls(nbd.TLS_REQUIRE)
        client.set_tls_psk_file(str(keys))
        client.set_tls_username(user)
    client.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    client.connect_tcp("127.0.0.1", str(door.port))
    return client


def test_libnbd_reads_and_writes_by_key(door: Door) -> None:
    client = connected(door, "alice", door.keys)
    content = door.far.read_bytes()
    assert client.pread(MIB, 4096) == content[4096 : MIB + 4096]
    client.pwrite(b"new" * 1000, 5 * MIB)
    client.flush()
    assert client.pread(3000, 5 * MIB) == b"new" * 1000
    assert client.can_multi_conn() and client.can_flush() and client.can_fua()
    assert client.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    client.shutdown()


def test_qemu_reads_by_key(door: Door) -> None:
    credentials = f"tls-creds-psk,id=tls0,endpoint=client,username=alice,dir={door.keys.parent}"
    node = f"driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={door.port}"
    shown = door.far.with_name("shown.raw")
    command = ["qemu-img", "convert", "--object", credentials, "--image-opts"]
    run([*command, f"{node},tls-creds=tls0", "-O", "raw", shown])
    assert_same(shown, door.far)


def test_who_has_no_key_is_not_served(door: Door, tmp_path: Path) -> None:
    with pytest.raises(nbd.Error):
        connected(door, "", None)
    with pytest.raises(nbd.Error):
        connected(door, "mallory", door.keys)
    with pytest.raises(nbd.Error):
        connected(door, "alice", make_psk_file(tmp_path / "other", "alice"))


def test_serve_names_the_way(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"Put nbdkit in front: .*--tls-psk=keys.*security\.md"):
        run([binary("NBDSTREAM"), "serve", tmp_path / "leaf.raw", "--tls-psk", "keys"])
