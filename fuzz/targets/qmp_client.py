# SPDX-License-Identifier: Apache-2.0
"""What a QMP server may send to us: `LineReader` and `parse_server_message`, cut anywhere.

Accepts, or raises QMPProtocolError. What is accepted can be sent again.
"""

from collections.abc import Iterator

from fuzz.source import Source
from fuzz.target import Target
from nbdstream.qmp.protocol import LineReader, QMPProtocolError, parse_server_message

LIMIT = 4096


def _read(pieces: Iterator[bytes]) -> tuple[list[str], str]:
    reader = LineReader(LIMIT)
    found = []
    for piece in pieces:
        reader.feed(piece)
        try:
            for message in reader.messages():
                found.append(repr(parse_server_message(message)))
        except QMPProtocolError as error:
            return found, str(error)
    return found, ""


def run(data: bytes) -> object:
    source = Source(data)
    cuts = Source(source.take(4))
    stream = source.rest()
    found, error = _read(iter([stream]))
    cut_found, cut_error = _read(cuts.pieces(stream))
    assert _plain(found) == _plain(cut_found) and error == cut_error
    return _plain(found), error


def _plain(found: list[str]) -> list[str]:
    """Without the addresses of exceptions."""
    return [text for text in found if " at 0x" not in text]


def seeds() -> Iterator[bytes]:
    cut = bytes(4)
    yield cut + b'{"QMP": {"version": {"qemu": {"major": 8}}, "capabilities": ["oob"]}}\r\n'
    yield cut + b'{"return": {}, "id": 1}\r\n{"return": [1, "a", null, true, 1.5e3]}\n'
    yield cut + b'{"error": {"class": "DeviceNotFound", "desc": "none"}, "id": 2}\n'
    yield (
        cut + b'{"timestamp": {"seconds": 1700000000, "microseconds": 5}, "event": "STOP", '
        b'"data": {"a": -1}}\n'
    )
    yield b"\1\2\3\4" + b'{"event": "X"}\n{"QMP": 5}\n{}\n'


TARGET = Target("qmp_client", run, (), seeds, longest=1024)
