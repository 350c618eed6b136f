# SPDX-License-Identifier: Apache-2.0
"""TLS and who is let in: wrong clients, wrong bytes, certificates that are replaced."""

import logging
import ssl
from pathlib import Path

import pytest
import trio

from nbdstream.errors import UsageError
from nbdstream.server import connection as connection_module
from nbdstream.server.certificates import Certificates, TlsPolicy
from nbdstream.server.constants import (
    GREETING,
    Chunk,
    Command,
    Option,
)
from testbed.peers import (
    run,
)
from tests.pki import Pki, disk
from tests.server_support import (
    READ,
    RawClient,
    clients_gone,
    option,
    request,
    serving,
)

MIB = 1 << 20
FLAGS = (3).to_bytes(4, "big")


async def test_clear_and_secure_clients_where_both_may_come(pki: Pki) -> None:
    export = disk()
    async with serving([export], tls=pki.certificates(required=False)) as (_, path):
        for secure in (False, True):
            one = await RawClient.connect(path)
            if secure:
                await one.start_tls(pki.context())
            await one.go(structured=False)
            await one.send(request(READ, 0, 10))
            assert await one.reply(10) == (1, 0, bytes(export.data[:10]))
            await one.aclose()


@pytest.mark.parametrize("own", ["", "wrong", "expired"])
async def test_a_client_without_the_right_certificate(
    pki: Pki, own: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving([disk()], tls=pki.certificates(verify_peer=True)) as (server, path):
        stranger = await RawClient.connect(path)
        with pytest.raises((trio.BrokenResourceError, EOFError)):
            await stranger.start_tls(pki.context(own))
            await stranger.go()
        await stranger.aclose()
        await clients_gone(server)
        assert "TLS handshake failed" in caplog.text
        known = await RawClient.connect(path)
        await known.start_tls(pki.context("good"))
        await known.go()
        await known.aclose()


async def test_a_revoked_certificate(pki: Pki, tmp_path: Path) -> None:
    pki.authority.issue(tmp_path, "server")
    for name in ("gone", "here"):
        pki.authority.issue(tmp_path / name, "client")
    pki.authority.revoke(tmp_path, tmp_path / "gone" / "client-cert.pem")
    certificates = Certificates(TlsPolicy(tmp_path, verify_peer=True))
    async with serving([disk()], tls=certificates) as (_, path):
        for name in ("here", "gone"):
            context = pki.context()
            own = tmp_path / name
            context.load_cert_chain(own / "client-cert.pem", own / "client-key.pem")
            one = await RawClient.connect(path)
            if name == "here":
                await one.start_tls(context)
                await one.go()
            else:
                with pytest.raises((trio.BrokenResourceError, EOFError)):
                    await one.start_tls(context)
                    await one.go()
            await one.aclose()


async def test_an_old_version_of_tls(pki: Pki) -> None:
    context = pki.context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with serving([disk()], tls=pki.certificates()) as (_, path):
        old = await RawClient.connect(path)
        with pytest.raises(trio.BrokenResourceError) as caught:
            await old.start_tls(context)
        assert "version" in str(caught.value.__cause__).lower()
        await old.aclose()


GARBAGE = {
    "an option": option(Option.LIST),
    "zeroes": bytes(4096),
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "a record that is too long": b"\x16\x03\x01\xff\xff" + bytes(1000),
    "an empty record": b"\x16\x03\x01\x00\x00",
    "half a ClientHello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600),
    "an alert": b"\x15\x03\x01\x00\x02\x02\x28",
    "application data": b"\x17\x03\x03\x00\x10" + bytes(16),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
async def test_garbage_instead_of_a_client_hello(
    pki: Pki, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving([disk()], tls=pki.certificates()) as (server, path):
        bystander = await RawClient.connect(path)
        await bystander.start_tls(pki.context())
        await bystander.go()
        rude = await RawClient.connect(path)
        await rude.take(GREETING.size)
        await rude.send(FLAGS)
        await rude.option(Option.STARTTLS)
        await rude.send(garbage)
        assert isinstance(rude.stream, trio.SocketStream)
        await rude.stream.send_eof()
        sent = b"".join([data async for data in rude.stream])
        await rude.aclose()
        assert sent == b"" or sent[0] == 0x15  # at most an alert
        await clients_gone(server, 1)
        await bystander.send(request(Command.FLUSH))
        assert (await bystander.reply())[1] == Chunk.NONE
        await bystander.aclose()
    assert "unexpected" not in caplog.text


async def test_a_handshake_has_its_time(
    pki: Pki, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection_module, "HANDSHAKE_TIMEOUT", 0.2)
    async with serving([disk()], tls=pki.certificates()) as (_, path):
        slow = await RawClient.connect(path)
        await slow.take(GREETING.size)
        await slow.send(FLAGS)
        await slow.option(Option.STARTTLS)
        await slow.send(b"\x16\x03\x01")
        with trio.fail_after(10):
            assert await slow.hung_up()
        await slow.aclose()
    assert "no handshake in 0.2 s" in caplog.text


async def test_damage_on_the_way_ends_the_connection(pki: Pki) -> None:
    export = disk()
    before = bytes(export.data)
    async with serving([export], tls=pki.certificates()) as (server, path):
        secure = await RawClient.connect(path)
        await secure.start_tls(pki.context())
        await secure.go()
        assert isinstance(secure.stream, trio.SSLStream)
        # A record that this session's key has not made.
        await secure.stream.transport_stream.send_all(b"\x17\x03\x03\x00\x40" + bytes(64))
        with trio.fail_after(10):
            await clients_gone(server)
        await secure.stream.transport_stream.aclose()
    assert export.data == before


async def shown(path: Path, context: ssl.SSLContext) -> str:
    """The common name in the certificate that the server shows."""
    one = await RawClient.connect(path)
    context.check_hostname = False
    await one.start_tls(context)
    assert isinstance(one.stream, trio.SSLStream)
    subject = dict(pair for part in one.stream.getpeercert()["subject"] for pair in part)
    await one.aclose()
    return str(subject["commonName"])


async def test_new_certificates_are_used_without_a_restart(
    pki: Pki, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nbdstream.server.certificates")
    pki.authority.issue(tmp_path, "server", name="first")
    async with serving([disk()], tls=Certificates(TlsPolicy(tmp_path))) as (_, path):
        guest = await RawClient.connect(path)
        context = pki.context()
        context.check_hostname = False
        await guest.start_tls(context)
        await guest.go()
        assert await shown(path, pki.context()) == "first"
        new = pki.authority.issue(tmp_path / "new", "server", name="second")
        # As certbot and others do it: one file after the other.
        (new / "server-cert.pem").rename(tmp_path / "server-cert.pem")
        assert await shown(path, pki.context()) == "first"
        assert await shown(path, pki.context()) == "first"
        assert caplog.text.count("the former certificates stay in use") == 1
        (new / "server-key.pem").rename(tmp_path / "server-key.pem")
        assert await shown(path, pki.context()) == "second"
        (tmp_path / "server-key.pem").unlink()
        assert await shown(path, pki.context()) == "second"
        await guest.send(request(Command.FLUSH))
        assert (await guest.reply())[1] == Chunk.NONE
        await guest.aclose()


def test_files_that_are_missing_or_make_no_sense(pki: Pki, tmp_path: Path) -> None:
    def complaint(*, verify_peer: bool = False) -> str:
        with pytest.raises(UsageError) as caught:
            Certificates(TlsPolicy(tmp_path, verify_peer=verify_peer))
        return str(caught.value)

    assert complaint() == f"{tmp_path}/server-cert.pem: No such file or directory"
    pki.authority.issue(tmp_path, "server")
    (tmp_path / "ca-cert.pem").write_text("no certificate")
    Certificates(TlsPolicy(tmp_path))
    assert "ca-cert.pem: not what OpenSSL can read as PEM" in complaint(verify_peer=True)
    (tmp_path / "ca-cert.pem").unlink()
    assert "ca-cert.pem: No such file" in complaint(verify_peer=True)
    key = (tmp_path / "server-key.pem").read_text()
    other = pki.authority.issue(tmp_path / "other", "server") / "server-key.pem"
    (tmp_path / "server-key.pem").write_bytes(other.read_bytes())
    assert "the key does not belong to the certificate" in complaint()
    (tmp_path / "server-key.pem").write_text("nonsense")
    assert "PEM" in complaint()
    (tmp_path / "server-key.pem").write_text(key)
    encrypted = ["-out", str(tmp_path / "locked.pem"), "-aes256", "-passout", "pass:secret"]
    run(["openssl", "pkey", "-in", tmp_path / "server-key.pem", *encrypted])
    (tmp_path / "locked.pem").rename(tmp_path / "server-key.pem")
    assert "encrypted" in complaint()
