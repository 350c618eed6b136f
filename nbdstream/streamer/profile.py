# SPDX-License-Identifier: Apache-2.0
"""Boot profiles: in which order a guest first touches its disk, as a value and as a file.

A profile belongs to a backing, not to a leaf, and is only ever advice: a wrong one costs
a little bandwidth. The file is text, one range a line, in the order of first touch:

    nbdstream boot profile 1
    backing-size 2147483648
    backing-identity s1:5f0c…
    unit 65536
    seconds 12.4
    complete yes

    0 65536
    1048576 196608

``docs/profiles.md`` describes it. What is read is trusted in nothing: sizes are checked
before anything is made of them, and anything but the above is a `ProfileError`.
"""

import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from nbdstream.errors import ProfileError
from nbdstream.units import MAX_SIZE

MAGIC = "nbdstream boot profile"
VERSION = 1
SUFFIX = ".profile"
# Bounds of what is read: some ten times what a long boot of a large system records.
RANGES_MOST = 1 << 17
FILE_MOST = 8 << 20
UNIT_LEAST = 512
UNIT_MOST = 2 << 20

_IDENTITY = re.compile(r"[!-~]{0,200}")
_NUMBER = re.compile(r"[0-9]{1,19}", re.ASCII)
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,3})?", re.ASCII)
_HEADER = ("backing-size", "backing-identity", "unit", "seconds", "complete")
# What stands for an identity that is not known, so that each line has two words.
_UNKNOWN = "-"


class Range(NamedTuple):
    """A range of the backing, in bytes."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True)
class Profile:
    """The order of first touch.

    Attributes:
        backing_size: of the backing that it was recorded over, in bytes.
        backing_identity: its fingerprint (``nbdstream.backing.identity``), or "".
        unit: the granularity of the recording, in bytes.
        seconds: from the first touch to the last.
        complete: it was not cut short by the server's end.
        ranges: disjoint, within the backing, in order of first touch.
    """

    backing_size: int
    backing_identity: str
    unit: int
    seconds: float
    complete: bool
    ranges: tuple[Range, ...]

    @property
    def bytes(self) -> int:
        """How much it names."""
        return sum(length for _, length in self.ranges)


def path_beside(leaf: str) -> str:
    """Where the profile of a leaf is kept."""
    return leaf + SUFFIX


# -- as text ---------------------------------------------------------------------------


def format_profile(profile: Profile) -> str:
    """The profile's file."""
    lines = [
        f"{MAGIC} {VERSION}",
        f"backing-size {profile.backing_size}",
        f"backing-identity {profile.backing_identity or _UNKNOWN}",
        f"unit {profile.unit}",
        f"seconds {profile.seconds:.1f}",
        f"complete {'yes' if profile.complete else 'no'}",
        "",
        *(f"{offset} {length}" for offset, length in profile.ranges),
    ]
    return "\n".join(lines) + "\n"


def parse_profile(text: str, name: str) -> Profile:
    """A profile from its file's content; ``name`` is for messages. Raises ProfileError."""
    lines = text.split("\n")
    _check_version(lines[0], name)
    header, start = _parse_header(lines, name)
    size = _bounded(header["backing-size"], MAX_SIZE, f"{name}: backing-size")
    unit = _bounded(header["unit"], UNIT_MOST, f"{name}: unit")
    if unit < UNIT_LEAST or unit & (unit - 1):
        raise ProfileError(f"{name}: unit {unit} is not a power of two from {UNIT_LEAST}")
    identity = header["backing-identity"]
    if not _IDENTITY.fullmatch(identity):
        raise ProfileError(f"{name}: the backing's identity is not one")
    if not _SECONDS.fullmatch(header["seconds"]):
        raise ProfileError(f"{name}: {header['seconds'][:20]!r} is no number of seconds")
    if header["complete"] not in ("yes", "no"):
        raise ProfileError(f"{name}: complete is either yes or no")
    ranges = tuple(_parse_ranges(lines, start, size, name))
    _check_disjoint(ranges, name)
    return Profile(
        backing_size=size,
        backing_identity="" if identity == _UNKNOWN else identity,
        unit=unit,
        seconds=float(header["seconds"]),
        complete=header["complete"] == "yes",
        ranges=ranges,
    )


def _check_version(line: str, name: str) -> None:
    if line == f"{MAGIC} {VERSION}":
        return
    if line.startswith(MAGIC):
        version = line.removeprefix(MAGIC).strip()[:20]
        raise ProfileError(f"{name}: version {version!r} of boot profiles is not known here")
    beside = path_beside(name)
    hint = f" (did you mean {beside}?)" if Path(beside).exists() else ""
    raise ProfileError(f"{name}: not a boot profile{hint}")


