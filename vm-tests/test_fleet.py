# SPDX-License-Identifier: Apache-2.0
"""`./dev demo fleet` with a small image: eight hosts get all of it, each rack once, although a
rack's cache is killed in the middle."""

import pytest

from testbed.demo import fleet
from testbed.fleet import network
from testbed.link.control import parse_bit_rate

pytestmark = pytest.mark.skipif(bool(network.missing()), reason=network.missing())


async def test_eight_hosts_get_an_image_that_crosses_the_origins_link_once_a_rack(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rate = parse_bit_rate("400M")
    assert await fleet.demo("busybox", 32 << 20, rate, rate) < 2.1
    printed = capsys.readouterr().out
    assert "its cache is back" in printed
    assert printed.count("100 % after") == fleet.RACKS * fleet.HOSTS_EACH
