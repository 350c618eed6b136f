# SPDX-License-Identifier: Apache-2.0
"""create, info, map, check: commands on a leaf that is not being served."""

import itertools
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import trio

from nbdstream.cli.output import emit, say
from nbdstream.cli.params import FORMAT, FORMAT_HELP, LEAF, SIZE
from nbdstream.cli.picture import svg_map
from nbdstream.errors import LeafError, UsageError
from nbdstream.leaf import create_leaf, format_from_suffix, open_leaf
from nbdstream.leaf.base import Leaf, LeafExtent, State
from nbdstream.leaf.map import image_info, map_entry, shares, walk
from nbdstream.service import describe_backing
from nbdstream.units import format_count, format_size

_NAMES = {
    State.DATA: "local",
    State.COMPRESSED: "local, compressed",
    State.ZERO: "local, zero",
    State.UNALLOCATED: "remote",
}


@contextmanager
def _opened(
    path: str, image_format: str | None, *, read_only: bool = True, repair: bool = False
) -> Iterator[Leaf]:
    leaf = open_leaf(path, read_only=read_only, format=image_format, repair=repair)
    try:
        yield leaf
    finally:
        leaf.close()


@click.command()
@click.argument("leaf", type=LEAF)
@click.option("-b", "--backing", metavar="URI", help="The remote image that the leaf is based on.")
@click.option(
    "-f",
    "--format",
    "image_format",
    type=FORMAT,
    help="Image format.  [default: from LEAF's suffix]",
)
@click.option("--size", type=SIZE, help="Virtual size.  [default: the backing's]")
@click.option("--cluster-size", type=SIZE, help="Unit of allocation; for raw leaves, of fetching.")
@click.option("--no-extended-l2", is_flag=True, help="qcow2: create an image without subclusters.")
def create(
    leaf: str,
    backing: str | None,
    image_format: str | None,
    size: int | None,
    cluster_size: int | None,
    no_extended_l2: bool,
) -> None:
    """Create a leaf image.

    With -b, the backing is contacted, and its size and identity are recorded in the
    leaf. From then on the leaf accepts no other backing. Without -b, the leaf is a plain
    local disk of --size bytes. An existing file is never overwritten.
    """
    if backing is None and size is None:
        raise UsageError("give --size, or the backing to take it from (-b URI)")
    leaf_format = image_format or format_from_suffix(leaf)
    reference = None
    if backing is not None:
        if os.path.lexists(leaf):
            raise LeafError(f"{leaf} exists already: choose another name, or serve it as it is")
        reference = trio.run(describe_backing, backing, leaf_format)
        size = reference.size if size is None else size
    create_leaf(
        leaf,
        format=leaf_format,
        size=size or 0,
        cluster_size=cluster_size,
        backing=reference,
        extended_l2=not no_extended_l2,
    )


