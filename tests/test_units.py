# SPDX-License-Identifier: Apache-2.0
"""Sizes, rates and durations: what is accepted, what is refused, and round trips."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.errors import UsageError
from nbdstream.units import (
    MAX_SIZE,
    format_count,
    format_duration,
    format_rate,
    format_size,
    parse_duration,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512B", 512),
        ("64k", 65536),
        ("64K", 65536),
        ("64KiB", 65536),
        ("1.5G", 1536 << 20),
        ("10 MiB", 10 << 20),
        (" 8T\n", 8 << 40),
        ("1P", 1 << 50),
        ("7E", 7 << 60),
        ("0.5k", 512),
        (str(MAX_SIZE), MAX_SIZE),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "k", "-1", "+1", "1kk", "1e3", "0x10", "1_000", "1,5G", "٣", "nan", "inf", "1.G", ".5G"],
)
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0.5", "whole number of bytes"),
        ("0.0001k", "whole number of bytes"),
        ("8E", "largest possible size"),
        ("9" * 500, "largest possible size"),
    ],
)
def test_sizes_that_no_disk_can_have(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        parse_size(text)


@pytest.mark.parametrize(("text", "rate"), [("10M", 10 << 20), ("10MiB/s", 10 << 20), ("0", 0)])
def test_rates(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "/s", "10M/m", "fast", "-1"])
def test_what_is_no_rate_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="is not a rate"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("2.5", 2.5),
        ("90s", 90),
        ("10m", 600),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1d", 86400),
        ("250ms", 0.25),
        ("1m500ms", 60.5),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "1x", "1h 30m", "-5s", "1h30", "nan", "inf"])
def test_what_is_no_duration_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "h", "40000d"])
def test_an_endless_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="longer than any wait"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 << 20, "1.5 GiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (8 << 40, "8.0 TiB"),
        (5000 << 60, "5000.0 EiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


def test_rates_for_people() -> None:
    assert format_rate(1.5 * (1 << 20)) == "1.5 MiB/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.25, "0.25s"),
        (42, "42s"),
        (59.7, "1m00s"),
        (200, "3m20s"),
        (7500, "2h05m"),
        (86400 * 4 + 3600 * 7, "4d07h"),
        (-5, "-5s"),
    ],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_counts_for_people() -> None:
    assert [format_count(number, "leak") for number in (0, 1, 2)] == [
        "0 leaks",
        "1 leak",
        "2 leaks",
    ]
    assert format_count(3, "miss", "misses") == "3 misses"


@given(st.integers(min_value=0, max_value=MAX_SIZE))
def test_sizes_for_people_are_read_back_nearly(size: int) -> None:
    text = format_size(size)
    number, unit = text.split(" ")
    scale = 1 if unit == "B" else 1024 ** ("KMGTPE".index(unit[0]) + 1)
    assert abs(float(number) * scale - size) <= 0.05 * scale * 1.01
