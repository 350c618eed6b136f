# SPDX-License-Identifier: Apache-2.0
"""The tables of limits in the documentation say what the code does."""

import re
from pathlib import Path

import pytest

from nbdstream.control import disks, web
from nbdstream.control import server as control
from nbdstream.net import listeners
from nbdstream.qmp import protocol as qmp
from nbdstream.server import (
    connection,
    constants,
    handshake,
    options,
    payloads,
    replies,
    server,
    transmission,
)

DOCS = Path(__file__).parent.parent / "docs"


def count(number: int) -> str:
    return str(number)


def size(number: int) -> str:
    return f"{number >> 20} MiB" if number >= 1 << 20 else f"{number >> 10} KiB"


def seconds(number: float) -> str:
    return f"{number:g} s"


LIMITS = {
    "protocol.md": {
        "clients that have chosen an export": count(server.MAX_CLIENTS),
        "clients in the handshake": count(server.MAX_HANDSHAKES),
        "time for a handshake": seconds(connection.HANDSHAKE_TIMEOUT),
        "options in a handshake": count(handshake.MAX_OPTIONS),
        "queries of metadata contexts, or kinds of information, in an option": count(
            options.MAX_QUERIES
        ),
        "data of an option": size(handshake.MAX_OPTION_DATA),
        "clients that wait to be accepted": count(listeners.BACKLOG),
        "length of a read or a write": size(constants.MAX_PAYLOAD),
        "extents of a context in a reply to block status": count(replies.MAX_DESCRIPTORS),
        "requests of a connection that wait for something": count(transmission.MAX_SLOW_REQUESTS),
        "payload of such requests": size(transmission.MAX_SLOW_BYTES),
        "payload of such requests, all clients together": size(payloads.MAX_SHARED),
        "time for changes of a client that is gone": seconds(connection.CHANGE_GRACE),
        "time for requests in flight when the server stops": seconds(server.STOP_TIMEOUT),
        "silence of a TCP client whose host is gone": seconds(
            listeners.KEEPALIVE_IDLE + listeners.KEEPALIVE_INTERVAL * listeners.KEEPALIVE_PROBES
        ),
    },
    "control.md": {
        "clients of the control socket": count(control.MAX_CLIENTS),
        "a command, in bytes": size(qmp.COMMAND_LIMIT),
        "replies and events that a client has not read": size(control.BACKLOG_LIMIT),
        "extents in a reply of `x-nbdstream-map`": count(disks.MAP_MAXIMUM),
        "clients of the metrics": count(web.MAX_CLIENTS),
        "time for a scrape": seconds(web.REQUEST_SECONDS),
        "a request for metrics, in bytes": size(web.REQUEST_LIMIT),
        "time between two scrapes": seconds(web.PAUSE),
    },
}


@pytest.mark.parametrize("page", LIMITS)
def test_the_table_of_limits_is_true(page: str) -> None:
    text = (DOCS / page).read_text()
    table = text.partition("| limit | value | beyond it |\n| --- | --- | --- |\n")[2]
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \| .+ \|$", table.partition("\n\n")[0], re.M))
    assert rows == LIMITS[page]


def test_what_the_tables_say_beyond_their_values() -> None:
    assert "more than 1 MiB waits" in (DOCS / "protocol.md").read_text()
    assert payloads.RESERVE == 1 << 20
    assert options.MAX_INFOS == options.MAX_QUERIES
    text = (DOCS / "protocol.md").read_text()
    assert f"older than {seconds(server.HANDSHAKE_GRACE)}" in text
    assert f"beyond {size(handshake.MAX_SKIPPED_DATA)} the connection" in text
    assert f"Its changes get {connection.CHANGE_GRACE:g} seconds" in text
    assert f"if that is {seconds(control.SILENCE)} or more" in (DOCS / "control.md").read_text()
    assert f"older than {seconds(web.GRACE)}" in (DOCS / "control.md").read_text()
