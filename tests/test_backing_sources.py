# SPDX-License-Identifier: Apache-2.0
"""Backings that are not NBD: web servers, files and image formats, by way of helpers."""

import base64
import errno
import http.server
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import trio
from trio._core import _thread_cache

from nbdstream.backing import Priority, fingerprint, open_backing
from nbdstream.backing.plugins import PLUGINS
from nbdstream.backing.sources import anchored
from nbdstream.errors import UsageError
from nbdstream.service import ServeOptions, open_stream
from testbed import peers
from testbed.processes import children
from tests.backing_support import SIZE, content_of, image_file, opens_with, read, until

image = pytest.fixture(image_file, scope="module")
content = pytest.fixture(content_of, scope="module")


async def assert_serves(uri: str, content: bytes) -> None:
    async with open_backing(uri) as backing:
        assert backing.uri == anchored(uri, Path.cwd())
        assert backing.size == len(content)
        assert await read(backing, 0, backing.size) == content
        assert (await fingerprint(backing)).startswith("s1:")


# --- files and formats ------------------------------------------------------------------


async def test_a_file_by_its_path_and_by_its_uri(image: Path, content: bytes) -> None:
    await assert_serves(str(image), content)
    await assert_serves(image.as_uri(), content)
    await assert_serves(os.path.relpath(image), content)  # noqa: ASYNC240


async def test_a_look_at_an_image_may_take_longer_than_a_thread_lives(
    image: Path, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a slow link. The sandbox ends a program together with the thread that started it."""
    monkeypatch.setattr(_thread_cache, "IDLE_TIMEOUT", 0.05)
    path = tmp_path / "converted"
    peers.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", image, path])
    with peers.nbdkit("file", path, "rdelay=200ms", filters=["delay"], readonly=True) as peer:
        await assert_serves(f"qcow2+{peer.uri}", content)


@pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "qed", "vdi", "vhdx"])
async def test_an_image_format(
    image: Path, content: bytes, tmp_path: Path, image_format: str
) -> None:
    path = tmp_path / "converted"
    peers.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", image_format, image, path])
    async with open_backing(f"{image_format}+{path}") as backing:
        # Some formats round the size up.
        assert (await read(backing, 0, backing.size))[: len(content)] == content


async def test_an_image_format_over_nbd(image: Path, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    peers.run(["qemu-img", "convert", "-q", "-c", "-f", "raw", "-O", "qcow2", image, path])
    with peers.nbdkit("file", path) as peer:
        await assert_serves(f"qcow2+{peer.uri}", content)


async def test_an_image_from_elsewhere_may_not_name_files_here(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "overlay.qcow2"
    peers.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", image, path])
    with peers.nbdkit("file", path) as peer:
        assert "backing file" in await opens_with(f"qcow2+{peer.uri}")


async def test_no_such_file(tmp_path: Path) -> None:
    assert "No such file" in await opens_with(str(tmp_path / "none"))
    assert "No such file" in await opens_with(f"qcow2+{tmp_path}/none")


async def test_not_of_that_format(image: Path) -> None:
    message = await opens_with(f"qcow2+{image}")
    assert re.search("qcow2 format|not in qcow2", message)


async def test_an_unknown_kind_is_answered_with_those_that_are_known() -> None:
    message = await opens_with("gopher://host/image")
    for kind in ("nbd://", "https://", "qcow2+"):
        assert kind in message


async def test_what_is_not_installed_is_named_with_its_package(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kwargs: None)
    assert "apt install nbdkit" in await opens_with(str(image))
    assert "apt install qemu-utils" in await opens_with(f"qcow2+{image}")


# --- helpers ----------------------------------------------------------------------------


async def test_a_helper_that_dies_is_started_again(image: Path, content: bytes) -> None:
    before = children(os.getpid())
    async with open_backing(str(image)) as backing:
        assert await read(backing, 0, 512) == content[:512]
        (pid,) = children(os.getpid()) - before
        os.kill(pid, signal.SIGKILL)
        await until(lambda: children(os.getpid()) - before - {pid})
        with trio.fail_after(20):
            assert await read(backing, 512, 4096) == content[512:4608]
    assert children(os.getpid()) == before


async def test_a_helper_that_cannot_be_started_is_tried_again(
    image: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Out of descriptors: the error used to end the backing, and the server with it."""
    before = children(os.getpid())
    refusals = [errno.EMFILE, errno.ENOMEM]
    spawn = os.posix_spawn

    def refusing(*args: Any, **kwargs: Any) -> int:
        if refusals:
            raise OSError(refusals[0], os.strerror(refusals.pop(0)))
        return spawn(*args, **kwargs)

    async with open_backing(str(image)) as backing:
        (pid,) = children(os.getpid()) - before
        monkeypatch.setattr(os, "posix_spawn", refusing)
        os.kill(pid, signal.SIGKILL)
        with trio.fail_after(20):
            assert await read(backing, 512, 4096) == content[512:4608]
    assert refusals == []
    assert "nbdkit cannot be started: Too many open files" in caplog.text
    assert children(os.getpid()) == before


async def test_a_helper_does_not_outlive_us(image: Path) -> None:
    program = (
        "import sys, trio\n"
        "from nbdstream.backing import open_backing\n"
        "async def main():\n"
        "    async with open_backing(sys.argv[1]):\n"
        "        print('open', flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    with subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", program, str(image)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        helpers = children(process.pid)
        assert helpers
        process.kill()
    await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in helpers))


