"""Line charts as SVG: axes with labels, lines with their names, and nothing else."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

Points = Sequence[tuple[float, float]]

_WIDTH: Final = 720
_HEIGHT: Final = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 230, 40, 50
# Told apart by people who see colours differently, too (Okabe and Ito).
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_LINE_HEIGHT: Final = 18
_MOST_TICKS: Final = 6


class Axis(NamedTuple):
    """What an axis shows, and whether equal distances on it are equal factors."""

    label: str
    logarithmic: bool = False


class _Scale:
    """Leads from values to pixels."""

    def __init__(self, values: Sequence[float], axis: Axis, start: float, end: float) -> None:
        self._logarithmic = axis.logarithmic
        places = [self._place(value) for value in values]
        low = min(places) if axis.logarithmic else min(*places, 0.0)
        self._low, self._high = low, max(*places, low + 1e-9)
        if axis.logarithmic:
            self._low, self._high = math.floor(low), math.ceil(self._high)
            self._high = max(self._high, self._low + 1)
        self._start, self._end = start, end

    def _place(self, value: float) -> float:
        return math.log10(value) if self._logarithmic else value

    def __call__(self, value: float) -> float:
        share = (self._place(value) - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 1)

    def ticks(self) -> list[float]:
        """Return the values to mark."""
        if self._logarithmic:
            powers = range(int(self._low), int(self._high) + 1)
            return [10.0**power for power in powers]
        step = 10 ** math.floor(math.log10((self._high - self._low) / 2))
        while (self._high - self._low) / step > _MOST_TICKS:
            step *= 2
        count = math.floor(self._high / step + 1e-9)
        return [number * step for number in range(math.ceil(self._low / step), count + 1)]


def _text(x: float, y: float, text: str, how: str = "") -> str:
    return f'<text x="{x}" y="{y}"{how}>{html.escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 or value == 0 else f"{value:g}"


def _axes(x: _Scale, y: _Scale, across: Axis, up: Axis) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in x.ticks():
        parts.append(f'<path class="grid" d="M{x(value)} {_TOP}V{bottom}"/>')
        parts.append(_text(x(value), bottom + 18, _number(value), ' text-anchor="middle"'))
    for value in y.ticks():
        parts.append(f'<path class="grid" d="M{_LEFT} {y(value)}H{right}"/>')
        parts.append(_text(_LEFT - 8, y(value) + 4, _number(value), ' text-anchor="end"'))
    middle = (_LEFT + right) / 2
    parts.append(_text(middle, _HEIGHT - 10, across.label, ' text-anchor="middle"'))
    turned = f' text-anchor="middle" transform="rotate(-90 16 {(_TOP + bottom) / 2})"'
    parts.append(_text(16, (_TOP + bottom) / 2, up.label, turned))
    return parts


def line_chart(title: str, lines: Mapping[str, Points], *, across: Axis, up: Axis) -> str:
    """Return the chart of *lines*, each by its name."""
    every = [point for points in lines.values() for point in points]
    x = _Scale([point[0] for point in every], across, _LEFT, _WIDTH - _RIGHT)
    y = _Scale([point[1] for point in every], up, _HEIGHT - _BOTTOM, _TOP)
    parts = [_text(_LEFT, 22, title, ' font-weight="bold"'), *_axes(x, y, across, up)]
    for number, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = "L".join(f"{x(across_)} {y(up_)}" for across_, up_ in points)
        parts.append(f'<path class="line" stroke="{colour}" d="M{path}"/>')
        height = _TOP + 8 + number * _LINE_HEIGHT
        parts.append(
            f'<path class="line" stroke="{colour}" d="M{_WIDTH - _RIGHT + 12} {height}h16"/>'
        )
        parts.append(_text(_WIDTH - _RIGHT + 34, height + 4, name))
    style = (
        "text{font:12px sans-serif;fill:#222}.grid{stroke:#ddd;fill:none}"
        ".line{stroke-width:2;fill:none}"
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f"<title>{html.escape(title)}</title><style>{style}</style>\n"
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>\n{body}\n</svg>\n'
    )
