# SPDX-License-Identifier: Apache-2.0
"""TLS towards a backing: nbdkit's and QEMU's servers, with certificates and pre-shared keys,
right and wrong ones, below libnbd and below QEMU's image formats."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import nbd
import pytest
import trio

from nbdstream.backing import Priority, open_backing
from nbdstream.backing.sources import anchored
from nbdstream.errors import BackingError, UsageError
from testbed.certificates import make_authority, make_psk_file
from testbed.peers import (
    Peer,
    assert_same,
    make_image,
    nbdkit,
    nbdstream_serve,
    qemu_nbd,
    run,
    temporary_directory,
)
from testbed.remotes import free_port

MIB = 1 << 20
SIZE = 3 * MIB
# What the server is told, by the prefix of the backing's URI.
FORMATS = ["", "qcow2+"]


@dataclass(frozen=True)
class Room:
    """Images and credentials of a module's tests.

    ``good`` belongs to the server and to clients that it knows; ``wrong`` comes from another
    authority.
    """

    directory: Path
    images: dict[str, Path]

    def __getitem__(self, name: str) -> Path:
        return self.directory / name

    @property
    def content(self) -> bytes:
        return self.images[""].read_bytes()

    def serve(
        self, prefix: str, *options: str, certificates: str = "good"
    ) -> AbstractContextManager[Peer]:
        """nbdkit that demands TLS, on TCP."""
        tls = ["--tls=require", f"--tls-certificates={self[certificates]}", *options]
        return nbdkit(*tls, "file", self.images[prefix], port=free_port())


@pytest.fixture(scope="module")
def room() -> Iterator[Room]:
    with temporary_directory() as directory:
        raw, qcow2 = directory / "image", directory / "image.qcow2"
        make_image(raw, SIZE, seed=3)
        run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, qcow2])
        authority = make_authority(directory / "authority")
        other = make_authority(directory / "other")
        for end in ("server", "client"):
            authority.issue(directory / "good", end)
            other.issue(directory / "wrong", end)
        authority.issue(directory / "expired", "server", expired=True)
        authority.issue(directory / "elsewhere", "server", name="elsewhere.example")
        make_psk_file(directory / "keys", "alice")
        yield Room(directory, {"": raw, "qcow2+": qcow2})


async def read_all(uri: str) -> bytes:
    with trio.fail_after(30):
        async with open_backing(uri) as backing:
            data = bytearray(backing.size)
            await backing.read(memoryview(data), 0, Priority.DEMAND)
            return bytes(data)


async def refusal(uri: str) -> str:
    """Why a backing cannot be opened: one line."""
    with pytest.raises(BackingError) as caught:
        await read_all(uri)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nbds(peer: Peer, query: str, prefix: str = "", user: str = "") -> str:
    """The URI of a server with TLS."""
    scheme, rest = peer.uri.split("://", 1)
    mark = "&" if "?" in rest else "?"
    at = f"{user}@" if user else ""
    return f"{prefix}{scheme.replace('nbd', 'nbds', 1)}://{at}{rest}{mark}{query}"


@pytest.mark.parametrize("prefix", FORMATS)
@pytest.mark.parametrize("options", [(), ("--tls-verify-peer",)], ids=["", "verify-peer"])
async def test_certificates(room: Room, prefix: str, options: tuple[str, ...]) -> None:
    with room.serve(prefix, *options) as peer:
        uri = nbds(peer, f"tls-certificates={room['good']}", prefix)
        assert await read_all(uri) == room.content


@pytest.mark.parametrize("prefix", FORMATS)
async def test_a_pre_shared_key(room: Room, prefix: str) -> None:
    psk = f"--tls-psk={room['keys']}"
    with nbdkit("--tls=require", psk, "file", room.images[prefix]) as peer:
        uri = nbds(peer, f"tls-psk-file={room['keys']}", prefix, user="alice")
        assert await read_all(uri) == room.content
        uri = nbds(peer, f"tls-psk-file={room['keys']}", prefix, user="bob")
        assert "bob" in await refusal(uri)
        other = make_psk_file(room["other-keys"], "alice")
        await refusal(nbds(peer, f"tls-psk-file={other}", prefix, user="alice"))


async def test_a_server_of_qemu(room: Room) -> None:
    creds = f"tls-creds-x509,id=tls0,endpoint=server,dir={room['good']},verify-peer=yes"
    tls = ["--object", creds, "--tls-creds", "tls0"]
    with qemu_nbd(room.images[""], "raw", *tls, port=free_port(), readonly=True) as peer:
        assert await read_all(nbds(peer, f"tls-certificates={room['good']}")) == room.content


@pytest.mark.parametrize("prefix", FORMATS)
@pytest.mark.parametrize("certificates", ["wrong", "expired", "elsewhere"])
async def test_a_server_that_is_not_who_it_should_be(
    room: Room, prefix: str, certificates: str
) -> None:
    with room.serve(prefix, certificates=certificates) as peer:
        words = await refusal(nbds(peer, f"tls-certificates={room['good']}", prefix))
        assert "certificate" in words.lower()
        unverified = nbds(peer, "tls-verify-peer=false", prefix)
        assert await read_all(unverified) == room.content


@pytest.mark.parametrize("prefix", FORMATS)
async def test_without_a_directory_the_systems_authorities_are_asked(
    room: Room, prefix: str
) -> None:
    """Libnbd before 1.20.3 would ask none at all."""
    with room.serve(prefix) as peer:
        assert "certificate" in (await refusal(nbds(peer, "", prefix))).lower()


@pytest.mark.parametrize("prefix", FORMATS)
async def test_a_client_without_a_certificate(room: Room, prefix: str) -> None:
    with room.serve(prefix, "--tls-verify-peer") as peer:
        bare = room["bare"]
        bare.mkdir(exist_ok=True)
        (bare / "ca-cert.pem").write_bytes((room["good"] / "ca-cert.pem").read_bytes())
        await refusal(nbds(peer, f"tls-certificates={bare}", prefix))


@pytest.mark.parametrize("prefix", FORMATS)
async def test_a_server_without_tls_is_not_spoken_to_in_clear(room: Room, prefix: str) -> None:
    with nbdkit("file", room.images[prefix], port=free_port()) as peer:
        await refusal(nbds(peer, f"tls-certificates={room['good']}", prefix))


async def test_a_certificate_on_a_unix_socket_has_no_name(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = ["--tls=require", f"--tls-certificates={room['good']}"]
    with nbdkit(*tls, "file", room.images[""]) as peer:
        query = f"tls-certificates={room['good']}"
        assert await read_all(nbds(peer, f"{query}&tls-verify-peer=false")) == room.content
        monkeypatch.setattr("nbdstream.backing.tls._checks", lambda _handle: False)
        assert "tls-verify-peer=false" in await refusal(nbds(peer, query))


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("nbd://localhost/?tls-certificates=/x", "nbds://"),
        ("nbd+unix:///?socket=/s&tls-psk-file=/x", "nbds://"),
        ("nbds://localhost/?tls-certificates=/x&tls-psk-file=/y", "give one of"),
        ("nbds://localhost/?tls-verify-peer=perhaps", "true or false"),
    ],
)
async def test_parameters_that_make_no_sense(uri: str, words: str) -> None:
    for prefix in FORMATS:
        with pytest.raises(UsageError, match=words):
            await read_all(prefix + uri)


@pytest.mark.parametrize("prefix", FORMATS)
async def test_a_directory_without_certificates(tmp_path: Path, prefix: str) -> None:
    words = await refusal(f"{prefix}nbds://localhost/?tls-certificates={tmp_path}")
    assert words == f"{tmp_path}: there is no ca-cert.pem in it"


async def test_a_server_name_that_this_libnbd_cannot_check(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Handle(nbd.NBD):  # type: ignore[misc]
        """One with the call of libnbd 1.20."""

        def set_tls_hostname(self, name: str) -> None:
            names.append(name)

    names: list[str] = []
    with room.serve("") as peer:
        query = f"tls-certificates={room['good']}&tls-hostname=localhost"
        if not hasattr(nbd.NBD, "set_tls_hostname"):
            assert "libnbd 1.20" in await refusal(nbds(peer, query))
        monkeypatch.setattr(nbd, "NBD", Handle)
        assert await read_all(nbds(peer, query)) == room.content
        assert set(names) == {"localhost"}


async def test_qemu_checks_a_name_that_is_not_the_hosts(room: Room) -> None:
    """QEMU's own client can, whatever libnbd's version: it looks at the image by itself."""
    with room.serve("qcow2+", certificates="elsewhere") as peer:
        query = f"tls-certificates={room['good']}&tls-hostname=elsewhere.example"
        assert await read_all(nbds(peer, query, "qcow2+")) == room.content


def test_relative_paths_of_credentials_are_taken_from_where_the_user_was() -> None:
    here = Path("/srv")
    uri = "nbds://host:1/x?tls-certificates=pki"
    assert anchored(uri, here) == "nbds://host:1/x?tls-certificates=%2Fsrv%2Fpki"
    assert anchored(f"qcow2+{uri}", here) == f"qcow2+{anchored(uri, here)}"
    for same in ("nbds://host/x?tls-certificates=/pki", "nbds://host/x", "nbd://host"):
        assert anchored(same, here) == same


def test_a_leaf_streams_over_tls_and_goes_on_later(room: Room, tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.qcow2"
    with room.serve("") as peer:
        uri = nbds(peer, f"tls-certificates={room['good']}")
        with nbdstream_serve(leaf, uri, "--stream", "off") as server:
            run(["nbdinfo", server.uri])
        with nbdstream_serve(leaf, None, "--exit-when-complete") as server:
            assert server.wait(30) == 0
    assert_same(leaf, room.images[""], "qcow2")
