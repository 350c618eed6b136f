# SPDX-License-Identifier: Apache-2.0
"""Boot profiles: `parse_profile` takes any text.

Accepts, or raises ProfileError. What is accepted comes back when it is written and read again,
also combined with itself.
"""

from collections.abc import Iterator
from dataclasses import replace

from fuzz.target import Target
from nbdstream.errors import ProfileError
from nbdstream.streamer.profile import Profile, Range, combine, format_profile, parse_profile


def run(data: bytes) -> object:
    # The file is read as ASCII; whatever else gets here must be refused as well.
    profile = parse_profile(data.decode("latin-1"), "fuzz")
    reached = 0
    for found in sorted(profile.ranges):
        assert reached <= found.offset and found.length > 0
        reached = found.end
    assert reached <= profile.backing_size
    again = parse_profile(format_profile(profile), "again")
    assert replace(again, seconds=profile.seconds) == profile
    assert abs(again.seconds - profile.seconds) <= 0.06
    both = combine([profile, profile])
    assert both.bytes == profile.bytes
    parse_profile(format_profile(both), "both")
    return profile


def seeds() -> Iterator[bytes]:
    ranges = (Range(0, 65536), Range(1 << 20, 196608), Range(65536, 512))
    profile = Profile(2 << 30, "s1:5f0c", 65536, 12.4, complete=True, ranges=ranges)
    yield format_profile(profile).encode()
    yield format_profile(replace(profile, backing_identity="", ranges=(), complete=False)).encode()
    yield format_profile(replace(profile, unit=512, backing_size=2**63 - 1)).encode()


TARGET = Target("profile", run, (ProfileError,), seeds)
