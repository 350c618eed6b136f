# SPDX-License-Identifier: Apache-2.0
"""Disks as QEMU's options: what an NBD URI means to QEMU."""

import pytest

from nbdstream.errors import UsageError
from nbdstream.guest.disks import Disk, nbd_options


@pytest.mark.parametrize(
    ("uri", "server", "export"),
    [
        ("nbd://host", {"type": "inet", "host": "host", "port": "10809"}, None),
        ("nbd://host:1234/", {"type": "inet", "host": "host", "port": "1234"}, None),
        ("nbd://[::1]:99/a%20b", {"type": "inet", "host": "::1", "port": "99"}, "a b"),
        ("nbd+unix:///?socket=/run/x", {"type": "unix", "path": "/run/x"}, None),
        ("nbd+unix:///d/e?socket=/a%3Fb", {"type": "unix", "path": "/a?b"}, "d/e"),
    ],
)
def test_nbd_uris(uri: str, server: dict[str, str], export: str | None) -> None:
    options = nbd_options(uri)
    assert options["driver"] == "nbd"
    assert (options["server"], options.get("export")) == (server, export)


@pytest.mark.parametrize(
    "uri",
    ["nbds://host", "nbds+unix:///?socket=/x", "nbd+unix:///x", "http://x", "nbd:///x", "disk.raw"],
)
def test_what_qemu_cannot_take_is_refused_by_name(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        nbd_options(uri)
    assert uri in str(caught.value)


def test_a_port_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="port"):
        nbd_options("nbd://host:99999")


def test_reconnection_is_asked_for_only_where_wanted() -> None:
    assert "reconnect-delay" not in Disk.nbd("nbd://host").blockdev["file"]
    assert Disk.nbd("nbd://host", reconnect_delay=30).blockdev["file"]["reconnect-delay"] == 30
