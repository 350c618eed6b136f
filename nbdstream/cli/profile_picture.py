# SPDX-License-Identifier: Apache-2.0
"""A boot profile as a picture: where on the disk a guest reads, and when."""

from html import escape

from nbdstream.streamer.profile import Profile
from nbdstream.units import format_duration, format_size

_WIDTH, _HEIGHT = 640, 400
_LEFT, _TOP, _RIGHT, _BOTTOM = 80, 48, 16, 56
_LINE = "#1b7f4d"
_AXIS = "#888"


def svg_profile(profile: Profile, title: str) -> str:
    """An SVG document: from left to right what is read, in order and to scale in bytes;
    from bottom to top where it lies on the disk. Reads in sequence rise, jumps are gaps."""
    total = profile.bytes or 1
    size = profile.backing_size or 1
    width, height = _WIDTH + _LEFT + _RIGHT, _HEIGHT + _TOP + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="24"><tspan font-weight="bold">{escape(title)}</tspan>'
        f"  {format_size(profile.bytes)} in {len(profile.ranges)} ranges,"
        f" {format_duration(profile.seconds)}</text>",
        f'<rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}"'
        f' fill="none" stroke="{_AXIS}"/>',
        f'<path fill="none" stroke="{_LINE}" stroke-width="2" stroke-linecap="square"'
        f' d="{_path(profile, total, size)}"/>',
    ]
    parts += _labels(total, size)
    parts.append("</svg>\n")
    return "\n".join(parts)


def _path(profile: Profile, total: int, size: int) -> str:
    """Each range as a stroke that is as wide, and as high, as it is long."""
    strokes = []
    before = 0
    for offset, length in profile.ranges:
        x1 = _LEFT + _WIDTH * before / total
        y1 = _TOP + _HEIGHT * (1 - offset / size)
        before += length
        x2 = _LEFT + _WIDTH * before / total
        y2 = _TOP + _HEIGHT * (1 - (offset + length) / size)
        strokes.append(f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}")
    return "".join(strokes)


def _labels(total: int, size: int) -> list[str]:
    parts = []
    for step in range(5):
        x = _LEFT + _WIDTH * step / 4
        y = _TOP + _HEIGHT * (1 - step / 4)
        parts.append(
            f'<text x="{x:.0f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">'
            f"{format_size(total * step / 4)}</text>"
        )
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 4:.0f}" text-anchor="end">'
            f"{format_size(size * step / 4)}</text>"
        )
    parts.append(
        f'<text x="{_LEFT + _WIDTH / 2:.0f}" y="{_TOP + _HEIGHT + 40}" text-anchor="middle">'
        "read so far, in the order of first touch (upwards: offset on the disk)</text>"
    )
    return parts
