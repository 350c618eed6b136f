# SPDX-License-Identifier: Apache-2.0
"""A leaf's map as a picture: local, zero and remote at a glance."""

import itertools
from collections.abc import Iterable, Sequence
from html import escape

from nbdstream.cli.cells import KINDS, LOCAL, REMOTE, ZERO, weigh
from nbdstream.leaf.base import LeafExtent, State
from nbdstream.units import format_size

_COLUMNS = 128
_ROWS = 64
_CELL = 7  # pixels
_MARGIN = 16
_HEADER = 64
# By kind of `cells`. Told apart by lightness too, for those who see no hue.
_COLOURS = ((0x1B, 0x7F, 0x4D), (0xB9, 0xD8, 0xC6), (0xE8, 0xA8, 0x38))
_SHADES = 16  # steps of a mix of colours, so that few colours are needed

Weights = list[list[float]]  # for each cell, the bytes of each kind


def svg_map(extents: Iterable[LeafExtent], size: int, title: str) -> str:
    """An SVG document: the disk as rows of cells, from the top left, each cell the mix
    of the colours of what lies in it.

    ``extents`` tile the disk of ``size`` bytes.
    """
    weights = weigh_extents(extents, size, _COLUMNS * _ROWS)
    columns = min(_COLUMNS, len(weights))
    width = max(columns * _CELL, 560) + 2 * _MARGIN
    height = -(-len(weights) // columns) * _CELL + _HEADER + 2 * _MARGIN
    parts = [
        *opening(width, height),
        f'<text x="{_MARGIN}" y="{_MARGIN + 8}" font-weight="bold">{escape(title)}</text>',
        *legend(weights, size, _MARGIN, _MARGIN + 26),
        *cells(weights, columns, _MARGIN, _MARGIN + _HEADER),
    ]
    return "\n".join([*parts, "</svg>\n"])


def opening(width: int, height: int) -> list[str]:
    """The beginning of a document: white, that many pixels."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]


def cells(weights: Weights, columns: int, x: int, y: int) -> list[str]:
    """The cells that `weigh_extents` made, in rows of ``columns``, from (x, y)."""
    return [
        f'<g transform="translate({x},{y}) scale({_CELL})">',
        *_runs([_mix(cell) for cell in weights], columns),
        _grid(columns, -(-len(weights) // columns)),
        "</g>",
    ]


def _runs(colours: list[str], columns: int) -> list[str]:
    """A path for each colour, with a rectangle for each run of its cells in a row.

    A cell is one unit wide and high. A rectangle per cell would make the document ten times
    as large.
    """
    paths: dict[str, list[str]] = {}
    for top in range(0, len(colours), columns):
        left = 0
        for colour, run in itertools.groupby(colours[top : top + columns]):
            length = len(list(run))
            rectangle = f"M{left} {top // columns}h{length}v1h-{length}z"
            paths.setdefault(colour, []).append(rectangle)
            left += length
    return [f'<path fill="{colour}" d="{"".join(runs)}"/>' for colour, runs in paths.items()]


def _grid(columns: int, rows: int) -> str:
    """White lines between the cells."""
    lines = [f"M{x} 0v{rows}" for x in range(1, columns + 1)]
    lines += [f"M0 {y}h{columns}" for y in range(1, rows + 1)]
    return f'<path stroke="white" stroke-width="{1 / _CELL:.3f}" d="{"".join(lines)}"/>'


def weigh_extents(extents: Iterable[LeafExtent], size: int, most: int) -> Weights:
    """For each of at most so many cells (a tiny disk has fewer), its bytes of each kind."""
    kinds = {State.ZERO: ZERO, State.UNALLOCATED: REMOTE}
    pieces = ((each.offset, each.length, kinds.get(each.state, LOCAL)) for each in extents)
    return weigh(pieces, size, min(most, max(1, -(-size // 512))))


def _mix(weights: Sequence[float]) -> str:
    total = sum(weights) or 1.0
    shares = [round(_SHADES * weight / total) / _SHADES for weight in weights]
    whole = sum(shares) or 1.0
    return _hex(
        round(
            sum(share * colour[i] for share, colour in zip(shares, _COLOURS, strict=True)) / whole
        )
        for i in range(3)
    )


def _hex(colour: Iterable[int]) -> str:
    return "#" + "".join(f"{value:02x}" for value in colour)


def legend(weights: Weights, size: int, x: int, y: int) -> list[str]:
    """What the colours mean, and how much there is of each, from (x, y)."""
    parts = []
    for kind, (name, colour) in enumerate(zip(KINDS, _COLOURS, strict=True)):
        amount = sum(cell[kind] for cell in weights)
        left = x + kind * 180
        share = 100 * amount / size if size else 0
        parts.append(f'<rect x="{left}" y="{y}" width="12" height="12" fill="{_hex(colour)}"/>')
        parts.append(
            f'<text x="{left + 18}" y="{y + 11}">'
            f"{name} {format_size(amount)} ({share:.1f} %)</text>"
        )
    return parts
