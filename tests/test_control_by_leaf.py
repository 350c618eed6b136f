# SPDX-License-Identifier: Apache-2.0
"""A server is found by the name of the leaf that it serves; limits are set at run time."""

import json
from pathlib import Path

import nbd
import pytest

from nbdstream.leaf.marks import control_of, mark_control
from testbed.peers import Peer, nbdstream_serve
from tests.serve_support import client, far_megabyte, nbdstream, nbdstream_here, wait_for

MIB = 1 << 20


far = pytest.fixture(far_megabyte)


def test_a_leaf_stands_for_the_control_socket_of_its_server(tmp_path: Path, far: Peer) -> None:
    one, two = tmp_path / "one.qcow2", tmp_path / "two.raw"
    alias = tmp_path / "alias"
    alias.symlink_to(one)
    with (
        nbdstream_serve(one, far.uri, "--stream", "off", export="first"),
        nbdstream_serve(two, far.uri, "--stream", "off", export="second"),
    ):
        for leaf, device in ((one, "first"), (two, "second"), (alias, "first")):
            done = nbdstream("status", "--json", leaf)
            assert json.loads(done.stdout)["block"]["device"] == device
        assert nbdstream("stream", one, "0").returncode == 0
    assert control_of(str(one)) == ""
    done = nbdstream("status", one)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "is not being served with a control socket" in done.stderr


def test_a_server_that_was_killed_is_not_mistaken_for_another(tmp_path: Path, far: Peer) -> None:
    """Another disk may be served at the same socket since."""
    dead, alive = tmp_path / "dead.raw", tmp_path / "alive.raw"
    with nbdstream_serve(dead, far.uri, "--stream", "off") as server:
        server.kill()
    assert control_of(str(dead)) == str(server.control)
    done = nbdstream("cancel", dead)
    assert done.returncode == 1 and "is not being served any more" in done.stderr
    with nbdstream_serve(alive, far.uri, "--stream", "paused") as other:
        mark_control(str(dead), str(other.control))
        done = nbdstream("cancel", dead)
        assert done.returncode == 1 and "is not being served any more" in done.stderr
        assert nbdstream("cancel", alive).returncode == 0


def test_read_only_servers_of_a_leaf_are_found_by_their_sockets(tmp_path: Path, far: Peer) -> None:
    leaf = tmp_path / "leaf.raw"
    with nbdstream_serve(leaf, far.uri, "--stream", "off"):
        pass
    with nbdstream_serve(leaf, None, "--read-only") as server:
        assert nbdstream("status", leaf).returncode == 1
        assert server.control is not None
        assert nbdstream("status", server.control).returncode == 0


# -- limits --------------------------------------------------------------------------------


def parameters(leaf: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(nbdstream_here("set", "--json", leaf).stdout)
    return found


def test_limits_are_shown_and_changed(tmp_path: Path, far: Peer) -> None:
    leaf = tmp_path / "leaf.raw"
    with nbdstream_serve(leaf, far.uri, "--stream", "paused", "--max-clients", "3"):
        first = {"max-clients": 3, "copy-on-read": True, "backing-timeout": 0, "speed": 0}
        assert parameters(leaf) == first
        pairs = ["max-clients=2", "copy-on-read=off", "backing-timeout=1m", "speed=1M"]
        done = nbdstream("set", leaf, *pairs)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        shown = nbdstream("set", leaf).stdout
        values = [line.split(":")[1].strip() for line in shown.splitlines()]
        assert values == ["1m00s", "off", "2", "1.0 MiB/s"]
        assert nbdstream("set", leaf, "backing-timeout=none", "speed=0").returncode == 0
        assert parameters(leaf)["backing-timeout"] == 0


def test_what_is_no_limit_is_refused(tmp_path: Path, far: Peer) -> None:
    leaf = tmp_path / "leaf.raw"
    with nbdstream_serve(leaf, far.uri, "--stream", "paused"):
        before = parameters(leaf)
        for pair in ("max-clients=0", "max-clients", "speed=fast", "colour=red", "copy-on-read=1"):
            done = nbdstream_here("set", leaf, "speed=5M", pair)
            assert done.returncode == 2 and done.stderr.count("\n") == 1, pair
            assert parameters(leaf) == before, pair


def test_a_client_too_many_is_turned_away_at_the_new_limit(tmp_path: Path, far: Peer) -> None:
    leaf = tmp_path / "leaf.raw"
    with nbdstream_serve(leaf, far.uri, "--stream", "off") as server:
        with client(server.uri):
            assert nbdstream("set", leaf, "max-clients=1").returncode == 0
            with pytest.raises(nbd.Error):
                nbd.NBD().connect_uri(server.uri)
            assert nbdstream("set", leaf, "max-clients=2").returncode == 0
            with client(server.uri):
                pass


def test_a_read_that_waits_fails_at_the_new_timeout(tmp_path: Path, far: Peer) -> None:
    leaf = tmp_path / "leaf.raw"
    with nbdstream_serve(leaf, far.uri, "--stream", "off") as server, client(server.uri) as handle:
        far.kill()
        buffer = nbd.Buffer(4096)
        cookie = handle.aio_pread(buffer, 0)
        wait_for(lambda: "lost" in nbdstream_here("status", leaf).stdout, "loss of the backing")
        assert nbdstream("set", leaf, "backing-timeout=1").returncode == 0
        with pytest.raises(nbd.Error, match="Input/output error"):
            while not handle.aio_command_completed(cookie):
                handle.poll(20_000)
