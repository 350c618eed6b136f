# SPDX-License-Identifier: Apache-2.0
"""Addresses, NBD URIs, and what holds them: any text.

Accepts, or raises UsageError; nothing is looked up or opened. What is accepted comes back when
it is written and read again.
"""

from collections.abc import Callable, Iterator

from fuzz.target import Target
from nbdstream.errors import UsageError
from nbdstream.guest.disks import nbd_options
from nbdstream.handover.generation import export_name, generation_of
from nbdstream.migrate.plan import DiskPlan
from nbdstream.net.address import NbdUri, parse_address


def run(data: bytes) -> object:
    text = data.decode("utf-8", "surrogateescape")
    address = _parsed(parse_address, text)
    if not isinstance(address, str):
        assert parse_address(str(address)) == address
    uri = _parsed(NbdUri.parse, text)
    if not isinstance(uri, str):
        assert NbdUri.parse(str(uri)) == uri
    generation = generation_of(text)
    if generation:
        assert generation_of(f"nbd://host/{export_name('disk', generation)}") == generation
    return address, uri, generation, _parsed(nbd_options, text), _parsed(DiskPlan.parse, text)


def _parsed(parse: Callable[[str], object], text: str) -> object:
    """What a parser makes of the text, or its words of refusal."""
    try:
        return parse(text)
    except UsageError as error:
        return str(error)


def seeds() -> Iterator[bytes]:
    for text in (
        "localhost:10809",
        "[::1]:0",
        ":5",
        "unix:/run/x",
        "nbd://host:10809/name",
        "nbd://[::1]/disk@0123456789abcdef",
        "nbd://user@host/%41?a=b&c",
        "nbd+unix:///name?socket=/run/x.sock",
        "nbds://host/%41?tls-psk-file=x",
        "nbd+vsock://3:10809/",
        "listen=unix:/a,leaf=b.qcow2,socket=c,control=d,source-control=e",
        "listen=h:1,leaf=b.raw,socket=c,control=d,source-node=n,reach=r:2",
    ):
        yield text.encode()


TARGET = Target("addresses", run, (), seeds)
