# SPDX-License-Identifier: Apache-2.0
"""Images on web servers: redirects, what an image is pinned by, and servers in trouble."""

import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from nbdstream.backing import Backing, open_backing
from nbdstream.errors import BackingMismatchError
from testbed.peers import Qmp, make_image, nbdstream_serve, run, temporary_directory
from testbed.processes import children
from testbed.web import WebServer, nginx
from tests.backing_support import MIB, content_of, image_file, opens_with, read, until
from tests.web_liar import Liar, liar
from tests.web_support import assert_serves, served, settings_file, since, web_server

image = pytest.fixture(image_file, scope="module")
content = pytest.fixture(content_of, scope="module")
web = pytest.fixture(web_server, scope="module")
settings = pytest.fixture(settings_file)


# -- redirects -------------------------------------------------------------------------------


async def test_a_redirect_is_followed_once(content: bytes, web: WebServer) -> None:
    before = len(web.requests())
    await assert_serves(web.url("latest/image"), content)
    asked = since(web, before)
    assert sum(request.status == 302 for request in asked) == 1
    assert sum(request.status == 206 for request in asked) > 15
    assert {request.path for request in asked[1:]} == {"/files/image"}


def signature(directory: Path, valid_for: float) -> str:
    """What makes the place /signed/ open for so many seconds."""
    expires = int(time.time() + valid_for)
    script = f"printf '%s s3cret' {expires} | openssl md5 -binary | openssl base64"
    digest = run(["sh", "-c", script]).strip().replace("+", "-").replace("/", "_").rstrip("=")
    return f"md5={digest}&expires={expires}"


async def test_a_signed_url_that_expires_is_asked_for_again(content: bytes) -> None:
    """nginx's secure_link; the redirect leads to a URL with a fresh signature each time."""
    with temporary_directory() as root:
        (root / "image").write_bytes(content)
        with nginx(root, served(root, signature(root, 3))) as server:
            async with open_backing(server.url("sign")) as backing:
                assert await read(backing, 0, 4096) == content[:4096]
                await until(lambda: _expired(server))
                text = server.config.read_text()
                fresh = signature(root, 300)
                server.config.write_text(re.sub(r"md5=\S+?;", f"{fresh};", text))
                server.reload()
                got = await read(backing, MIB, MIB)
                assert got == content[MIB : 2 * MIB]
            statuses = [request.status for request in server.requests()]
    assert statuses.count(410) >= 1
    assert statuses.count(302) == 2


def _expired(server: WebServer) -> bool:
    found = re.search(r"expires=(\d+)", server.config.read_text())
    assert found
    return time.time() > int(found[1]) + 1


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("loop/image", "more than 10 redirects"),
        ("away/image", "redirects to ftp://"),
        ("none/image", "404 Not Found"),
    ],
)
async def test_redirects_that_lead_nowhere(web: WebServer, path: str, words: str) -> None:
    message = await opens_with(web.url(path))
    assert message.startswith(web.url(path)) and words in message


async def test_a_redirect_does_not_lead_from_tls_into_the_clear(
    web: WebServer, settings: Callable[[str], Path]
) -> None:
    settings(f'["{web.tls_url("")}"]\nca-file = "{web.authority}"\n')
    assert "which is in clear" in await opens_with(web.tls_url("elsewhere/image"))


async def test_a_mirror_that_went_away_is_asked_for_again(
    image: Path, content: bytes, web: WebServer
) -> None:
    """The start of the redirects names another mirror by then, with tags of its own."""
    with temporary_directory() as root, temporary_directory() as copy:
        run(["cp", "-p", image, root / "image"])
        run(["cp", "-p", image, copy / "image"])
        with nginx(
            copy,
            "location /f/ { etag off; add_header ETag '\"x\"'; alias ROOT/; }".replace(
                "ROOT", str(copy)
            ),
        ) as second:
            with nginx(root, served(root)) as first:
                start = Liar.redirecting(first.url("files/image"))
                with liar(start):
                    async with open_backing(start.url) as backing:
                        assert await read(backing, 0, 4096) == content[:4096]
                        start.target = second.url("f/image")
                        first.peer.kill()
                        assert await read(backing, MIB, MIB) == content[MIB : 2 * MIB]


