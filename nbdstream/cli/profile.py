# SPDX-License-Identifier: Apache-2.0
"""profile: boot profiles, listed, shown, combined and exported."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from nbdstream.cli.output import emit, say
from nbdstream.cli.params import LEAF
from nbdstream.cli.profile_picture import svg_profile
from nbdstream.errors import ProfileError
from nbdstream.streamer import profile as profiles
from nbdstream.streamer.profile import (
    Profile,
    format_profile,
    path_beside,
    read_profile,
    write_profile,
)
from nbdstream.streamer.profile_store import ProfileStore, default_directory
from nbdstream.units import format_count, format_duration, format_size

_PROFILE = click.Path(dir_okay=False)
_output = click.option(
    "-o", "--output", type=_PROFILE, help="Write to this file.  [default: stdout]"
)
# How much of the order `show` lists by itself.
HEAD = 10


@click.group()
def profile() -> None:
    """List, show, combine and export boot profiles.

    A boot profile lists the ranges that a guest reads while it boots, in order.
    `nbdstream serve LEAF` records it during the first boot, as LEAF.profile and in the
    user's collection. The next boot of the same image fetches these ranges first.
    """


@profile.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """List the profiles in the user's collection, the last used first."""
    stored = _stored(ProfileStore(default_directory()))
    if as_json:
        emit(json.dumps(stored, indent=4))
        return
    for facts in stored:
        used = datetime.fromtimestamp(facts["used"]).isoformat(" ", "minutes")
        part = "" if facts["complete"] else ", not complete"
        say(facts["path"])
        say(f"  image: {format_size(facts['backing-size'])}, {facts['backing-identity']}")
        say(f"  contains: {format_size(facts['bytes'])}{part}; last used {used}")


def _stored(store: ProfileStore) -> list[dict[str, Any]]:
    """What there is to say of each usable profile in a store. Raises OSError."""
    stored: list[dict[str, Any]] = []
    for entry in store.entries():
        try:
            facts = _facts(read_profile(str(entry.path)))
        except (ProfileError, OSError) as error:
            say(f"nbdstream: warning: {error}", err=True)
            continue
        del facts["ranges"]
        stored.append({"path": str(entry.path), "used": entry.used, **facts})
    return stored


@profile.command()
@click.argument("path", metavar="PROFILE", type=_PROFILE)
@click.option("--all", "show_all", is_flag=True, help="List every range.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--svg", type=_PROFILE, help="Write an SVG picture to this file ('-': stdout).")
def show(path: str, show_all: bool, as_json: bool, svg: str | None) -> None:
    """Show the ranges of a profile."""
    found = read_profile(path)
    if svg is not None:
        _write(svg, svg_profile(found, os.path.basename(path)))
    elif as_json:
        emit(json.dumps(_facts(found), indent=4))
    else:
        _print(found, None if show_all else HEAD)


def _facts(found: Profile) -> dict[str, Any]:
    return {
        "backing-size": found.backing_size,
        "backing-identity": found.backing_identity,
        "unit": found.unit,
        "seconds": found.seconds,
        "complete": found.complete,
        "bytes": found.bytes,
        "ranges": [{"offset": offset, "length": length} for offset, length in found.ranges],
    }


def _print(found: Profile, limit: int | None) -> None:
    share = 100 * found.bytes / (found.backing_size or 1)
    cut = "" if found.complete else ", cut short when the server was stopped"
    say(f"backing size: {format_size(found.backing_size)} ({found.backing_size} bytes)")
    say(f"backing identity: {found.backing_identity or 'unknown'}")
    say(f"unit: {format_size(found.unit)}")
    say(f"recorded over: {format_duration(found.seconds)}{cut}")
    ranges = format_count(len(found.ranges), "range")
    say(f"contains: {format_size(found.bytes)} ({share:.1f} %) in {ranges}")
    say()
    say(f"{'after':>12} {'offset':>16} {'length':>12}")
    before = 0
    for offset, length in found.ranges[:limit]:
        say(f"{format_size(before):>12} {offset:>16} {length:>12}")
        before += length
    if limit is not None and len(found.ranges) > limit:
        say(f"… and {len(found.ranges) - limit} more (--all)")


@profile.command()
@click.argument("paths", metavar="PROFILE...", nargs=-1, required=True, type=_PROFILE)
@_output
def combine(paths: tuple[str, ...], output: str | None) -> None:
    """Merge the profiles of several boots of the same backing.

    The ranges are ordered by when they were read on average. A range that a profile does
    not have counts as read last there.
    """
    _put(profiles.combine([read_profile(path) for path in paths]), output)


@profile.command()
@click.argument("leaf", type=LEAF)
@_output
def export(leaf: str, output: str | None) -> None:
    """Copy the profile of a leaf, for other leaves of the same backing."""
    beside = path_beside(leaf)
    try:
        found = read_profile(beside)
    except FileNotFoundError:
        raise ProfileError(
            f"{leaf} has no profile: boot a guest from it with 'nbdstream serve' first"
        ) from None
    _put(found, output)


def _put(found: Profile, output: str | None) -> None:
    if output is None or output == "-":
        emit(format_profile(found), nl=False)
    else:
        write_profile(output, found)


def _write(path: str, text: str) -> None:
    if path == "-":
        emit(text, nl=False)
    else:
        Path(path).write_text(text)
