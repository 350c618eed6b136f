# SPDX-License-Identifier: Apache-2.0
"""Backups that are images, by each way that docs/recovery.md names: copied to a new disk which is
what the newest of them shows, whole."""

from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.peers import assert_same, make_image, nbdstream_serve, run
from testbed.remotes import s3_server, ssh_server
from testbed.web import nginx
from tests.web_support import settings_file

SIZE = 4 << 20
settings = pytest.fixture(settings_file)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """``full.raw``; ``full.qcow2`` is the same, and ``day.qcow2`` an overlay of it, which shows
    ``shown.raw``."""
    directory = tmp_path / "images"
    directory.mkdir()
    raw, full, day = (directory / name for name in ("full.raw", "full.qcow2", "day.qcow2"))
    make_image(raw, SIZE, seed=7)
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, full])
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", full, "-F", "qcow2", day])
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 300k", "-c", "write -z 3M 64k", day])
    run(["qemu-img", "convert", "-O", "raw", day, directory / "shown.raw"])
    return directory


def recover(uri: str, directory: Path, shown: Path, prefix: tuple[str, ...] = ()) -> None:
    """Copy the backup to a new disk until nothing of it is needed any more."""
    disk, copied = directory / "disk.qcow2", directory / "copied.raw"
    with nbdstream_serve(disk, uri, "--exit-when-complete", prefix=prefix) as server:
        assert server.wait(30) == 0
    run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, copied])
    assert_same(copied, shown)
    assert "backing" not in run(["qemu-img", "info", disk])


def test_a_chain_of_an_ssh_host(images: Path, tmp_path: Path) -> None:
    with ssh_server() as host:
        top, below = (host.uri(images / name) for name in ("day.qcow2", "full.qcow2"))
        uri = f"qcow2+{top} on qcow2+{below}"
        recover(uri, tmp_path, images / "shown.raw", tuple(host.prefix))


def test_a_chain_of_a_web_server(
    images: Path, tmp_path: Path, settings: Callable[[str], None]
) -> None:
    with nginx(images) as web:
        settings(f'["{web.tls_url("")}"]\nca-file = "{web.authority}"\n')
        uri = f"qcow2+{web.tls_url('day.qcow2')} on {web.tls_url('full.raw')}"
        recover(uri, tmp_path, images / "shown.raw")


def test_an_image_in_object_storage(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as store:
        store.put("backup")
        store.put("backup", "vm/disk.qcow2", (images / "full.qcow2").read_bytes())
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        recover("qcow2+s3://backup/vm/disk.qcow2", tmp_path, images / "full.raw")