def _parse_header(lines: list[str], name: str) -> tuple[dict[str, str], int]:
    """The header's fields, and the number of the first line behind it."""
    header: dict[str, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            break
        key, _, value = line.partition(" ")
        if key not in _HEADER or key in header:
            raise ProfileError(f"{name}: line {number}: {key[:30]!r} is not expected here")
        header[key] = value
    missing = [key for key in _HEADER if key not in header]
    if missing:
        raise ProfileError(f"{name}: the header lacks {', '.join(missing)}")
    return header, len(header) + 2


def _parse_ranges(lines: list[str], start: int, size: int, name: str) -> Iterator[Range]:
    if lines[-1] or len(lines) <= start:
        raise ProfileError(f"{name}: cut short: the last line has no end")
    if len(lines) - start > RANGES_MOST:
        raise ProfileError(f"{name}: more than {RANGES_MOST} ranges")
    for number, line in enumerate(lines[start:-1], start=start + 1):
        offset, _, length = line.partition(" ")
        place = f"{name}: line {number}"
        found = Range(_bounded(offset, size, place), _bounded(length, size, place))
        if not found.length or found.end > size:
            raise ProfileError(f"{place}: {line} is not a range of a backing of {size} bytes")
        yield found


def _bounded(text: str, most: int, place: str) -> int:
    """A number of bytes, at most ``most``."""
    if not _NUMBER.fullmatch(text) or int(text) > most:
        raise ProfileError(f"{place}: {text[:30]!r} is not a number from 0 to {most}")
    return int(text)


def _check_disjoint(ranges: Iterable[Range], name: str) -> None:
    reached = 0
    for found in sorted(ranges):
        if found.offset < reached:
            raise ProfileError(f"{name}: offset {found.offset} comes twice")
        reached = found.end


# -- as a file -------------------------------------------------------------------------


def read_profile(path: str) -> Profile:
    """Read a profile's file. Raises ProfileError, OSError."""
    # Without O_NONBLOCK, opening a named pipe would wait for its other end.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ProfileError(f"{path}: not a regular file")
        data = file.read(FILE_MOST + 1)
    return decode_profile(data, path)


def decode_profile(data: bytes, path: str) -> Profile:
    """A profile from the bytes of its file; ``path`` is for messages. Raises ProfileError."""
    # An image is no profile, however large it is: say what is wrong with it first.
    _check_version(data[:100].decode("ascii", "replace").partition("\n")[0], path)
    if len(data) > FILE_MOST:
        raise ProfileError(f"{path}: more than {FILE_MOST} bytes: too large for a boot profile")
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path}: byte {error.start} is not text") from error
    return parse_profile(text, path)


def write_profile(path: str, profile: Profile) -> None:
    """Write a profile's file, so that there is either all of it or none. Raises OSError."""
    target = Path(path)
    fd, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(fd, "w", encoding="ascii") as file:
            file.write(format_profile(profile))
            file.flush()
            os.fchmod(fd, 0o644)
            os.fsync(fd)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def require_of(profile: Profile, identity: str, size: int, name: str) -> None:
    """Check that a profile is of one image. Raises ProfileError."""
    if (profile.backing_identity, profile.backing_size) != (identity, size):
        raise ProfileError(f"{name}: of another image, or of another version of it")


# -- together --------------------------------------------------------------------------


def combine(profiles: list[Profile]) -> Profile:
    """One profile of several of the same backing: what they name on average first, first.

    A range counts with the number of bytes touched before it; where a profile does not
    have it, as touched last. Raises ProfileError if the backings differ.
    """
    first = profiles[0]
    for other in profiles[1:]:
        if other.backing_size != first.backing_size or (
            other.backing_identity != first.backing_identity
        ):
            raise ProfileError(
                "the profiles are of different backings: "
                f"{first.backing_size} bytes, {first.backing_identity or 'unknown'}, and "
                f"{other.backing_size} bytes, {other.backing_identity or 'unknown'}"
            )
    places = [_places(profile) for profile in profiles]
    borders = sorted({border for spans in places for span in spans for border in span[:2]})
    scores = [0.0] * len(borders)
    named = [False] * len(borders)
    for profile, spans in zip(profiles, places, strict=True):
        absent = float(profile.bytes)
        current = iter(spans)
        span = next(current, None)
        for index, border in enumerate(borders):
            while span is not None and span[1] <= border:
                span = next(current, None)
            if span is not None and span[0] <= border:
                scores[index] += span[2] + border - span[0]
                named[index] = True
            else:
                scores[index] += absent
    pieces = [
        (scores[index], Range(start, end - start))
        for index, (start, end) in enumerate(pairwise(borders))
        if named[index]
    ]
    return Profile(
        backing_size=first.backing_size,
        backing_identity=first.backing_identity,
        unit=min(profile.unit for profile in profiles),
        seconds=max(profile.seconds for profile in profiles),
        complete=any(profile.complete for profile in profiles),
        ranges=tuple(joined(piece for _, piece in sorted(pieces)))[:RANGES_MOST],
    )


def _places(profile: Profile) -> list[tuple[int, int, int]]:
    """(start, end, bytes touched before) of each range, by offset."""
    spans = []
    before = 0
    for found in profile.ranges:
        spans.append((found.offset, found.end, before))
        before += found.length
    return sorted(spans)


def joined(ranges: Iterable[Range]) -> Iterator[Range]:
    """The same ranges in the same order; each that goes on where the last one ended is
    made one with it."""
    pending: Range | None = None
    for found in ranges:
        if pending is not None and found.offset == pending.end:
            pending = Range(pending.offset, pending.length + found.length)
            continue
        if pending is not None:
            yield pending
        pending = found
    if pending is not None:
        yield pending
