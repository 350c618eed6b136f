# SPDX-License-Identifier: Apache-2.0
"""query-blockstats and the metrics of clients: what a real client asked for, and QEMU's names."""

import random
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbd
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbdstream.guest.disks import Disk
from testbed.peers import Qmp, make_image, nbdkit, nbdstream_serve
from testbed.remotes import free_port
from tests.pivot_support import ask, qemu
from tests.serve_support import client

MIB = 1 << 20
SIZE = 16 * MIB


def stats_of(control: Path | None) -> dict[str, Any]:
    assert control is not None
    with Qmp(control) as qmp:
        (entry,) = qmp.execute("query-blockstats")
    assert entry["device"] == entry["node-name"] == "disk0"
    stats: dict[str, Any] = entry["stats"]
    return stats


def use(handle: "nbd.NBD", rng: random.Random) -> dict[str, int]:
    """Ask at random, hits and misses of all lengths; what was asked, by QEMU's names."""
    asked = dict.fromkeys(("rd", "wr", "unmap", "flush"), 0)
    sizes = dict.fromkeys(("rd", "wr", "unmap"), 0)
    refused = dict.fromkeys(("rd", "wr", "unmap"), 0)
    handle.set_strict_mode(0)
    for _ in range(400):
        offset, length = rng.randrange(0, SIZE, 512), 512 << rng.randrange(12)
        calls: list[tuple[str, Callable[[int, int], object]]] = [
            ("rd", lambda o, n: handle.pread(n, o)),
            ("wr", lambda o, n: handle.pwrite(bytes(n), o)),
            ("wr", lambda o, n: handle.zero(n, o)),
            ("unmap", lambda o, n: handle.trim(n, o)),
        ]
        kind, call = rng.choice(calls)
        if offset + length > SIZE:
            with pytest.raises(nbd.Error):
                call(offset, length)
            refused[kind] += 1
        else:
            call(offset, length)
            asked[kind] += 1
            sizes[kind] += length
        if rng.random() < 0.1:
            handle.flush()
            asked["flush"] += 1
    return {
        **{f"{kind}_operations": count for kind, count in asked.items()},
        **{f"{kind}_bytes": count for kind, count in sizes.items()},
        **{f"invalid_{kind}_operations": count for kind, count in refused.items()},
    }


def test_what_clients_asked_for_is_counted(tmp_path: Path) -> None:
    rng = random.Random(7)
    make_image(tmp_path / "base.raw", SIZE, sparse=False)
    port = free_port()
    options = ("--stream", "off", "--metrics", f"127.0.0.1:{port}")
    with nbdkit("file", tmp_path / "base.raw", readonly=True) as far:
        with nbdstream_serve(tmp_path / "leaf.qcow2", far.uri, *options) as server:
            with client(server.uri) as first:
                expected = use(first, rng)
            with client(server.uri) as second:  # of all clients, also those that have gone
                for name, count in use(second, rng).items():
                    expected[name] += count
            stats = stats_of(server.control)
            assert {name: stats[name] for name in expected} == expected
            assert not any(stats[name] for name in stats if name.startswith("failed_"))
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
                text = page.read().decode()
    shown = {
        (sample.name, sample.labels.get("command")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert shown["nbdstream_client_requests_total", "read"] == expected["rd_operations"]
    assert shown["nbdstream_client_bytes_total", "read"] == expected["rd_bytes"]
    assert shown["nbdstream_client_failures_total", "read"] == 0
    assert shown["nbdstream_client_requests_total", "trim"] == expected["unmap_operations"]


def test_a_read_that_fails_is_counted_as_such(tmp_path: Path) -> None:
    make_image(tmp_path / "base.raw", SIZE, sparse=False)
    options = ("--stream", "off", "--backing-timeout", "1")
    with nbdkit("file", tmp_path / "base.raw", readonly=True) as far:
        with nbdstream_serve(tmp_path / "leaf.qcow2", far.uri, *options) as server:
            with client(server.uri) as handle:
                far.kill()
                with pytest.raises(nbd.Error):
                    handle.pread(512, 0)
            stats = stats_of(server.control)
    assert stats["failed_rd_operations"] == 1 and stats["rd_operations"] == 0


async def test_all_that_qemu_tells_has_its_name(tmp_path: Path) -> None:
    make_image(tmp_path / "base.raw", SIZE, sparse=False)
    with nbdstream_serve(tmp_path / "leaf.qcow2", f"file://{tmp_path}/base.raw") as server:
        with qemu(tmp_path, Disk.nbd(server.uri)) as vm:
            (theirs,) = await ask(vm, "query-blockstats")
        (ours,) = await ask(str(server.control), "query-blockstats")
    assert set(theirs["stats"]) - {"idle_time_ns"} == set(ours["stats"])
