# SPDX-License-Identifier: Apache-2.0
"""What the tests of web servers share: nginx and its places, the user's settings, the image.

A test module makes fixtures of the first: ``web = pytest.fixture(web_server, scope="module")``,
``settings = pytest.fixture(settings_file)``.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from nbdstream.backing import fingerprint, open_backing
from testbed.peers import run, temporary_directory
from testbed.web import Request, WebServer, nginx
from tests.backing_support import MIB, SIZE, read

# What nginx is told for these tests; each place has the files below it.
LOCATIONS = """
location /latest/ { rewrite ^/latest/(.*) /files/$1 redirect; }
location /files/ { alias ROOT/; }
location /loop/ { rewrite ^/loop/(.*) /loop/$1 redirect; }
location /elsewhere/ { return 302 http://127.0.0.1:$OTHER/files/image; }
location /away/ { return 302 ftp://127.0.0.1/image; }
location /down/ { return 302 http://localhost:$OTHER/files/image; }
location /signed/ {
    secure_link $arg_md5,$arg_expires;
    secure_link_md5 "$secure_link_expires s3cret";
    if ($secure_link = "") { return 403; }
    if ($secure_link = "0") { return 410; }
    alias ROOT/;
}
location = /sign { return 302 /signed/image?$SIGNATURE; }
location /private/ { auth_basic "images"; auth_basic_user_file ROOT/users; alias ROOT/; }
location /cookies/ {
    if ($cookie_session != "abc") { return 302 /login; }
    alias ROOT/;
}
location = /login { add_header Set-Cookie "session=abc; Path=/"; return 302 /cookies/image; }
location /header/ { if ($http_x_key != "k3y") { return 403; } alias ROOT/; }
location /whole/ { max_ranges 0; alias ROOT/; }
location /untagged/ { etag off; alias ROOT/; }
location /weak/ { etag off; add_header ETag 'W/"one"'; add_header Last-Modified ""; alias ROOT/; }
location /bare/ { etag off; add_header Last-Modified ""; alias ROOT/; }
location /slow/ { limit_rate 2m; alias ROOT/; }
location /brief/ { keepalive_timeout 0; alias ROOT/; }
"""


def served(root: Path, signature: str = "") -> str:
    return LOCATIONS.replace("ROOT", str(root)).replace("$SIGNATURE", signature)


def web_server(content: bytes) -> Iterator[WebServer]:
    with temporary_directory() as root:
        (root / "image").write_bytes(content)
        password = run(["openssl", "passwd", "-apr1", "correct horse"]).strip()
        (root / "users").write_text(f"me:{password}\n")
        with nginx(root, served(root)) as server:
            yield server


def settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Write the user's file of settings."""

    def write(text: str) -> Path:
        directory = tmp_path / "settings"
        directory.mkdir(exist_ok=True)
        fresh = directory / "new"
        fresh.write_text(text)
        fresh.rename(directory / "http.toml")
        return directory / "http.toml"

    monkeypatch.setenv("NBDSTREAM_HTTP", str(tmp_path / "settings" / "http.toml"))
    write("")
    return write


async def assert_serves(url: str, content: bytes) -> None:
    with trio.fail_after(30):
        async with open_backing(url) as backing:
            assert backing.size == len(content)
            assert await read(backing, 0, SIZE) == content
            assert await read(backing, MIB + 5, 1000) == content[MIB + 5 : MIB + 1005]
            assert (await fingerprint(backing)).startswith("s1:")


def since(web: WebServer, count: int) -> list[Request]:
    return web.requests()[count:]
