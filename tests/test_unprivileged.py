# SPDX-License-Identifier: Apache-2.0
"""Everything that needs no network namespaces works for a user without privileges.

Run as root, these tests start nbdstream as the user `nobody`, without groups and capabilities.
"""

import json
import os
import pwd
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed.peers import (
    READY_SECONDS,
    Peer,
    assert_same,
    binary,
    make_image,
    nbdkit,
    run,
    started,
    temporary_directory,
)
from testbed.remotes import free_port
from testbed.web import nginx

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture
def home() -> Iterator[Path]:
    """A home directory of the user."""
    with temporary_directory() as directory:
        user = pwd.getpwnam("nobody")
        if os.geteuid() == 0:
            directory.chmod(0o755)
            (directory / "home").mkdir()
            os.chown(directory / "home", user.pw_uid, user.pw_gid)
        else:
            (directory / "home").mkdir()
        yield directory / "home"


@pytest.fixture
def prefix(home: Path) -> list[str]:
    """Runs a command as the user."""
    unset = [f"--unset=XDG_{name}" for name in ("RUNTIME_DIR", "CONFIG_HOME", "CACHE_HOME")]
    environment = ["env", *unset, f"HOME={home}", f"TMPDIR={home}"]
    environment += [f"XDG_STATE_HOME={home}/state"]
    if os.geteuid() != 0:
        return environment
    user = pwd.getpwnam("nobody")
    drop = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    return [*drop, "--bounding-set=-all", "--no-new-privs", *environment]


@pytest.fixture
def far() -> Iterator[Path]:
    """An image that every user can read."""
    with temporary_directory() as directory:
        directory.chmod(0o755)
        image = directory / "far.raw"
        make_image(image, SIZE)
        run(["qemu-img", "convert", "-O", "qcow2", image, directory / "far.qcow2"])
        for path in directory.iterdir():
            path.chmod(0o644)
        yield image


def nbdstream(prefix: list[str], *arguments: str) -> str:
    """A command as the user. Raises CalledProcessError."""
    command = [*prefix, binary("NBDSTREAM"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@contextmanager
def serving(
    prefix: list[str], home: Path, leaf: Path, backing: str, *options: str
) -> Iterator[Peer]:
    """A server of the user's; its sockets are in the home directory."""
    command = [*prefix, binary("NBDSTREAM"), "serve", str(leaf), "-b", backing]
    command += ["-U", str(home / "nbd"), "--control", str(home / "control"), *options]
    with temporary_directory() as directory, started(command, directory) as server:
        server.wait_until(lambda: "\n" in server.stdout(), "URI on stdout", READY_SECONDS)
        yield server


@contextmanager
def source(kind: str, far: Path) -> Iterator[str]:
    """The URI of a backing of some kind."""
    packed = far.with_suffix(".qcow2")
    if kind in ("file", "format"):
        yield str(far) if kind == "file" else f"qcow2+{packed}"
    elif kind == "web":
        with nginx(far.parent) as web:
            yield web.url(far.name)
    else:
        image = far if kind == "nbd" else packed
        with nbdkit("file", image, readonly=True, port=free_port()) as server:
            yield server.uri if kind == "nbd" else f"qcow2+{server.uri}"


@pytest.mark.parametrize("kind", ["nbd", "file", "format", "format over nbd", "web"])
@pytest.mark.parametrize("leaf_format", ["raw", "qcow2", "qed"])
def test_serving_from_every_kind_of_backing(
    home: Path, prefix: list[str], far: Path, leaf_format: str, kind: str
) -> None:
    """Backings in formats are read in the sandbox, which the user sets up without help."""
    leaf = home / f"leaf.{leaf_format}"
    with source(kind, far) as backing:
        with serving(prefix, home, leaf, backing, "--exit-when-complete") as server:
            assert server.wait(60) == 0, server.stderr()
    assert leaf.stat().st_uid == home.stat().st_uid
    assert_same(leaf, far, leaf_format)
    assert json.loads(nbdstream(prefix, "check", "--json", str(leaf)))["check-errors"] == 0
    assert "remote" not in nbdstream(prefix, "map", str(leaf))
    assert nbdstream(prefix, "info", str(leaf))


def test_the_store_and_the_default_places(home: Path, prefix: list[str], far: Path) -> None:
    with nbdkit("file", far, readonly=True, port=free_port()) as remote:
        nbdstream(prefix, "image", "pull", remote.uri, "--wait")
        assert len(json.loads(nbdstream(prefix, "image", "ls", "--json"))) == 1
        convert = f'qemu-img convert -O raw "$uri" {home}/shown.raw'
        serve = ["serve", str(home / "leaf.qcow2"), "-b", remote.uri, "--store", "--run", convert]
        nbdstream(prefix, *serve)
    assert_same(home / "shown.raw", far)


def test_control_and_metrics(home: Path, prefix: list[str], far: Path) -> None:
    port, control = free_port(), str(home / "control")
    options = ("--stream", "paused", "--metrics", f"127.0.0.1:{port}")
    with nbdkit("file", far, readonly=True, port=free_port()) as remote:
        with serving(prefix, home, home / "leaf.raw", remote.uri, *options) as server:
            assert "paused" in nbdstream(prefix, "status", control)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                assert b"nbdstream_" in page.read()
            nbdstream(prefix, "resume", control)
            nbdstream(prefix, "watch", control)
            assert server.terminate() == 0
    assert_same(home / "leaf.raw", far)
