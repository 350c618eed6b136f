# SPDX-License-Identifier: Apache-2.0
"""TLS towards clients: data through it, and real clients."""

import ssl
from pathlib import Path

import pytest
import trio

from nbdstream.server.constants import (
    GREETING,
    Option,
)
from testbed.peers import (
    PeerError,
    assert_same,
    make_image,
    nbdkit,
    nbdstream_serve,
    run,
)
from testbed.remotes import free_port
from tests.pki import Pki, disk
from tests.server_support import (
    DISC,
    READ,
    WRITE,
    RawClient,
    option,
    request,
    serving,
)

MIB = 1 << 20
FLAGS = (3).to_bytes(4, "big")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_reads_and_writes_of_every_size(pki: Pki, version: ssl.TLSVersion) -> None:
    export, context = disk(), pki.context()
    context.minimum_version = context.maximum_version = version
    async with serving([export], tls=pki.certificates()) as (_, path):
        secure = await RawClient.connect(path)
        await secure.start_tls(context)
        await secure.go(structured=False)
        for length in (1, 16383, 16384, 16385, 300_000, 8 * MIB):
            await secure.send(request(READ, 0, length))
            assert await secure.reply(length) == (1, 0, bytes(export.data[:length]))
            data = bytes([length % 255]) * length
            await secure.send(request(WRITE, 0, length) + data)
            assert await secure.reply() == (1, 0, b"")
            assert export.data[:length] == data
        await secure.send(request(DISC))
        assert await secure.stream.receive_some() == b""  # close_notify; else an error is raised
        await secure.aclose()


async def test_many_replies_to_a_client_that_does_not_read(pki: Pki) -> None:
    """More than the socket takes; another connection is served meanwhile."""
    export = disk()
    async with serving([export], tls=pki.certificates()) as (_, path):
        secure, other = await RawClient.connect(path), await RawClient.connect(path)
        for each in (secure, other):
            await each.start_tls(pki.context())
            await each.go(structured=False)
        for cookie in range(20):
            await secure.send(request(READ, cookie, MIB, cookie=cookie))
        await other.send(request(READ, 5, 10, cookie=77))
        assert await other.reply(10) == (77, 0, bytes(export.data[5:15]))
        found = [await secure.reply(MIB) for _ in range(20)]
        assert sorted(found) == [
            (cookie, 0, bytes(export.data[cookie : cookie + MIB])) for cookie in range(20)
        ]
        for each in (secure, other):
            await each.stream.aclose()


async def test_records_in_pieces_of_a_byte(pki: Pki) -> None:
    """A client behind a link that delivers one byte at a time."""
    export = disk()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = pki.context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    async with serving([export], tls=pki.certificates()) as (_, path):
        raw = await RawClient.connect(path)
        await raw.take(GREETING.size)
        await raw.send(FLAGS)
        await raw.option(Option.STARTTLS)

        async def push() -> None:
            for byte in outgoing.read():
                await raw.send(bytes([byte]))

        async def pull() -> None:
            await push()
            incoming.write(await raw.stream.receive_some())

        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await pull()
        tls.write(option(Option.EXPORT_NAME) + request(READ, 3, 5000))
        received = b""
        while len(received) < 8 + 2 + 16 + 5000:
            await push()
            try:
                received += tls.read(65536)
            except ssl.SSLWantReadError:
                await pull()
        assert received[-5000:] == export.data[3:5003]
        await raw.aclose()


async def test_a_server_that_stops_says_goodbye(pki: Pki) -> None:
    async with serving([disk()], tls=pki.certificates()) as (server, path):
        secure = await RawClient.connect(path)
        await secure.start_tls(pki.context())
        await secure.go()
        server.stop()
        with trio.fail_after(10):
            assert await secure.stream.receive_some() == b""
        await secure.aclose()


@pytest.fixture(scope="module")
def image(pki: Pki) -> Path:
    path = pki["image.raw"]
    make_image(path, 3 * MIB, seed=6)
    return path


def qemu_export(uri: str, pki: Pki, own: str = "good") -> list[str]:
    """Arguments of QEMU's tools for an export with TLS at ``uri``, "nbds://HOST:PORT/"."""
    host, port = uri.removeprefix("nbds://").removesuffix("/").split(":")
    creds = f"tls-creds-x509,id=tls0,endpoint=client,dir={pki[own]}"
    target = f"driver=nbd,host={host},port={port},tls-creds=tls0,tls-hostname=localhost"
    return ["--object", creds, "--image-opts", target]


@pytest.mark.parametrize("option", ["--tls=require", "--tls=on"])
def test_libnbd_and_qemu_and_nbdkit(pki: Pki, image: Path, tmp_path: Path, option: str) -> None:
    port = free_port()
    tls = [f"--tls-certificates={pki['good']}", "--tls-verify-peer", option]
    leaf = tmp_path / "leaf.raw"
    leaf.write_bytes(image.read_bytes())
    command = ["nbdinfo", "--json", f"nbds://localhost:{port}/?tls-certificates={pki['good']}"]
    with nbdstream_serve(leaf, None, "--listen", f"localhost:{port}", *tls) as server:
        scheme = "nbds" if option == "--tls=require" else "nbd"
        assert server.uri.startswith(f"{scheme}://")
        assert '"TLS": true' in run(command)
        secure = f"nbds://localhost:{port}/"
        run(["nbdcopy", f"{secure}?tls-certificates={pki['good']}", tmp_path / "copy.raw"])
        assert_same(tmp_path / "copy.raw", image)
        converted = [*qemu_export(secure, pki), "-O", "qcow2", str(tmp_path / "copy.qcow2")]
        run(["qemu-img", "convert", *converted])
        assert_same(tmp_path / "copy.qcow2", image, "qcow2")
        told = ["nbd", "hostname=localhost", f"port={port}", "tls=require"]
        with nbdkit(*told, f"tls-certificates={pki['good']}") as between:
            assert_same(between.uri, image)
        if option == "--tls=require":
            with pytest.raises(PeerError, match="not supported"):
                run(["nbdinfo", f"nbd://localhost:{port}/"])
        else:
            assert_same(f"nbd://localhost:{port}/", image)
        with pytest.raises(PeerError):
            run(["qemu-img", "info", *qemu_export(secure, pki, "wrong")])
