# SPDX-License-Identifier: Apache-2.0
"""A leaf's map as a picture: local, zero and remote at a glance."""

from collections.abc import Iterable
from html import escape

from nbdstream.cli.cells import KINDS, LOCAL, REMOTE, ZERO, weigh
from nbdstream.leaf.base import LeafExtent, State
from nbdstream.units import format_size

_COLUMNS = 128
_ROWS = 64
_CELL = 7  # pixels
_MARGIN = 16
_HEADER = 64
# Local data, local zeroes, remote: told apart by lightness too, for those who see no hue.
_COLOURS = {State.DATA: (0x1B, 0x7F, 0x4D), State.ZERO: (0xB9, 0xD8, 0xC6)}
_REMOTE = (0xE8, 0xA8, 0x38)


def svg_map(extents: Iterable[LeafExtent], size: int, title: str) -> str:
    """An SVG document: the disk as rows of cells, from the top left, each cell the mix
    of the colours of what lies in it.

    ``extents`` tile the disk of ``size`` bytes.
    """
    cells = min(_COLUMNS * _ROWS, max(1, -(-size // 512)))
    kinds = {State.ZERO: ZERO, State.UNALLOCATED: REMOTE}
    pieces = ((each.offset, each.length, kinds.get(each.state, LOCAL)) for each in extents)
    weights = weigh(pieces, size, cells)
    totals = [sum(cell[kind] for cell in weights) for kind in range(3)]
    columns = min(_COLUMNS, cells)
    rows = -(-cells // columns)
    width = max(columns * _CELL, 560) + 2 * _MARGIN
    height = rows * _CELL + _HEADER + 2 * _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_MARGIN}" y="{_MARGIN + 8}" font-weight="bold">{escape(title)}</text>',
    ]
    parts += _legend(totals, size)
    for number, cell in enumerate(weights):
        x = _MARGIN + number % columns * _CELL
        y = _MARGIN + _HEADER + number // columns * _CELL
        parts.append(
            f'<rect x="{x}" y="{y}" width="{_CELL - 1}" height="{_CELL - 1}" fill="{_mix(cell)}"/>'
        )
    parts.append("</svg>\n")
    return "\n".join(parts)


def _mix(weights: list[float]) -> str:
    total = sum(weights) or 1.0
    colours = (_COLOURS[State.DATA], _COLOURS[State.ZERO], _REMOTE)
    mixed = (
        round(sum(w * colour[i] for w, colour in zip(weights, colours, strict=True)) / total)
        for i in range(3)
    )
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _legend(totals: list[float], size: int) -> list[str]:
    parts = []
    colours = (_COLOURS[State.DATA], _COLOURS[State.ZERO], _REMOTE)
    for number, (name, colour, amount) in enumerate(zip(KINDS, colours, totals, strict=True)):
        x = _MARGIN + number * 180
        y = _MARGIN + 26
        fill = "#" + "".join(f"{value:02x}" for value in colour)
        share = 100 * amount / size if size else 0
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{fill}"/>')
        parts.append(
            f'<text x="{x + 18}" y="{y + 11}">{name} {format_size(amount)} ({share:.1f} %)</text>'
        )
    return parts