@click.command()
@click.argument("leaf", type=LEAF)
@click.option("-f", "--format", "image_format", type=FORMAT, help=FORMAT_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with qemu-img's names.")
def info(leaf: str, image_format: str | None, as_json: bool) -> None:
    """Show an image's properties and how much of it is local."""
    with _opened(leaf, image_format) as image:
        facts = _facts(image)
    if as_json:
        emit(json.dumps(facts, indent=4))
        return
    local = facts["nbdstream"]
    assert isinstance(local, dict)
    lines = [
        ("image", leaf),
        ("file format", facts["format"]),
        ("virtual size", _both(facts["virtual-size"])),
        ("disk size", format_size(_integer(facts["actual-size"]))),
        ("cluster size", facts["cluster-size"]),
        ("block size", local["block-size"]),
    ]
    if "backing-filename" in facts:
        lines.append(("backing file", facts["backing-filename"]))
        lines.append(("backing file format", facts["backing-filename-format"]))
        lines.append(("backing size", _both(local["backing-size"])))
        lines.append(("backing identity", local["backing-identity"] or "not recorded yet"))
    else:
        lines.append(("backing file", "none: the whole image is local"))
    for name in ("local", "zero", "remote"):
        share = 100 * _integer(local[name]) / (image.size or 1)
        lines.append((name, f"{format_size(_integer(local[name]))} ({share:.1f} %)"))
    for name, value in image.describe().items():
        if name not in facts:
            lines.append((name.replace("-", " "), value))
    for name, value in lines:
        say(f"{name}: {value}")


def _facts(image: Leaf) -> dict[str, object]:
    """What `info` knows: qemu-img's names where it has one, ours under "nbdstream"."""
    count = shares(image)
    facts = image_info(image)
    ours: dict[str, object] = {
        "block-size": image.block_size,
        "local": count.data,
        "zero": count.zero,
        "remote": count.remote,
    }
    if image.backing is not None:
        ours["backing-size"] = image.backing.size
        ours["backing-identity"] = image.backing.identity
    facts["nbdstream"] = ours
    return facts


def _both(size: object) -> str:
    return f"{format_size(_integer(size))} ({size} bytes)"


def _integer(value: object) -> int:
    assert isinstance(value, int)
    return value


@click.command(name="map")
@click.argument("leaf", type=LEAF)
@click.option("-f", "--format", "image_format", type=FORMAT, help=FORMAT_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with qemu-img's names.")
@click.option(
    "--svg",
    type=click.Path(dir_okay=False),
    help="Write an SVG picture to this file ('-': stdout).",
)
def map_(leaf: str, image_format: str | None, as_json: bool, svg: str | None) -> None:
    """List the ranges of an image that are local, zero, or still remote."""
    with _opened(leaf, image_format) as image:
        if svg is not None:
            picture = svg_map(walk(image), image.size, os.path.basename(leaf))
            if svg == "-":
                emit(picture, nl=False)
            else:
                Path(svg).write_text(picture)
        elif as_json:
            _print_json(walk(image))
        else:
            _print_lines(walk(image))


def _print_lines(extents: Iterator[LeafExtent]) -> None:
    """One line for each stretch that is alike, wherever in the file it lies."""
    for name, group in itertools.groupby(extents, lambda extent: _NAMES[extent.state]):
        parts = list(group)
        length = sum(part.length for part in parts)
        say(f"{parts[0].offset:>16} {length:>16}  {name}")


def _print_json(extents: Iterator[LeafExtent]) -> None:
    """As ``qemu-img map --output=json`` prints it, one extent a line."""
    separator = "["
    for extent in extents:
        emit(f"{separator}{json.dumps(map_entry(extent))}", nl=False)
        separator = ",\n"
    emit("]")


@click.command()
@click.argument("leaf", type=LEAF)
@click.option("-f", "--format", "image_format", type=FORMAT, help=FORMAT_HELP)
@click.option("--repair", is_flag=True, help="Repair what can be repaired.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(leaf: str, image_format: str | None, repair: bool, as_json: bool) -> None:
    """Check an image's metadata.

    --repair of a qcow2 or QED image clears table entries that lead nowhere. The guest range
    under such an entry loses its local data: the backing's content shows there, or zeroes.
    The messages name these ranges of a qcow2 image; without --repair, they name what would be lost.

    The exit status is qemu-img's: 0 clean or repaired, 1 the check itself failed, 2 errors
    remain, 3 only leaks remain (unused space; harmless).
    """
    with _opened(leaf, image_format, read_only=not repair, repair=repair) as image:
        result = image.check(repair=repair)
        left = image.check(repair=False) if result.repaired else result
    if as_json:
        facts = {
            "filename": leaf,
            "format": image.format,
            "check-errors": 0,
            "corruptions": result.errors,
            "leaks": result.leaks,
            "repaired": result.repaired,
            "messages": list(result.messages),
        }
        emit(json.dumps(facts, indent=4))
    else:
        for message in result.messages:
            say(message)
        if not (result.errors or result.leaks):
            say("No errors were found on the image.")
        else:
            say(f"{format_count(result.errors, 'error')}, {format_count(result.leaks, 'leak')}.")
        if result.repaired:
            say(f"{result.repaired} repaired.")
    if left.errors:
        sys.exit(2)
    if left.leaks:
        sys.exit(3)
