# SPDX-License-Identifier: Apache-2.0
"""`serve --store --thin`: leaves that stay overlays on the store's image."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from testbed.hosts import Host, client, host_of_random_data, wait_until
from testbed.peers import Peer, PeerError, assert_same, binary, run
from tests.store_support import image

MIB = 1 << 20
SIZE = 16 * MIB + 4096
THIN = ("--thin", "--stream", "off")

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Host]:
    with host_of_random_data(tmp_path, SIZE) as host:
        yield host


def pull(place: Host) -> None:
    image("pull", place.uri, "--store", place.store, "--wait")


def local_ranges(server: Peer) -> list[tuple[int, int]]:
    """The (offset, length) of what the leaf has itself."""
    found = run([binary("NBDINFO"), "--map=nbdstream:local", server.uri])
    parts = [line.split() for line in found.splitlines()]
    return [(int(offset), int(length)) for offset, length, flags, *_ in parts if flags == "1"]


@pytest.mark.parametrize(
    ("suffix", "pulled"), [("qcow2", False), ("qcow2", True), ("qed", True), ("raw", False)]
)
def test_nothing_is_copied_into_a_thin_leaf(place: Host, suffix: str, pulled: bool) -> None:
    if pulled:
        pull(place)
    leaf = place.leaves / f"leaf.{suffix}"
    content = bytearray(place.source.read_bytes())
    with place.guest(leaf.name, *THIN) as server:
        assert_same(server.uri, place.source)
        with client(server.uri) as handle:
            for offset, data in ((5 * MIB, b"w" * 65536), (7 * MIB + 50, b"x" * 100)):
                handle.pwrite(data, offset)
                content[offset : offset + len(data)] = data
            handle.zero(65536, 6 * MIB)
            content[6 * MIB : 6 * MIB + 65536] = bytes(65536)
            handle.cache(MIB, 8 * MIB)
            for offset, length in ((5 * MIB - 512, 128 << 10), (6 * MIB, MIB), (7 * MIB, 4096)):
                assert handle.pread(length, offset) == content[offset : offset + length]
        assert server.terminate() == 0
    assert leaf.stat().st_blocks * 512 < MIB
    with place.guest(leaf.name, *THIN) as server, client(server.uri) as handle:
        assert handle.pread(4 * MIB, 5 * MIB) == content[5 * MIB : 9 * MIB]


def test_guests_read_what_another_one_has_fetched_without_the_images_process(place: Host) -> None:
    """At once, before it is durable: the process stands still, and they do not notice."""
    content = place.source.read_bytes()
    with ExitStack() as stack:
        servers = [stack.enter_context(place.guest(f"leaf{n}.qcow2", *THIN)) for n in range(3)]
        clients = [stack.enter_context(client(server.uri)) for server in servers]
        assert clients[0].pread(MIB, 4 * MIB) == content[4 * MIB : 5 * MIB]
        reads = len(place.fetched())
        (process,) = place.processes()
        os.kill(process, signal.SIGSTOP)
        try:
            for handle in clients:
                assert handle.pread(MIB, 4 * MIB) == content[4 * MIB : 5 * MIB]
        finally:
            os.kill(process, signal.SIGCONT)
        assert len(place.fetched()) == reads


@pytest.mark.parametrize("thin", [THIN, ("--stream", "off")], ids=["thin", "filled"])
def test_a_store_without_space_passes_data_on(place: Host, thin: tuple[str, ...]) -> None:
    """The image's file cannot take what is fetched; guests get it all the same."""
    content = place.source.read_bytes()
    with place.guest("leaf.qcow2", *thin) as server, client(server.uri) as handle:
        assert handle.pread(4096, 0) == content[:4096]
        (process,) = place.processes()
        limit = f"--fsize={6 * MIB}"  # of any file: what is beyond fails (EFBIG)
        subprocess.run(["prlimit", "--pid", str(process), limit], check=True)
        for offset in (4 * MIB, 9 * MIB, 9 * MIB + 65536, 12 * MIB):
            assert handle.pread(4096, offset) == content[offset : offset + 4096]


def test_a_leaf_that_is_not_thin_is_filled_from_the_images_file(place: Host) -> None:
    """The guest is answered without the image's process, and what it read is copied: whole blocks
    at once, and of others the cluster that they are in."""
    pull(place)
    content = place.source.read_bytes()
    leaf = place.leaves / "leaf.qcow2"
    with place.guest(leaf.name, "--stream", "off") as server, client(server.uri) as handle:
        (process,) = place.processes()
        os.kill(process, signal.SIGSTOP)
        try:
            assert handle.pread(4096, 4 * MIB) == content[4 * MIB : 4 * MIB + 4096]
            assert handle.pread(100, 9 * MIB + 50) == content[9 * MIB + 50 : 9 * MIB + 150]
        finally:
            os.kill(process, signal.SIGCONT)
        wanted = [(4 * MIB, 4096), (9 * MIB, 128 << 10)]
        wait_until(lambda: local_ranges(server) == wanted, "copies in the leaf")


def test_a_thin_leaf_has_the_store_stream(place: Host) -> None:
    with place.guest("leaf.qcow2", "--thin") as server:
        wait_until(lambda: place.the_image()["local"] == SIZE, "a local image")
        place.far.kill()
        assert_same(server.uri, place.source)
    assert (place.leaves / "leaf.qcow2").stat().st_blocks * 512 < MIB


def test_an_image_stays_while_a_thin_leaf_exists(place: Host) -> None:
    pull(place)
    name = place.the_image()["id"]
    leaf = place.leaves / "leaf.qcow2"
    with place.guest(leaf.name, *THIN) as server:
        server.kill()
    with pytest.raises(PeerError, match=r"needed by 1 user .*leaf\.qcow2"):
        image("rm", name, "--store", place.store)
    with place.guest(leaf.name, *THIN) as server:
        server.terminate()
    leaf = leaf.rename(leaf.with_name("renamed.qcow2"))
    with pytest.raises(PeerError, match=r"needed by 1 user .*renamed\.qcow2"):
        image("rm", name, "--store", place.store)
    assert "0 images removed" in image("prune", "--keep", "0", "--store", place.store)
    leaf.unlink()
    image("rm", name, "--store", place.store)
    assert place.images() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--thin"], "it needs --store"),
        (["--store", "--thin", "--speed", "1M"], "--speed is for the leaf's own stream job"),
        (["--store", "--thin", "--finish-in", "1h"], "--finish-in is for the leaf's own"),
        (["--store", "--thin", "--stream", "paused"], "--stream paused is for the leaf's own"),
        (["--store", "--thin", "--exit-when-complete"], "the leaf is never complete"),
    ],
)
def test_what_does_not_go_with_thin_is_one_line(
    place: Host, arguments: list[str], words: str
) -> None:
    words_of_store = [f"--store={place.store}" if word == "--store" else word for word in arguments]
    leaf = place.leaves / "leaf.qcow2"
    done = subprocess.run(
        [binary("NBDSTREAM"), "serve", "-b", place.uri, *words_of_store, leaf],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not leaf.exists()
