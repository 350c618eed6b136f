# SPDX-License-Identifier: Apache-2.0
"""Sizes, rates and durations from the command line: any text.

Accepts, or raises UsageError. What is accepted is within its bounds, and can be shown.
"""

from collections.abc import Callable, Iterator

from fuzz.target import Target
from nbdstream.errors import UsageError
from nbdstream.units import (
    MAX_DURATION,
    MAX_SIZE,
    format_duration,
    format_rate,
    format_size,
    parse_duration,
    parse_rate,
    parse_size,
)


def run(data: bytes) -> object:
    text = data.decode("utf-8", "surrogateescape")
    size = _parsed(parse_size, text)
    rate = _parsed(parse_rate, text)
    duration = _parsed(parse_duration, text)
    if size is not None:
        assert isinstance(size, int) and 0 <= size <= MAX_SIZE
        format_size(size)
        assert rate == size
        assert parse_size(str(size)) == size
    if rate is not None:
        format_rate(rate)
    if duration is not None:
        assert 0 <= duration <= MAX_DURATION
        parse_duration(format_duration(duration))
    return size, rate, duration


def _parsed(parse: Callable[[str], float], text: str) -> float | None:
    try:
        return parse(text)
    except UsageError as error:
        assert str(error)
        return None


def seeds() -> Iterator[bytes]:
    for text in (
        "0",
        "4096",
        "64k",
        "1.5G",
        "10 MiB",
        "10MiB/s",
        "7E",
        "90",
        "2.5",
        "1h30m",
        "250ms",
    ):
        yield text.encode()
    # int() refuses more than 4300 digits.
    yield b"9" * 5000
    yield b"1." + b"9" * 5000 + b"h"


TARGET = Target("units", run, (), seeds, longest=8192)
