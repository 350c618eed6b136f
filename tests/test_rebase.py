# SPDX-License-Identifier: Apache-2.0
"""`nbdstream rebase`: the backing of a disk that is being served moves to another place."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed.peers import Peer, Qmp, make_image, nbdkit, nbdstream_serve, run, unix_uri
from tests.serve_support import FORMATS, client, leaf_path, nbdstream, nbdstream_here, wait_for

MIB = 1 << 20
SIZE = 8 * MIB

leaf = pytest.fixture(leaf_path, params=FORMATS)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "image.raw"
    make_image(path, SIZE, sparse=False)
    return path


@pytest.fixture
def old(image: Path) -> Iterator[Peer]:
    with nbdkit("file", image, readonly=True) as peer:
        yield peer


@pytest.fixture
def new(image: Path) -> Iterator[Peer]:
    with nbdkit("file", image, readonly=True) as peer:
        yield peer


def read(uri: str, offset: int) -> bytes:
    with client(uri) as handle:
        return bytes(handle.pread(4096, offset))


def backing_of(server: Peer) -> dict[str, object]:
    assert server.control is not None
    done = nbdstream_here("status", "--json", server.control)
    found: dict[str, object] = json.loads(done.stdout)["stats"]["backing"]
    return found


def test_reads_that_wait_for_a_lost_backing_go_on_at_the_new_place(
    leaf: Path, image: Path, old: Peer, new: Peer
) -> None:
    """And the leaf names the new place, so that the next start needs no -b."""
    content = image.read_bytes()
    with nbdstream_serve(leaf, old.uri, "--stream", "off") as server:
        assert read(server.uri, 0) == content[:4096]
        old.kill()
        got: list[bytes] = []
        waiting = threading.Thread(target=lambda: got.append(read(server.uri, 4 * MIB)))
        waiting.start()
        wait_for(lambda: not backing_of(server)["connected"], "loss of the backing")
        done = nbdstream("rebase", leaf, new.uri)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"the backing is read from {new.uri}\n"
        waiting.join(30)
        assert got == [content[4 * MIB : 4 * MIB + 4096]]
        backing = backing_of(server)
        assert backing["uri"] == new.uri and backing["connected"]
    if leaf.suffix != ".raw":
        info = json.loads(run(["qemu-img", "info", "--output=json", leaf]))
        assert info["full-backing-filename"] == new.uri
    with nbdstream_serve(leaf, None, "--stream", "off") as server:
        assert read(server.uri, 6 * MIB) == content[6 * MIB : 6 * MIB + 4096]


def test_a_reconnect_uses_the_new_place(tmp_path: Path, image: Path, old: Peer) -> None:
    content, leaf, place = image.read_bytes(), tmp_path / "leaf.qcow2", tmp_path / "new.sock"
    with nbdstream_serve(leaf, old.uri, "--stream", "off") as server:
        with nbdkit("file", image, readonly=True, socket_path=place) as first:
            assert nbdstream("rebase", leaf, unix_uri(place)).returncode == 0
            first.kill()
        with nbdkit("file", image, readonly=True, socket_path=place):
            assert read(server.uri, 0) == content[:4096]
        assert not old_has_clients(old)


def old_has_clients(peer: Peer) -> bool:
    """Whether a client is connected to an nbdkit: each has a thread of its own."""
    return len(list(Path(f"/proc/{peer.pid}/task").iterdir())) > 1


@contextmanager
def stopped(peer: Peer) -> Iterator[None]:
    os.kill(peer.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(peer.pid, signal.SIGCONT)


def test_what_cannot_be_used_is_refused_and_the_old_place_stays(
    tmp_path: Path, image: Path, old: Peer
) -> None:
    content, leaf = image.read_bytes(), tmp_path / "leaf.qcow2"
    other, short = tmp_path / "other.raw", tmp_path / "short.raw"
    make_image(other, SIZE, seed=1, sparse=False)
    make_image(short, SIZE // 2)
    with nbdstream_serve(leaf, old.uri, "--stream", "off") as server:
        places = {
            str(other): "its content is not that of the image",
            str(short): f"has {SIZE // 2} bytes, and the leaf's backing {SIZE}",
            "nbd://127.0.0.1:1/": "no server listens there",
            str(tmp_path / "nowhere"): "nowhere",
            "gopher://host/": "unknown kind of backing",
        }
        for place, complaint in places.items():
            done = nbdstream_here("rebase", leaf, place)
            assert done.returncode == 1 and done.stderr.count("\n") == 1, done
            assert done.stderr.startswith("nbdstream: error: ") and complaint in done.stderr
            assert backing_of(server)["uri"] == old.uri
        assert read(server.uri, 2 * MIB) == content[2 * MIB : 2 * MIB + 4096]
        info = json.loads(run(["qemu-img", "info", "-U", "--output=json", leaf]))
        assert info["full-backing-filename"] == old.uri


def test_helpers_come_and_go_with_their_place(tmp_path: Path, image: Path, new: Peer) -> None:
    """A file is read by a helper; its relative path is the caller's."""
    leaf = tmp_path / "leaf.qcow2"
    with nbdstream_serve(leaf, str(image), "--stream", "off") as server:

        def helpers() -> int:
            return len(Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split())

        before = helpers()
        assert before > 0
        assert nbdstream("rebase", leaf, new.uri).returncode == 0
        wait_for(lambda: helpers() == 0, "end of the old helper")
        there = os.path.relpath(image)
        assert nbdstream("rebase", leaf, there).returncode == 0
        assert helpers() == before and Path(str(backing_of(server)["uri"])).samefile(image)
        assert nbdstream("resume", leaf).returncode == 0
        wait_for(lambda: "backing" not in status(server), "complete leaf")
        wait_for(lambda: helpers() == 0, "end of the helper")
        done = nbdstream("rebase", leaf, new.uri)
        assert done.returncode == 1 and "everything is local" in done.stderr
    run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, leaf])


def status(server: Peer) -> dict[str, object]:
    assert server.control is not None
    with Qmp(server.control) as qmp:
        found: dict[str, object] = qmp.execute("x-nbdstream-stats")
    return found


def test_a_stream_job_goes_on_at_the_new_place(
    tmp_path: Path, image: Path, old: Peer, new: Peer
) -> None:
    leaf = tmp_path / "leaf.qcow2"
    with nbdstream_serve(leaf, old.uri, "--speed", "1M") as server:
        wait_for(lambda: status(server)["disk"]["fetched-bytes"] > 0, "streamed data")  # type: ignore[index]
        with stopped(old):
            assert nbdstream("rebase", leaf, new.uri).returncode == 0
            assert nbdstream("speed", leaf, "0").returncode == 0
            wait_for(lambda: "backing" not in status(server), "complete leaf")
    run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, leaf])
