# SPDX-License-Identifier: Apache-2.0
"""Charts over time as SVG: panels one above the other that share the time axis."""

import math
from dataclasses import dataclass
from html import escape

Points = list[tuple[float, float]]

_WIDTH, _PANEL, _GAP = 800, 170, 44
_LEFT, _TOP, _RIGHT, _BOTTOM = 70, 64, 20, 44
_AXIS = "#888"
_BANDS = ("#e8f1ec", "#f8e6c4")
# Told apart by lightness and dashes too, for those who see no hue.
_STYLES = {
    "limit": 'fill="none" stroke="#666" stroke-width="1.5" stroke-dasharray="6 4"',
    "first": 'fill="none" stroke="#1b7f4d" stroke-width="2"',
    "second": 'fill="none" stroke="#8fc7a8" stroke-width="1"',
    "dots": 'fill="#a3470b" fill-opacity="0.7"',
}


@dataclass(frozen=True)
class Series:
    """Points (seconds, value), drawn as `limit` (dashed), `first`, `second` or `dots`."""

    name: str
    style: str
    points: Points


@dataclass(frozen=True)
class Panel:
    """Series with one unit, on a scale from zero."""

    unit: str
    series: list[Series]


@dataclass(frozen=True)
class Band:
    """A span of time (seconds) in which something was different."""

    start: float
    end: float
    name: str


@dataclass(frozen=True)
class Chart:
    """``end``: how many seconds are shown, from zero."""

    title: str
    end: float
    panels: list[Panel]
    bands: list[Band]

    def svg(self) -> str:
        """The chart as an SVG document."""
        width = _LEFT + _WIDTH + _RIGHT
        height = _TOP + len(self.panels) * (_PANEL + _GAP) - _GAP + _BOTTOM
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
            f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="{_LEFT}" y="22" font-size="15" font-weight="bold">'
            f"{escape(self.title)}</text>",
        ]
        for number, panel in enumerate(self.panels):
            parts += self._panel(panel, _TOP + number * (_PANEL + _GAP), first=number == 0)
        parts += self._time_axis(height - _BOTTOM)
        parts.append("</svg>\n")
        return "\n".join(parts)

    def _x(self, time: float) -> float:
        return _LEFT + _WIDTH * time / self.end

    def _panel(self, panel: Panel, top: int, *, first: bool) -> list[str]:
        highest = max((value for one in panel.series for _, value in one.points), default=1.0)
        step = _step(highest)
        most = step * math.ceil(highest * 1.05 / step)

        def y(value: float) -> float:
            return top + _PANEL * (1 - value / most)

        parts = self._bands(top, named=first)
        for number in range(round(most / step) + 1):
            level = y(number * step)
            parts.append(
                f'<path d="M{_LEFT} {level:.1f}H{_LEFT + _WIDTH}" stroke="{_AXIS}"'
                f' stroke-opacity="0.25"/><text x="{_LEFT - 6}" y="{level + 4:.1f}"'
                f' text-anchor="end">{number * step:g}</text>'
            )
        for series in panel.series:
            places = [(self._x(at), y(value)) for at, value in series.points if at <= self.end]
            parts.append(_drawn(places, series.style))
        parts += _legend(panel, top - 8)
        parts.append(
            f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH}" height="{_PANEL}" fill="none"'
            f' stroke="{_AXIS}"/>'
        )
        return parts

    def _bands(self, top: int, *, named: bool) -> list[str]:
        parts = []
        for number, band in enumerate(self.bands):
            x, end = self._x(band.start), self._x(band.end)
            parts.append(
                f'<rect x="{x:.1f}" y="{top}" width="{end - x:.1f}" height="{_PANEL}"'
                f' fill="{_BANDS[number % len(_BANDS)]}"/>'
            )
            if named:
                y = top + 16 + 16 * number
                parts.append(f'<text x="{x + 5:.1f}" y="{y}">{escape(band.name)}</text>')
        return parts

    def _time_axis(self, bottom: int) -> list[str]:
        parts = []
        step = _step(self.end / 2)
        for number in range(int(self.end / step) + 1):
            parts.append(
                f'<text x="{self._x(number * step):.1f}" y="{bottom + 16}" text-anchor="middle">'
                f"{number * step:g}</text>"
            )
        middle = _LEFT + _WIDTH / 2
        parts.append(f'<text x="{middle}" y="{bottom + 34}" text-anchor="middle">seconds</text>')
        return parts


def _step(most: float) -> float:
    """A round number that divides the range from 0 to ``most`` into about five."""
    power: float = 10.0 ** math.floor(math.log10(most / 4))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= most / 5)


def _drawn(places: Points, style: str) -> str:
    if style == "dots":
        circles = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in places)
        return f"<g {_STYLES[style]}>{circles}</g>"
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f'<path {_STYLES[style]} d="M{line}"/>' if line else ""


def _legend(panel: Panel, y: int) -> list[str]:
    parts = [f'<text x="{_LEFT}" y="{y}" font-weight="bold">{escape(panel.unit)}</text>']
    x = _LEFT + 180.0
    for series in panel.series:
        ends = [(x, y - 4.0), (x + 22, y - 4.0)]
        middle = [(x + 11, y - 4.0)]
        parts.append(_drawn(middle if series.style == "dots" else ends, series.style))
        parts.append(f'<text x="{x + 30}" y="{y}">{escape(series.name)}</text>')
        x += 60 + 7 * len(series.name)
    return parts
