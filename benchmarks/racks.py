# SPDX-License-Identifier: Apache-2.0
"""Hosts in racks whose images become wholly local: how often does a byte cross the origin's link?

Each rack has a real nginx as its cache, and the origin is a real nginx with HTTPS, configured as
docs/fleet.md prints it. Each host has guests that replay a trace meanwhile. Bytes are those that
the origin says it has sent.
"""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from testbed.certificates import make_authority
from testbed.far import memory_directory
from testbed.fleet.hosts import IMAGE, StoreHost, store_host
from testbed.fleet.network import network
from testbed.fleet.servers import https_origin, rack_cache
from testbed.hosts import wait_until
from testbed.peers import temporary_directory

RACKS, HOSTS_EACH, GUESTS_EACH = 2, 4, 4
LOCAL_SECONDS = 240.0


@dataclass(frozen=True)
class Racks:
    """``sent``: bytes that the origin sent; ``asked``: how often; ``last``: seconds of the last
    guest's replay; ``local``: seconds until all was local."""

    sent: int
    asked: int
    last: float
    local: float


def local_everywhere(source: Path, replay: Callable[[str], float]) -> Racks:
    """Start all guests together, and wait until all hosts have all of the image. Needs root."""
    with memory_directory() as directory, temporary_directory() as short, ExitStack() as stack:
        made = stack.enter_context(network(directory, RACKS, HOSTS_EACH))
        authority = make_authority(directory / "pki")
        opening = https_origin(made.origin, directory / "origin", authority)
        origin = stack.enter_context(opening)
        shutil.copy(source, origin.root / "srv/images" / IMAGE)
        for rack in made.racks:
            place = directory / rack.cache.name
            stack.enter_context(rack_cache(rack.cache, place, authority.certificate))
        hosts = [stack.enter_context(store_host(host, short)) for host in made.hosts]

        def guest(host: StoreHost, name: str) -> float:
            return replay(stack.enter_context(host.guest(name, "--thin")).uri)

        begun = time.monotonic()
        with ThreadPoolExecutor(len(hosts) * GUESTS_EACH) as pool:
            guests = [(host, f"leaf{n}.qcow2") for host in hosts for n in range(GUESTS_EACH)]
            last = max(pool.map(guest, *zip(*guests, strict=True)))
        wait_until(lambda: all(host.local() == 1 for host in hosts), "local image", LOCAL_SECONDS)
        local = time.monotonic() - begun
        log = origin.log("images.log")
        return Racks(sum(sent for _, _, sent, *_ in log), len(log), last, local)