# -- an image that is replaced ---------------------------------------------------------------


@asynccontextmanager
async def replaced(
    content: bytes, path: str, *, other_size: bool = False
) -> AsyncIterator[tuple[Backing, WebServer]]:
    """A backing whose image is replaced after it was opened."""
    with temporary_directory() as root:
        (root / "image").write_bytes(content)
        os.utime(root / "image", (1e9, 1e9))
        with nginx(root, served(root)) as server:
            async with open_backing(server.url(path)) as backing:
                await read(backing, 0, 4096)
                # The samples that identify an image would not show it.
                fresh = bytearray(content)
                fresh[MIB : MIB + 9] = b"different"
                (root / "fresh").write_bytes(fresh + bytes(512 * other_size))
                (root / "fresh").rename(root / "image")
                yield backing, server


@pytest.mark.parametrize("path", ["files/image", "untagged/image", "latest/image"])
async def test_an_image_that_is_replaced_is_refused_for_good(
    image: Path, content: bytes, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with replaced(content, path) as (backing, server):
        with pytest.raises(BackingMismatchError, match="the image was replaced"):
            await read(backing, MIB, 4096)
        with pytest.raises(BackingMismatchError, match="the image was replaced"):
            await read(backing, 0, 4096)
        assert "the image was replaced" in backing.statistics().last_error
        assert {request.status for request in server.requests()} <= {206, 302, 412}
    assert "the image was replaced" in caplog.text


@pytest.mark.parametrize("path", ["bare/image", "weak/image"])
async def test_another_size_shows_a_replaced_image_also_without_tags(
    content: bytes, path: str
) -> None:
    async with replaced(content, path, other_size=True) as (backing, _):
        with pytest.raises(BackingMismatchError, match="it had 6291968 bytes, it has 6292480"):
            await read(backing, MIB, 4096)


async def test_a_helper_that_is_started_again_does_not_take_another_image(
    image: Path, content: bytes
) -> None:
    before = children(os.getpid())
    async with replaced(content, "files/image") as (backing, _):
        (pid,) = (pid for pid in children(os.getpid()) - before if _is_helper(pid))
        os.kill(pid, 9)
        with pytest.raises(BackingMismatchError, match="the image was replaced"):
            await read(backing, 0, 4096)


def _is_helper(pid: int) -> bool:
    return b"nbdkit" in Path(f"/proc/{pid}/cmdline").read_bytes()


async def test_a_replaced_image_is_refused_behind_a_format_too(image: Path, tmp_path: Path) -> None:
    with temporary_directory() as root:
        run(["qemu-img", "convert", "-q", "-O", "qcow2", image, root / "image"])
        with nginx(root, served(root)) as server:
            async with open_backing(f"qcow2+{server.url('files/image')}") as backing:
                await read(backing, 0, 4096)
                os.utime(root / "image", (1e9, 1e9))
                with pytest.raises(BackingMismatchError, match="the image was replaced"):
                    await read(backing, MIB, 4096)


async def test_without_tag_and_date_there_is_a_warning(
    content: bytes, web: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    await assert_serves(web.url("bare/image"), content)
    assert "neither ETag nor Last-Modified" in caplog.text


# -- servers in trouble ----------------------------------------------------------------------


async def test_a_server_without_ranges_is_refused_in_one_line(web: WebServer) -> None:
    assert "cannot be read in parts" in await opens_with(web.url("whole/image"))


@pytest.mark.parametrize("path", ["slow/image", "brief/image", "untagged/image", "weak/image"])
async def test_servers_that_are_merely_odd(content: bytes, web: WebServer, path: str) -> None:
    await assert_serves(web.url(path), content)


async def test_a_body_that_is_cut_off_goes_on_where_it_ended(content: bytes) -> None:
    with liar(Liar.serving(content)) as server:
        async with open_backing(server.url) as backing:
            server.cut_after = 100_000
            assert await read(backing, 0, MIB) == content[:MIB]
        ranges = [re.search(r"range: bytes=(\d+)", head, re.I) for head in server.asked]
        starts = [int(found[1]) for found in ranges if found]
        assert starts[-3:] == [800_000, 900_000, 1_000_000]


@pytest.mark.parametrize("status", [429, 503])
async def test_a_server_that_says_when_to_come_back(content: bytes, status: int) -> None:
    with liar(Liar.serving(content)) as server:
        async with open_backing(server.url) as backing:
            await read(backing, 0, 512)
            server.busy, server.retry_after = [status], "1"
            began = trio.current_time()
            assert await read(backing, 0, 4096) == content[:4096]
            assert trio.current_time() - began > 0.9
            assert server.asked_while_quiet == 0


async def test_a_server_in_trouble_is_asked_again(content: bytes) -> None:
    with liar(Liar.serving(content)) as server:
        async with open_backing(server.url) as backing:
            await read(backing, 0, 512)
            server.busy, server.retry_after = [500, 502], ""
            assert await read(backing, 0, 4096) == content[:4096]
            assert backing.statistics().retries >= 2
            assert "50" in backing.statistics().last_error


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ("bytes 512-1023/{size}", "answered with Content-Range bytes 512-1023"),
        ("bytes 0-99999/{size}", "answered with Content-Range bytes 0-99999"),
        ("bytes 0-511/*", r"answered with Content-Range bytes 0-511/\*"),
        ("octets 0-511/{size}", "answered with Content-Range octets"),
        ("", "answered with Content-Range none"),
    ],
)
async def test_a_wrong_range_is_never_taken_for_data(content: bytes, lie: str, words: str) -> None:
    with liar(Liar.serving(content)) as server:
        async with open_backing(server.url) as backing:
            await read(backing, 0, 512)
            server.content_range = [lie.format(size=len(content))]
            assert await read(backing, 0, 512) == content[:512]
            assert backing.statistics().retries >= 1
            assert re.search(words, backing.statistics().last_error)


