# SPDX-License-Identifier: Apache-2.0
"""Sizes, rates and durations as people write and read them: the one place that knows how.

Sizes follow QEMU and nbdkit: the suffixes ``k M G T P E`` (either case, ``K``, ``KB`` and
``KiB`` alike) are powers of 1024, without a suffix the number is bytes. Rates are sizes
per second, written with or without ``/s``. Durations are seconds, or numbers with the
units ``ms s m h d``, which may follow one another: ``1h30m``.

Every ``parse_…`` raises UsageError, whose message names the text and shows a right one.
"""

import re

from nbdstream.errors import UsageError

# The largest disk that NBD and the image formats here can address: offsets are signed
# 64-bit in the system calls below us.
MAX_SIZE = 2**63 - 1

# A century, in seconds: more is a typing error, and float() has an end.
MAX_DURATION = 100 * 365 * 86400

# More characters than this are no number of anything; int() has a limit of its own.
_LONGEST = 1000

_NUMBER = r"\d+(?:\.\d+)?"
_SIZE_SUFFIXES = "kMGTPE"
_SIZE = re.compile(rf"({_NUMBER}) ?(?:([kmgtpe])(?:i?b)?|b)?", re.IGNORECASE | re.ASCII)
_MILLISECONDS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION_PART = re.compile(rf"({_NUMBER})(ms|s|m|h|d)", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes from ``4096``, ``64k``, ``1.5G``, ``10 MiB``. Raises UsageError if the text is no
    size, or no whole number of bytes, or more than a disk can have."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or len(text) > _LONGEST:
        raise UsageError(f"{text!r} is not a size: give a number of bytes, or such as 64k, 1.5G")
    number, suffix = match.groups()
    power = _SIZE_SUFFIXES.lower().index(suffix.lower()) + 1 if suffix else 0
    from fractions import Fraction  # which loads `decimal`: start-up need not wait for it

    size = Fraction(number) * 1024**power
    if size.denominator != 1:
        raise UsageError(f"{text!r} is not a whole number of bytes")
    if size > MAX_SIZE:
        raise UsageError(f"{text!r} is more than the largest possible size, {MAX_SIZE} bytes")
    return int(size)


def parse_rate(text: str) -> int:
    """Bytes per second from ``10M``, ``10MiB/s``; 0 stands for unlimited, as in QEMU. Raises
    UsageError if the text is no rate."""
    try:
        return parse_size(text.strip().removesuffix("/s"))
    except UsageError:
        raise UsageError(
            f"{text!r} is not a rate: give bytes per second, such as 10M (0: unlimited)"
        ) from None


def parse_duration(text: str) -> float:
    """Seconds from ``90``, ``2.5``, ``90s``, ``10m``, ``1h30m``, ``250ms``. Raises UsageError if
    the text is no duration, or one of more than a hundred years."""
    bare = text.strip()[:_LONGEST]
    if re.fullmatch(_NUMBER, bare, re.ASCII):
        bare += "s"
    parts = _DURATION_PART.findall(bare)
    whole = "".join(number + unit for number, unit in parts)
    if not parts or whole != bare or len(text) > _LONGEST:
        raise UsageError(f"{text!r} is not a duration: give seconds, or such as 90s, 10m, 1h30m")
    from fractions import Fraction  # as in `parse_size`

    seconds = sum(Fraction(number) * _MILLISECONDS[unit] for number, unit in parts) / 1000
    if seconds > MAX_DURATION:
        raise UsageError(f"{text!r} is longer than any wait makes sense")
    return float(seconds)


def format_size(size: float) -> str:
    """For people: ``512 B``, ``4.0 KiB``, ``1.5 GiB``; one digit after the point."""
    if size < 0:
        return "-" + format_size(-size)
    if size < 1024:
        return f"{size:.0f} B"
    for suffix in _SIZE_SUFFIXES:
        size /= 1024
        # 1023.95 would print as 1024.0: it belongs to the next unit.
        if size < 1023.95 or suffix == _SIZE_SUFFIXES[-1]:
            break
    return f"{size:.1f} {suffix.upper()}iB"


def format_rate(bytes_per_second: float) -> str:
    """For people: ``1.5 MiB/s``."""
    return format_size(bytes_per_second) + "/s"


def format_duration(seconds: float) -> str:
    """For people, two units at most: ``0.25s``, ``42s``, ``3m20s``, ``2h05m``, ``4d07h``."""
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if 0.0001 <= seconds < 1:
        return f"{seconds:.2g}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def format_count(number: int, noun: str, plural: str = "") -> str:
    """A number of things: ``1 leak``, ``2 leaks``. ``plural`` is ``noun`` + "s" by default."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"
