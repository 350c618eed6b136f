# SPDX-License-Identifier: Apache-2.0
"""`nbdstream serve --store` and `nbdstream image`, as their users meet them: real processes."""

import re
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from testbed.hosts import Host, client, store_host
from testbed.peers import PeerError, assert_same, make_image
from tests.store_support import image

MIB = 1 << 20
SIZE = 16 * MIB + 4096

pytestmark = pytest.mark.timeout(120)


def host(tmp_path: Path) -> AbstractContextManager[Host]:
    source = tmp_path / "source"
    make_image(source, SIZE, sparse=False)
    return store_host(source, tmp_path)


def test_guests_of_one_image_fetch_each_cluster_once(tmp_path: Path) -> None:
    with host(tmp_path) as place, ExitStack() as stack:
        guests = [
            stack.enter_context(place.guest(f"leaf{number}.qcow2", "--stream", "off"))
            for number in range(3)
        ]
        before = len(place.fetched())
        content = place.source.read_bytes()
        for server in guests:
            with client(server.uri) as handle:
                for offset in (0, 5 * MIB, 9 * MIB + 512):
                    data = handle.pread(4096, offset)
                    assert data == content[offset : offset + 4096]
        data_reads = place.fetched()[before:]
        assert sum(length for _, length in data_reads) <= 3 * 2 * 128 * 1024
        assert len(set(data_reads)) == len(data_reads)
        found = place.the_image()
        assert [user["state"] for user in found["users"]] == ["running"] * 3


def test_a_leaf_that_streams_through_the_store_becomes_whole(tmp_path: Path) -> None:
    with host(tmp_path) as place:
        with place.guest("leaf.qcow2", "--exit-when-complete") as server:
            assert server.wait(60) == 0
        assert_same(place.leaves / "leaf.qcow2", place.source, "qcow2")
        assert place.the_image()["users"] == []


def test_verify_finds_what_differs_and_only_that(tmp_path: Path) -> None:
    with host(tmp_path) as place:
        with place.guest("leaf.qcow2", "--stream", "off") as server, client(server.uri) as handle:
            handle.pread(4096, 4 * MIB)
        name = place.the_image()["id"]
        place.kill_process()
        image("pull", place.uri, "--store", place.store, "--wait")
        assert ", 0 B differ" in image("verify", name, "--store", place.store)
        with open(place.the_image()["leaf"], "r+b") as leaf:
            leaf.seek(5 * MIB + 100)
            byte = leaf.read(1)[0]
            leaf.seek(5 * MIB + 100)
            leaf.write(bytes([byte ^ 1]))
        with pytest.raises(PeerError, match="differs: ") as caught:
            image("verify", name, "--store", place.store)
        (offset, length) = re.findall(r"differs: (\d+) bytes at (\d+)", str(caught.value))[0][::-1]
        assert int(offset) <= 5 * MIB + 100 < int(offset) + int(length)


def test_pull_and_ls_and_rm(tmp_path: Path) -> None:
    with host(tmp_path) as place:
        name = image("pull", place.uri, "--store", place.store, "--wait").strip()
        found = place.the_image()
        assert (found["id"], found["local"], found["pulling"]) == (name, SIZE, False)
        assert_same(found["leaf"], place.source)
        place.far.kill()
        place.forget_answers()
        with place.guest("leaf.qcow2", "--stream", "off") as server:
            assert "no server listens there" in server.stderr()
            assert f"using image {name} of the store" in server.stderr()
            assert_same(server.uri, place.source)
            with pytest.raises(PeerError, match=r"needed by 1 user .*leaf\.qcow2"):
                image("rm", name, "--store", place.store)
        assert [user["state"] for user in place.the_image()["users"]] == ["waiting"]
        (place.leaves / "leaf.qcow2").unlink()
        image("rm", name, "--store", place.store)
        assert place.images() == []
        assert list((place.store / "trash").iterdir()) == []
