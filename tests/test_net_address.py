# SPDX-License-Identifier: Apache-2.0
"""Socket addresses and NBD URIs: both ways, with names as hostile as they come."""

import nbd
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.errors import UsageError
from nbdstream.net.address import (
    NbdUri,
    TcpAddress,
    UnixAddress,
    VsockAddress,
    is_nbd_uri,
    parse_address,
    parse_tcp,
)
from nbdstream.net.listeners import listen_unix
from nbdstream.server.server import Server
from testbed.peers import temporary_directory
from tests.memory_export import MemoryExport
from tests.server_support import client, in_thread

HOSTILE = [
    "",
    "disk0@0123456789abcdef",
    "/",
    "//absolute",
    "a/b",
    "a?b=c&socket=/etc/passwd",
    "a#b",
    "100%",
    "%2F",
    "a+b c",
    "tab\tand\nnewline\r",
    "Größe-磁盘-💾",
    "\x7f\x01",
    ";:@[]'\"\\`$<>{}|^",
]

# Any text that a server can name an export ("Conventions": UTF-8 without NUL).
names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
paths = st.binary(min_size=1, max_size=107).map(lambda raw: raw.decode(errors="surrogateescape"))
hosts = st.one_of(
    st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True),
    st.ip_addresses().map(str),
    st.just(""),
    st.just("fe80::1%eth0"),
)
ports = st.integers(0, 65535)
tcp = st.builds(TcpAddress, hosts, ports)
unix = st.builds(UnixAddress, paths)
vsock = st.builds(VsockAddress, st.integers(0, 2**32 - 1), st.integers(1, 65535))
parameters = st.lists(
    st.tuples(names.filter(lambda name: name not in ("", "socket")), names), max_size=3
).map(tuple)
uris = st.builds(NbdUri, st.one_of(tcp, unix, vsock), names, st.booleans(), names, parameters)


@given(st.one_of(tcp, unix))
def test_an_address_survives_being_written(address: TcpAddress | UnixAddress) -> None:
    assert parse_address(str(address)) == address


@given(uris)
def test_a_uri_survives_being_written(uri: NbdUri) -> None:
    text = str(uri)
    assert NbdUri.parse(text) == uri
    assert text.isascii() and text.isprintable() and " " not in text
    assert is_nbd_uri(text)


@given(st.text())
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = parse_address(text)
    except UsageError:
        return
    assert parse_address(str(address)) == address


@given(st.one_of(st.text(), st.text().map(lambda text: f"nbd://{text}")))
def test_any_text_is_a_uri_or_refused(text: str) -> None:
    try:
        uri = NbdUri.parse(text)
    except UsageError:
        return
    assert NbdUri.parse(str(uri)) == uri


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("localhost:10809", TcpAddress("localhost", 10809)),
        (":0", TcpAddress("", 0)),
        ("[::1]:10809", TcpAddress("::1", 10809)),
        ("192.0.2.1:65535", TcpAddress("192.0.2.1", 65535)),
        ("unix:/run/a b", UnixAddress("/run/a b")),
        ("unix:100%", UnixAddress("100%")),
    ],
)
def test_addresses(text: str, address: TcpAddress | UnixAddress) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        "10809",
        "h:",
        "h:x",
        "::1:10809",
        "h:65536",
        "h:-1",
        "h:²",
        "a b:1",
        "unix:",
    ],
)
def test_addresses_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)


def test_a_unix_socket_is_no_tcp_address() -> None:
    with pytest.raises(UsageError):
        parse_tcp("unix:/run/nbd")


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        # doc/uri.md, "NBD URI export name"
        ("nbd://example.com/disk", NbdUri(TcpAddress("example.com", 10809), "disk")),
        ("nbd+unix:///disk?socket=sock", NbdUri(UnixAddress("sock"), "disk")),
        ("nbd://example.com/", NbdUri(TcpAddress("example.com", 10809))),
        ("nbd://example.com", NbdUri(TcpAddress("example.com", 10809))),
        ("nbd://example.com//disk", NbdUri(TcpAddress("example.com", 10809), "/disk")),
        ("nbd://example.com/a%20b", NbdUri(TcpAddress("example.com", 10809), "a b")),
        # "NBD URI socket parameter"
        ("nbd+unix:///?socket=%00/abstract", NbdUri(UnixAddress("\0/abstract"))),
        # A plus sign stands for itself: this is no form.
        ("nbd+unix:///?socket=/a+b", NbdUri(UnixAddress("/a+b"))),
        ("nbds://me@[::1]:9/", NbdUri(TcpAddress("::1", 9), "", True, "me")),
        (
            "nbds+unix:///x?socket=s&tls-psk-file=k",
            NbdUri(UnixAddress("s"), "x", True, "", (("tls-psk-file", "k"),)),
        ),
        ("nbd+vsock://3:99/x", NbdUri(VsockAddress(3, 99), "x")),
        ("nbd+vsock:///", NbdUri(VsockAddress(2, 10809))),
    ],
)
def test_uris(text: str, uri: NbdUri) -> None:
    assert NbdUri.parse(text) == uri


@pytest.mark.parametrize(
    "text",
    [
        "http://host/",
        "nbd:unix:/run/nbd",
        "disk.raw",
        "nbd+unix:///x",
        "nbd+unix:///?socket=",
        "nbd+unix:///?socket=/a&socket=/b",
        "nbd://host:99999",
        "nbd://host:x/",
        "nbd://[::1/",
        "nbd://host/a b",
        "nbd://host/\nx",
        "nbd+vsock://host/",
    ],
)
def test_what_is_no_nbd_uri_is_refused_with_its_name(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        NbdUri.parse(text)
    assert repr(text)[1:-1] in str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
async def test_libnbd_and_nbdinfo_find_the_export_that_was_meant(name: str) -> None:
    """Other readers of URIs understand the quoting as it was meant."""
    export = MemoryExport(4096)
    export.name = name
    other = MemoryExport(8192)
    other.name = "a"
    with temporary_directory() as directory:
        path = directory / "so+ck et?x=%41#&;y"
        listener = listen_unix(path)
        uri = listener.uri(name)
        assert NbdUri.parse(uri) == NbdUri(UnixAddress(str(path)), name)
        server = Server([export, other])

        def ask() -> str:
            handle = nbd.NBD()
            handle.set_opt_mode(True)
            handle.connect_uri(uri)
            found: str = handle.get_export_name()
            handle.opt_abort()
            return found

        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run, [listener])
            try:
                assert await in_thread(ask) == name
                assert await client("nbdinfo", "--size", uri) == "4096\n"
            finally:
                server.stop()