async def test_a_shorter_answer_than_asked_for_is_completed(content: bytes) -> None:
    with liar(Liar.serving(content)) as server:
        server.most = 70_000
        async with open_backing(server.url) as backing:
            assert await read(backing, 3, MIB) == content[3 : MIB + 3]


async def test_status_and_the_guest_are_told_of_a_replaced_image(tmp_path: Path) -> None:
    """The whole server: a guest's read of what is not local fails, and says why in one line."""
    with temporary_directory() as root:
        make_image(root / "image", 64 * MIB)
        with nginx(root, served(root)) as server:
            leaf, url = tmp_path / "leaf.qcow2", server.url("files/image")
            with nbdstream_serve(leaf, url, "--stream", "off") as peer:
                os.utime(root / "image", (1e9, 1e9))
                run(["qemu-io", "-f", "raw", "-r", "-c", "read 32M 4k", peer.uri], check=False)
                assert peer.control
                with Qmp(peer.control) as qmp:
                    stats = qmp.execute("x-nbdstream-stats")
                assert "the image was replaced" in json.dumps(stats["backing"])
                lines = [line for line in peer.stderr().splitlines() if "replaced" in line]
                assert len(lines) == 1


async def test_requests_share_connections(image: Path, web: WebServer) -> None:
    before = len(web.requests())
    async with open_backing(web.url("files/image")) as backing:
        for offset in range(0, MIB, MIB // 16):
            await read(backing, offset, 4096)
    assert len({request.connection for request in since(web, before)}) == 1


async def _all_at_once(backing: Backing, count: int) -> None:
    async with trio.open_nursery() as nursery:
        for index in range(count):
            nursery.start_soon(read, backing, index * 64 * 1024, 4096)


async def test_the_user_can_limit_connections(
    web: WebServer, settings: Callable[[str], Path]
) -> None:
    settings(f'["{web.url("")}"]\nconnections = 2\n')
    before = len(web.requests())
    async with open_backing(web.url("slow/image")) as backing:
        await _all_at_once(backing, 32)
    assert len({request.connection for request in since(web, before)}) <= 2