# --- the web ----------------------------------------------------------------------------


@contextmanager
def web_server(content: bytes, *, broken: list[int], password: str | None = None) -> Iterator[str]:
    """An HTTP server with ranges; while ``broken`` has a status, requests get that. With a
    ``password`` it is for the user "me" only."""
    expected = "Basic " + base64.b64encode(f"me:{password}".encode()).decode()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            if password is not None and self.headers.get("Authorization") != expected:
                self.send_error(401)
                return
            if broken or self.path != "/image":
                self.send_error(broken[0] if broken else 404)
                return
            data, wanted = content, re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted:
                data = content[int(wanted[1]) : int(wanted[2]) + 1]
            self.send_response(206 if wanted else 200)
            self.send_header("Accept-Ranges", "bytes")
            if wanted:
                span = f"{wanted[1]}-{int(wanted[1]) + len(data) - 1}"
                self.send_header("Content-Range", f"bytes {span}/{len(content)}")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/image"
        server.shutdown()
        thread.join()


async def test_a_web_server_in_an_activated_virtual_environment(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nbdkit's Python looked for itself on the path, and found what it may not read."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    with web_server(content, broken=[]) as uri:
        await assert_serves(uri, content)


async def test_a_web_server(content: bytes) -> None:
    broken: list[int] = []
    with web_server(content, broken=broken) as uri:
        await assert_serves(uri, content)
        async with open_backing(uri) as backing:
            with await backing.wait_for_room(Priority.STREAM) as grant:
                assert grant.length >= 256 << 10
            broken.append(503)
            got: list[bytes] = []

            async def read_it() -> None:
                got.append(await read(backing, 0, SIZE))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_it)
                await until(lambda: backing.statistics().retries)
                assert not got
                broken.clear()
                await until(lambda: got)
            assert got == [content]


async def test_a_password_reaches_the_server_only(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is in no command line, no environment, no log, no message, and not in the leaf."""
    caplog.set_level(logging.DEBUG)
    secret = "correct-horse:b@ttery"
    leaf = tmp_path / "leaf.qcow2"
    with web_server(content, broken=[], password=secret) as uri:
        named = uri.replace("http://", f"http://me:{quote(secret)}@")
        before = children(os.getpid())
        async with open_backing(named) as backing:
            assert await read(backing, 0, SIZE) == content
            (pid,) = children(os.getpid()) - before
            for name in ("cmdline", "environ"):
                told = Path(f"/proc/{pid}/{name}").read_bytes()  # noqa: ASYNC240
                assert b"horse" not in told and b"ttery" not in told
            assert backing.uri == uri.replace("http://", "http://me:***@")
        wrong = named.replace("horse", "house")
        assert "house" not in await opens_with(wrong)
        async with open_stream(ServeOptions(leaf=str(leaf), backing=named, stream="off")):
            pass
        with pytest.raises(UsageError, match="name it with -b"):
            async with open_stream(ServeOptions(leaf=str(leaf))):
                pass
        async with open_stream(ServeOptions(leaf=str(leaf), backing=named, stream="off")):
            pass
    for text in (leaf.read_bytes(), caplog.text.encode()):
        assert b"horse" not in text and b"house" not in text


async def test_an_image_format_on_a_web_server(image: Path, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    peers.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", image, path])
    with web_server(path.read_bytes(), broken=[]) as uri:
        await assert_serves(f"qcow2+{uri}", content)


async def test_what_a_web_server_does_not_have(content: bytes) -> None:
    with web_server(content, broken=[]) as uri:
        assert "404" in await opens_with(uri + "-not")
    assert "onnect" in await opens_with("http://127.0.0.1:1/image")


@pytest.mark.parametrize("uri", ["ssh:///path", "ssh://host", "s3://bucket", "file://host/path"])
async def test_what_a_uri_lacks_is_said(uri: str) -> None:
    assert "wanted" in await opens_with(uri)


async def test_no_answer_by_ssh() -> None:
    assert "onnect" in await opens_with("ssh://127.0.0.1:1/image")


async def test_a_plugin_that_is_a_script_listens_where_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    # An answer at all, and of this kind, comes from the plugin.
    assert "127.0.0.1:1" in await opens_with("s3://bucket/key")


def test_every_plugin_names_its_package() -> None:
    assert all(plugin.package for plugin in PLUGINS.values())
