# SPDX-License-Identifier: Apache-2.0
"""Boot profiles as values and files: round trips, damage, and several made one."""

import os
import socket
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdstream.errors import NbdstreamError, ProfileError
from nbdstream.streamer.profile import (
    FILE_MOST,
    RANGES_MOST,
    Profile,
    Range,
    combine,
    format_profile,
    parse_profile,
    read_profile,
    write_profile,
)

UNIT = 65536
SIZE = 1000 * UNIT + 512


def profile(*ranges: tuple[int, int], identity: str = "s1:ab", size: int = SIZE) -> Profile:
    """A profile with these ranges, in units."""
    whole = tuple(Range(start * UNIT, length * UNIT) for start, length in ranges)
    return Profile(size, identity, UNIT, 12.4, True, whole)


def in_units(found: Profile) -> list[tuple[int, int]]:
    return [(offset // UNIT, length // UNIT) for offset, length in found.ranges]


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    starts = draw(st.lists(st.integers(0, 400), unique=True, max_size=40))
    borders = [*sorted(starts), 401]
    lengths = {start: draw(st.integers(1, end - start)) for start, end in pairwise(borders)}
    return profile(*((start, lengths[start]) for start in starts))


@given(profiles())
def test_what_is_written_is_read_again(original: Profile) -> None:
    assert parse_profile(format_profile(original), "p") == original


def test_files_hold_all_or_nothing_and_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "leaf.qcow2.profile"
    write_profile(str(path), profile((3, 1)))
    write_profile(str(path), profile((1, 2), (9, 1)))
    assert in_units(read_profile(str(path))) == [(1, 2), (9, 1)]
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "directory").mkdir()
    with pytest.raises(IsADirectoryError):
        write_profile(str(tmp_path / "directory"), profile())
    assert sorted(tmp_path.iterdir()) == [tmp_path / "directory", path]


GOOD = format_profile(profile((1, 2), (9, 1)))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (("profile 1", "profile 2"), "version '2'"),
        (("nbdstream boot", "another kind of"), "not a boot profile"),
        (("unit 65536", "unit 65537"), "power of two"),
        (("unit 65536", "unit 1"), "power of two"),
        (("unit 65536", "unit 99999999999"), "not a number"),
        (("unit 65536\n", ""), "lacks unit"),
        (("unit 65536", "unit 65536\nunit 512"), "line 5: 'unit'"),
        (("unit 65536", "unit 65536\ncolour green"), "'colour'"),
        (("seconds 12.4", "seconds -3"), "seconds"),
        (("seconds 12.4", "seconds nan"), "seconds"),
        (("complete yes", "complete perhaps"), "yes or no"),
        (("identity s1:ab", "identity \x07"), "identity"),
        ((f"size {SIZE}", "size 0"), "line 8"),
        ((f"size {SIZE}", "size 9" + "9" * 4000), "not a number"),
        (("65536 131072", "65536 0"), "line 8.*not a range"),
        (("65536 131072", "65536"), "line 8"),
        (("65536 131072", "-65536 131072"), "line 8"),
        (("65536 131072", "65536 131072 7"), "line 8"),
        (("65536 131072", "65536\t131072"), "line 8"),
        (("65536 131072", "65536 \u0661"), "line 8"),
        (("65536 131072", f"65536 {SIZE}"), "not a range of a backing"),
        (("65536 131072", "65536 589824"), "comes twice"),
        (("\n589824 65536\n", "\n589824 65536"), "cut short"),
        (("\n589824 65536\n", "\n\n589824 65536\n"), "line 9"),
        (("\n", "\r\n"), "not a boot profile|version"),
    ],
)
def test_damage_is_refused_in_one_line(damage: tuple[str, str], complaint: str) -> None:
    damaged = GOOD.replace(*damage)
    assert damaged != GOOD
    with pytest.raises(ProfileError, match=complaint) as caught:
        parse_profile(damaged, "boot.profile")
    assert str(caught.value).startswith("boot.profile: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@settings(max_examples=300)
@given(st.data())
def test_no_damage_is_worse_than_an_error(data: st.DataObject) -> None:
    text = list(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place : place + data.draw(st.integers(0, 3))] = data.draw(st.text(max_size=3))
    try:
        found = parse_profile("".join(text), "p")
    except ProfileError:
        return
    assert all(0 <= r.offset < r.end <= found.backing_size for r in found.ranges)


def test_files_that_are_no_profiles_are_refused(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ProfileError, match=r"not a boot profile$"):
        read_profile(str(image))
    (tmp_path / "disk.raw.profile").write_text(GOOD)
    with pytest.raises(ProfileError, match=r"did you mean .*disk\.raw\.profile\?"):
        read_profile(str(image))
    huge = tmp_path / "huge"
    with huge.open("w") as file:
        file.write(GOOD)
        file.truncate(FILE_MOST + 1)
    with pytest.raises(ProfileError, match="too large"):
        read_profile(str(huge))
    many = tmp_path / "many"
    lines = "".join(f"{number} 1\n" for number in range(RANGES_MOST + 1))
    many.write_text(GOOD[: GOOD.index("\n\n") + 2] + lines)
    with pytest.raises(ProfileError, match="more than 131072 ranges"):
        read_profile(str(many))
    (tmp_path / "bytes").write_bytes(GOOD.encode() + b"\xff\n")
    with pytest.raises(ProfileError, match="not text"):
        read_profile(str(tmp_path / "bytes"))
    (tmp_path / "empty").touch()
    with pytest.raises(ProfileError, match="not a boot profile"):
        read_profile(str(tmp_path / "empty"))


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises((ProfileError, OSError)):
            read_profile(str(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(OSError, match="No such device"):
            read_profile(str(tmp_path / "s"))


# -- together --------------------------------------------------------------------------


def test_one_combined_with_itself_is_itself() -> None:
    one = profile((5, 2), (1, 1), (9, 3), (2, 1))
    assert combine([one]) == one
    assert combine([one, one]) == one


def test_what_is_early_on_average_comes_first() -> None:
    first = profile((1, 1), (3, 1), (5, 1))
    second = profile((3, 1), (5, 1), (1, 1))
    # Bytes before it, in units: 3: 1 + 0; 5: 2 + 1; 1: 0 + 2.
    assert in_units(combine([first, second])) == [(3, 1), (1, 1), (5, 1)]


def test_what_only_some_have_comes_later() -> None:
    first = profile((1, 1), (7, 1), (3, 1))
    second = profile((1, 1), (3, 1))
    assert in_units(combine([first, second])) == [(1, 1), (3, 1), (7, 1)]


def test_ranges_are_cut_where_the_profiles_differ() -> None:
    first = profile((10, 4))
    second = profile((12, 4), (0, 1))
    assert in_units(combine([first, second])) == [(12, 2), (10, 2), (14, 2), (0, 1)]


@given(st.lists(profiles(), min_size=1, max_size=4))
def test_a_combination_names_what_any_of_them_names_once(several: list[Profile]) -> None:
    combined = combine(several)
    parse_profile(format_profile(combined), "p")  # disjoint, in bounds

    def units(found: Profile) -> set[int]:
        return {unit for start, length in in_units(found) for unit in range(start, start + length)}

    assert units(combined) == set().union(*map(units, several))
    assert combined.bytes == len(units(combined)) * UNIT
    assert units(combine(several)) == units(combine(several[::-1]))


def test_profiles_of_different_backings_are_not_combined() -> None:
    with pytest.raises(ProfileError, match="different backings"):
        combine([profile((1, 1)), profile((1, 1), identity="s1:cd")])
    with pytest.raises(NbdstreamError, match="different backings"):
        combine([profile((1, 1)), profile((1, 1), size=SIZE + 1)])
