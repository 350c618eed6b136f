# SPDX-License-Identifier: Apache-2.0
"""Images on web servers: credentials, headers, cookies, certificates and proxies."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdstream.backing import open_backing
from testbed.peers import temporary_directory
from testbed.processes import children
from testbed.web import WebServer, nginx
from tests.backing_support import MIB, content_of, image_file, opens_with, read
from tests.web_liar import Liar, liar
from tests.web_support import assert_serves, settings_file, since, web_server

image = pytest.fixture(image_file, scope="module")
content = pytest.fixture(content_of, scope="module")
web = pytest.fixture(web_server, scope="module")
settings = pytest.fixture(settings_file)


# -- who asks --------------------------------------------------------------------------------


async def test_credentials_from_the_file(
    content: bytes, web: WebServer, settings: Callable[[str], Path]
) -> None:
    assert "401 Unauthorized" in await opens_with(web.url("private/image"))
    settings(f'["{web.url("private")}"]\nuser = "me"\npassword = "correct horse"\n')
    await assert_serves(web.url("private/image"), content)
    file = settings(f'["{web.url("")}"]\nuser = "me"\npassword-file = "word"\n')
    file.with_name("word").write_text("correct horse\n")
    await assert_serves(web.url("private/image"), content)


async def test_credentials_that_were_replaced_are_read_again(
    content: bytes, web: WebServer, settings: Callable[[str], Path]
) -> None:
    """A token expires in mid-stream: the server says so, and the file has a new one by then."""
    with temporary_directory() as root:
        (root / "image").write_bytes(content)
        gate = (
            'location /t/ { if ($http_authorization != "Bearer one") { return 401; } alias ROOT/; }'
        )
        with nginx(root, gate.replace("ROOT", str(root))) as server:
            settings(f'["{server.url("t")}"]\nheaders = ["Authorization: Bearer one"]\n')
            async with open_backing(server.url("t/image")) as backing:
                await read(backing, 0, 4096)
                server.config.write_text(
                    server.config.read_text().replace("Bearer one", "Bearer two")
                )
                server.reload()
                settings(f'["{server.url("t")}"]\nheaders = ["Authorization: Bearer two"]\n')
                assert await read(backing, MIB, 4096) == content[MIB : MIB + 4096]


async def test_headers_and_cookies(
    content: bytes, web: WebServer, settings: Callable[[str], Path]
) -> None:
    assert "403 Forbidden" in await opens_with(web.url("header/image"))
    settings(f'["{web.url("header")}"]\nheaders = ["X-Key: k3y"]\n')
    await assert_serves(web.url("header/image"), content)
    settings(f'["{web.url("cookies")}"]\ncookie = "session=abc"\n')
    await assert_serves(web.url("cookies/image"), content)


async def test_a_cookie_that_a_redirect_sets_is_sent_on(content: bytes, web: WebServer) -> None:
    await assert_serves(web.url("cookies/image"), content)


async def test_what_is_meant_for_one_server_is_not_sent_to_another(
    content: bytes, web: WebServer, settings: Callable[[str], Path]
) -> None:
    settings(
        f'["{web.url("")}"]\nuser = "me"\npassword = "correct horse"\ncookie = "a=b"\n'
        'headers = ["X-Key: k3y"]\n'
    )
    before = len(web.requests())
    await assert_serves(web.url("elsewhere/image"), content)
    asked = since(web, before)
    assert asked[0].authorization and asked[0].cookie
    assert {request.port for request in asked[1:]} == {web.other_port}
    assert {(request.authorization, request.cookie) for request in asked[1:]} == {("-", "-")}


async def test_no_secret_is_on_a_command_line(image: Path, web: WebServer) -> None:
    before = children(os.getpid())
    url = web.url("files/image?token=s3cret").replace("//", "//me:h0rse@")
    async with open_backing(url) as backing:
        assert await read(backing, 0, 512)
        for pid in children(os.getpid()) - before:
            for name in ("cmdline", "environ"):
                told = Path(f"/proc/{pid}/{name}").read_bytes()  # noqa: ASYNC240
                assert b"s3cret" not in told and b"h0rse" not in told
        assert "s3cret" not in backing.uri and "h0rse" not in backing.uri
    assert web.requests()[-1].path == "/files/image?token=s3cret"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = ", "not TOML"),
        ("x = 1", "a table for each place"),
        ('["https://host/"]\npasword = "x"', "no key 'pasword'; known: user, password"),
        ('["https://host/"]\nverify = "no"', "'verify' is true or false"),
        ('["https://host/"]\nheaders = ["x"]', "'headers' is a list of headers"),
        ('["https://me@host/"]\n', "the user of host goes in the key 'user'"),
    ],
)
async def test_settings_that_make_no_sense(
    web: WebServer, settings: Callable[[str], Path], text: str, words: str
) -> None:
    path = settings(text)
    message = await opens_with(web.url("files/image"))
    assert str(path) in message and words in message


# -- TLS and proxies -------------------------------------------------------------------------


async def test_a_certificate_is_checked(
    content: bytes, web: WebServer, settings: Callable[[str], Path]
) -> None:
    url = web.tls_url("files/image")
    assert "certificate" in await opens_with(url)
    settings(f'["{web.tls_url("")}"]\nca-file = "{web.authority}"\n')
    await assert_serves(url, content)
    assert {request.protocol for request in web.requests()[-5:]} == {"HTTP/2.0"}
    settings(f'["{web.tls_url("")}"]\nverify = false\nhttp2 = false\n')
    await assert_serves(url, content)
    assert {request.protocol for request in web.requests()[-5:]} == {"HTTP/1.1"}


async def test_the_environment_names_authorities(
    content: bytes, web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(web.authority))
    await assert_serves(web.tls_url("files/image"), content)


async def test_a_proxy(
    content: bytes, web: WebServer, settings: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with liar(Liar.proxy()) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("https_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "")
        settings(f'["{web.tls_url("")}"]\nca-file = "{web.authority}"\n')
        await assert_serves(web.tls_url("files/image"), content)
        assert proxy.asked and proxy.asked[0].startswith("CONNECT localhost:")
        proxy.asked.clear()
        settings(f'["{web.tls_url("")}"]\nca-file = "{web.authority}"\nproxy = ""\n')
        await assert_serves(web.tls_url("files/image"), content)
        assert not proxy.asked
