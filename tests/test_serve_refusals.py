# SPDX-License-Identifier: Apache-2.0
"""What ``nbdstream serve`` and ``create`` refuse, in one line, and leaving nothing behind."""

import os
import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

from testbed.peers import (
    binary,
    nbdkit,
    nbdstream_serve,
    temporary_directory,
)
from tests.serve_support import (
    FORMATS,
    MIB,
    client,
    format_of,
    image_file,
    leaf_path,
    nbdstream,
    nbdstream_here,
)

pytestmark = pytest.mark.timeout(120)

image = pytest.fixture(image_file, scope="session")
leaf = pytest.fixture(leaf_path, params=FORMATS)


def test_bad_input_gets_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    no_server = f"nbd+unix:///?socket={tmp_path}/absent"
    cases = [
        (["serve", "new.qcow2"], 2, "does not exist"),
        (["serve", "new.qcow2", "-b", no_server], 1, "no server listens"),
        (["serve", "new.qcow2", "-b", "gopher://x/y"], 2, "unknown|gopher"),
        (["serve", "new.what", "-b", no_server], (1, 2), "format|no server"),
        (["create", "new.qcow2"], 2, "--size"),
        (["create", "new.qcow2", "--size", "12x"], 2, "12x"),
        (["create", "new.qcow2", "--size", "0"], 2, "0 bytes"),
        (["create", "new.xyz", "--size", "1M"], 2, "format"),
        (["create", "new.qcow2", "--size", "1M", "--cluster-size", "1000"], 2, "cluster"),
        (["create", "nowhere/new.qcow2", "--size", "1M"], 1, "No such file"),
        (["info", "missing.raw"], 1, "missing.raw: No such file"),
        (["serve", "missing.raw", "-U", "a", "--listen", "b:1"], 2, "one of"),
        (["serve", "missing.raw", "--listen", "nonsense"], 2, "HOST:PORT"),
        (
            ["serve", "missing.raw", "-e", "x" * 4097],
            2,
            "--export is too long: NBD takes up to 4096",
        ),
        (["serve", "missing.raw", "--description", "\udcff"], 2, "--description is not UTF-8: NBD"),
        (["serve", "missing.raw", "--tls", "require"], 2, "--tls-certificates"),
        (["serve", "missing.raw", "--tls-verify-peer"], 2, "--tls-certificates"),
        (
            [
                "serve",
                "missing.raw",
                "--tls",
                "off",
                "--tls-certificates",
                "a",
                "--tls-verify-peer",
            ],
            2,
            "--tls off",
        ),
        (["serve", "missing.raw", "--tls-certificates", "a"], 2, "server-cert.pem"),
    ]
    for command, status, pattern in cases:
        done = nbdstream_here(*command, cwd=tmp_path)
        allowed = status if isinstance(status, tuple) else (status,)
        assert done.returncode in allowed, (command, done.stderr)
        assert re.search(pattern, done.stderr), (command, done.stderr)
        # Ours are one line; click shows the usage before its own.
        assert done.stderr.count("\n") == 1 or "Usage:" in done.stderr, (command, done.stderr)
        assert list(tmp_path.iterdir()) == [], command


def test_a_leaf_in_use_is_refused(leaf: Path, image: Path) -> None:
    with nbdkit("file", image, readonly=True) as backing:
        with nbdstream_serve(leaf, backing.uri, "--stream", "off") as server:
            result = nbdstream("serve", leaf, "-U", "-")
            assert result.returncode == 1
            assert re.match(r"nbdstream: error: .*in use", result.stderr)
            write = [binary("QEMU_IO"), "-f", format_of(leaf), "-c", "write 0 512", str(leaf)]
            refused = subprocess.run(write, capture_output=True, text=True, check=False)
            assert refused.returncode == 1
            assert "lock" in refused.stderr
            assert server.process.poll() is None


def test_a_damaged_map_is_refused_and_left_alone(tmp_path: Path, image: Path) -> None:
    leaf = tmp_path / "leaf.raw"
    with nbdkit("file", image, readonly=True) as backing:
        assert nbdstream("create", leaf, "-b", backing.uri).returncode == 0
        allocation = tmp_path / "leaf.raw.map"
        damaged = bytearray(allocation.read_bytes())
        damaged[20] ^= 1
        allocation.write_bytes(damaged)
        result = nbdstream("serve", leaf, "-U", "-")
        assert result.returncode == 1
        assert result.stderr.startswith("nbdstream: error: ")
        assert "damaged" in result.stderr
        assert allocation.read_bytes() == damaged


def test_a_read_only_directory(tmp_path: Path, image: Path) -> None:
    if os.geteuid() == 0:
        directory = Path("/proc/self")  # where not even root can create a file
    else:
        directory = tmp_path
        directory.chmod(0o500)
    with nbdkit("file", image, readonly=True) as backing:
        result = nbdstream("serve", directory / "leaf.raw", "-b", backing.uri, "-U", "-")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("runtime", [True, False])
def test_the_default_socket_is_for_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: bool
) -> None:
    leaf = tmp_path / "a disk.raw"
    assert nbdstream("create", leaf, "--size", "1M").returncode == 0
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with temporary_directory() as directory:
        directory.chmod(0o700)
        if runtime:
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
        command = [binary("NBDSTREAM"), "serve", str(leaf)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            uri = process.stdout.readline().strip()
            with client(uri) as guest:
                assert guest.get_size() == MIB
            socket = Path(unquote(uri.partition("socket=")[2]))
            assert socket.stat().st_mode & 0o777 == 0o600
            assert socket.parent.stat().st_mode & 0o777 == 0o700
            if runtime:
                assert socket == directory / "nbdstream" / "a disk.raw.sock"
            process.terminate()
        assert process.returncode == 0
