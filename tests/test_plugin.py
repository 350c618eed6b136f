# SPDX-License-Identifier: Apache-2.0
"""The nbdkit plugin: the same disk behind another front end."""

import random
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd
import pytest

from testbed.peers import Peer, assert_same, binary, make_image, nbdkit, run

PLUGIN = Path(__file__).parent.parent / "plugins" / "nbdstream_plugin.py"
MIB = 1 << 20
SIZE = 16 * MIB + 512

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backing") / "image"
    make_image(path, SIZE)
    return path


@contextmanager
def plugin(leaf: Path, backing: Peer | None, *parameters: str, threads: int = 8) -> Iterator[Peer]:
    more = [f"backing={backing.uri}"] if backing else []
    with nbdkit("python", PLUGIN, f"leaf={leaf}", *more, *parameters, threads=threads) as peer:
        yield peer


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "qed"])
def test_it_serves_streams_and_closes_clean(image_format: str, image: Path, tmp_path: Path) -> None:
    leaf = tmp_path / f"leaf.{image_format}"
    with nbdkit("file", image, "rdelay=5ms", filters=["delay"], readonly=True) as backing:
        with plugin(leaf, backing) as peer:
            assert_same(peer.uri, image)
            assert peer.terminate() == 0
        if image_format != "raw":
            run([binary("QEMU_IMG"), "check", "-q", leaf])
        with plugin(leaf, None) as peer:
            assert_same(peer.uri, image)


def test_parallel_clients_see_their_own_writes(image: Path, tmp_path: Path) -> None:
    """Every thread owns the blocks of its own number, and hammers them with the others
    around: hits are read on nbdkit's threads while the loop changes the leaf."""
    expected = bytearray(image.read_bytes())
    failures: list[str] = []
    clients, block = 6, 3000  # parts of blocks and clusters

    def hammer(number: int, uri: str) -> None:
        handle = nbd.NBD()
        handle.connect_uri(uri)
        numbers = random.Random(number)
        for turn in range(120):
            place = numbers.randrange(SIZE // block // clients) * clients + number
            offset = place * block
            choice = numbers.randrange(4)
            if choice == 0:
                data = bytes([turn % 255 + 1]) * block
                handle.pwrite(data, offset)
                expected[offset : offset + block] = data
            elif choice == 1:
                handle.zero(block, offset)
                expected[offset : offset + block] = bytes(block)
            elif handle.pread(block, offset) != expected[offset : offset + block]:
                failures.append(f"client {number}, turn {turn}, offset {offset}")
        handle.flush()
        handle.shutdown()

    leaf = tmp_path / "leaf.qcow2"
    with nbdkit("file", image, "rdelay=3ms", filters=["delay"], readonly=True) as backing:
        with plugin(leaf, backing) as peer:
            threads = [
                threading.Thread(target=hammer, args=(number, peer.uri))
                for number in range(clients)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert peer.terminate() == 0
        assert failures == []
        reference = tmp_path / "expected"
        reference.write_bytes(expected)
        with plugin(leaf, None) as peer:
            assert_same(peer.uri, reference)


def test_extents_trims_and_caching(image: Path, tmp_path: Path) -> None:
    with nbdkit("file", image, readonly=True) as backing:
        with plugin(tmp_path / "leaf.qcow2", backing, "stream=off") as peer:
            handle = nbd.NBD()
            handle.add_meta_context("base:allocation")
            handle.connect_uri(peer.uri)
            handle.trim(MIB, 4 * MIB)
            handle.cache(MIB, 8 * MIB)
            handle.zero(MIB, 10 * MIB, nbd.CMD_FLAG_FAST_ZERO)
            with pytest.raises(nbd.Error, match="not supported"):
                handle.zero(1000, 12 * MIB + 8, nbd.CMD_FLAG_FAST_ZERO)
            found: list[int] = []
            handle.block_status(MIB, 4 * MIB, lambda _c, _o, entries, _e: found.extend(entries))
            assert found[:2] == [MIB, nbd.STATE_HOLE | nbd.STATE_ZERO]
            handle.shutdown()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([], "leaf=FILE is missing"),
        (["leaf=x.raw", "colour=red"], "unknown parameter 'colour'"),
        (["leaf=x.raw", "stream=maybe"], "stream=maybe: must be one of"),
        (["leaf=x.raw", "speed=fast"], "speed=fast"),
        (["leaf=/nonexistent/x.raw"], "does not exist"),
    ],
)
def test_bad_parameters_are_named(parameters: list[str], message: str, tmp_path: Path) -> None:
    command = [binary("NBDKIT"), "--unix", str(tmp_path / "socket"), "--foreground"]
    done = subprocess.run(
        [*command, "python", str(PLUGIN), *parameters],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr
