# SPDX-License-Identifier: Apache-2.0
"""What docs/fleet.md prints works as it is printed: nginx and SeaweedFS on machines of their own,
and hosts that fetch an image through a rack's cache."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import nbd
import pytest

from nbdstream.backing.identity import sample_ranges
from testbed.certificates import Authority, make_authority
from testbed.fleet import network as net
from testbed.fleet.servers import (
    RACK,
    SNIPPET,
    WEED,
    check,
    https_origin,
    printed,
    rack_cache,
    seaweed,
    tree,
)
from testbed.hosts import client
from testbed.peers import (
    Peer,
    PeerError,
    assert_same,
    binary,
    make_image,
    nbdstream_serve,
    run,
    temporary_directory,
)

MIB = 1 << 20
SIZE = 12 * MIB + 4096
SLICES = 13
LARGE = 48 * MIB
URL = "http://images.rack/images/debian-12.raw"

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(bool(net.missing()), reason=net.missing()),
]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    make_image(path, SIZE, sparse=False)
    return path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """An image of which the samples that identify it leave whole slices untouched."""
    path = tmp_path / "large"
    make_image(path, LARGE, sparse=False)
    return path


def untouched() -> list[int]:
    """The offsets of the slices of `large` in which nothing was read to identify it."""
    sampled = {
        place // MIB
        for offset, length in sample_ranges(LARGE)
        for place in (offset, offset + length - 1)
    }
    return [slice_ * MIB for slice_ in range(LARGE // MIB) if slice_ not in sampled]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[net.Network]:
    with net.network(tmp_path, racks=1, hosts=2) as made:
        yield made


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return make_authority(tmp_path / "pki")


def guest(host: net.Machine, leaf: Path, *args: str) -> AbstractContextManager[Peer]:
    """A guest's server on a host, which fetches what it is asked for and no more."""
    options = ("--stream", "off", "--prefetch", "off", *args)
    return nbdstream_serve(leaf, URL, *options, prefix=host.enter())


def pull(host: net.Machine, store: Path) -> Path:
    """Fetch the image into a host's store; its file there."""
    command = [*host.enter(), binary("NBDSTREAM"), "image", "pull", URL, "--store", str(store)]
    run([*command, "--wait"], timeout=100)
    (found,) = store.glob("images/*/image.raw")
    return found


@pytest.fixture
def stores() -> Iterator[Path]:
    """A place for stores: a short path, as there are sockets in them."""
    with temporary_directory() as directory:
        yield directory


def pull_everywhere(fleet: net.Network, stores: Path) -> list[Path]:
    """All hosts at a time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(pull, fleet.hosts, [stores / host.name for host in fleet.hosts]))


def test_two_hosts_share_a_cache_that_asks_an_https_origin_once_for_each_slice(
    fleet: net.Network, authority: Authority, image: Path, tmp_path: Path, stores: Path
) -> None:
    (rack,) = fleet.racks
    with https_origin(fleet.origin, tmp_path / "origin", authority) as origin:
        shutil.copy(image, origin.root / "srv/images/debian-12.raw")
        with rack_cache(rack.cache, tmp_path / "rack", authority.certificate) as cache:
            for copy in pull_everywhere(fleet, stores):
                assert_same(copy, image)
            asked = origin.log("images.log")
            assert {client for client, *_ in asked} == {rack.cache.address}
            ranges = Counter(part for _, _, _, part, _ in asked)
            assert ranges == {f"bytes={n * MIB}-{(n + 1) * MIB - 1}": 1 for n in range(SLICES)}
            assert {client for client, *_ in cache.log("slices.log")} == {
                host.address for host in rack.hosts
            }
            assert fleet.origin.sent() < 1.1 * SIZE


def test_a_replaced_image_is_noticed_behind_a_cache(
    fleet: net.Network, authority: Authority, large: Path, tmp_path: Path
) -> None:
    """A slice of the new image is not shown to a guest of the old one, and what the cache has
    of the old one still is."""
    content = large.read_bytes()
    cached, uncached, *_ = untouched()
    with https_origin(fleet.origin, tmp_path / "origin", authority) as origin:
        place = origin.root / "srv/images/debian-12.raw"
        shutil.copy(large, place)
        with rack_cache(fleet.racks[0].cache, tmp_path / "rack", authority.certificate):
            with guest(fleet.hosts[0], tmp_path / "leaf.qcow2", "--backing-timeout=3") as server:
                with client(server.uri) as handle:
                    assert handle.pread(4096, cached) == content[cached:][:4096]
                    new = place.with_name("new")
                    make_image(new, LARGE, seed=2, sparse=False)
                    # nginx makes its entity tag of the size and of the time in seconds.
                    os.utime(new, (0, 1e9))
                    new.replace(place)
                    late = cached + MIB - 4096
                    assert handle.pread(4096, late) == content[late:][:4096]
                    with pytest.raises(nbd.Error):
                        handle.pread(4096, uncached)
                leaf = str(tmp_path / "leaf.qcow2")
                assert "the image was replaced" in run([binary("NBDSTREAM"), "status", leaf])


@pytest.mark.parametrize("variant", ["origin", "S3"])
def test_nginx_accepts_what_the_page_prints(
    fleet: net.Network, authority: Authority, tmp_path: Path, variant: str
) -> None:
    files = {SNIPPET: printed(SNIPPET), RACK: printed(RACK, variant)}
    words = check(fleet.racks[0].cache, tree(tmp_path / "rack", files))
    assert "warn" not in words
    assert "test is successful" in words


def test_the_printed_configuration_of_a_guest_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "guest1.toml"
    path.write_text(printed("/etc/nbdstream/guest1.toml"))
    run([binary("NBDSTREAM"), "serve", "--check", "--config", path])


def test_a_host_takes_the_second_address_of_its_cache(
    fleet: net.Network, authority: Authority, image: Path, tmp_path: Path, stores: Path
) -> None:
    (rack,) = fleet.racks
    host = rack.hosts[0]
    host.names.write_text(f"{rack.hosts[1].address} images.rack\n{host.names.read_text()}")
    with https_origin(fleet.origin, tmp_path / "origin", authority) as origin:
        shutil.copy(image, origin.root / "srv/images/debian-12.raw")
        with rack_cache(rack.cache, tmp_path / "rack", authority.certificate):
            assert_same(pull(host, stores / "s"), image)


@pytest.mark.skipif(not WEED.exists(), reason="SeaweedFS has no package for this machine")
def test_hosts_share_a_cache_in_front_of_seaweedfs(
    fleet: net.Network, image: Path, tmp_path: Path, stores: Path
) -> None:
    """An S3-compatible store that anybody in the rack's network reads and the publisher writes."""
    with seaweed(fleet.origin, tmp_path / "origin") as store:
        store.put("images/debian-12.raw", image)
        with pytest.raises(PeerError, match="403"):
            store.put("images/debian-12.raw", image, keys=False)
        before = fleet.origin.sent()
        with rack_cache(fleet.racks[0].cache, tmp_path / "rack"):
            for copy in pull_everywhere(fleet, stores):
                assert_same(copy, image)
        assert fleet.origin.sent() - before < 1.1 * SIZE


def test_a_host_goes_on_when_its_racks_cache_is_back(
    fleet: net.Network, authority: Authority, large: Path, tmp_path: Path
) -> None:
    (rack,) = fleet.racks
    content = large.read_bytes()
    known, wanted, *_ = untouched()
    with https_origin(fleet.origin, tmp_path / "origin", authority) as origin:
        shutil.copy(large, origin.root / "srv/images/debian-12.raw")
        with rack_cache(rack.cache, tmp_path / "rack", authority.certificate) as cache:
            opening = guest(rack.hosts[0], tmp_path / "leaf.qcow2")
            with opening as server, client(server.uri) as handle, ThreadPoolExecutor() as pool:
                handle.pread(4096, known)
                cache.kill()
                assert handle.pread(4096, known) == content[known:][:4096]
                waiting = pool.submit(handle.pread, 4096, wanted)
                with rack_cache(rack.cache, tmp_path / "rack", authority.certificate):
                    assert waiting.result() == content[wanted:][:4096]
