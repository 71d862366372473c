"""Charts of use, worked out here and drawn as SVG by the templates.

What was accepted stands above the axis, filled; what was refused hangs below it, striped. So the
two are told apart without colour. Both have the same scale.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from tfm_guard.records import UsageBucket

# A count above 0 is seen, however much more another one is.
_LEAST: Final = 1.5
_GAP: Final = 0.25  # of the width of a bar and its gap
_NICE: Final = (1, 2, 3, 4, 6, 8)


class Bar(NamedTuple):
    """What there is to draw of a bucket; lengths are in units of the drawing."""

    x: float
    accepted: float
    refused: float
    bucket: UsageBucket


class Chart(NamedTuple):
    """Bars of *width* around an axis, which is at the height *axis* from above."""

    bars: list[Bar]
    bar_width: float
    width: int
    height: int
    axis: float
    most: int  # what the full height above the axis stands for


def draw(buckets: Sequence[UsageBucket], *, width: int, height: int, numbered: bool) -> Chart:
    """Return the chart of *buckets*, as high as its highest bar, or a number that reads well."""
    accepted = max((bucket.accepted for bucket in buckets), default=0)
    refused = max((bucket.refused for bucket in buckets), default=0)
    most = max(accepted, refused, 1)
    if numbered:
        most = _round_up(most)
    # As much room below as is needed, at least a little.
    below = max(refused / most, 0.1)
    unit = height / (1 + below)
    step = width / max(len(buckets), 1)
    bars = [
        Bar(
            round(number * step + step * _GAP / 2, 2),
            _length(bucket.accepted, unit / most),
            _length(bucket.refused, unit / most),
            bucket,
        )
        for number, bucket in enumerate(buckets)
    ]
    return Chart(bars, round(step * (1 - _GAP), 2), width, height, round(unit, 2), most)


def gather(buckets: Sequence[UsageBucket], size: int) -> list[UsageBucket]:
    """Return *buckets* in groups of *size*, each summed up as one."""
    groups = [buckets[start : start + size] for start in range(0, len(buckets), size)]
    return [
        UsageBucket(
            start=group[0].start,
            accepted=sum(bucket.accepted for bucket in group),
            refused=sum(bucket.refused for bucket in group),
        )
        for group in groups
    ]


def _length(count: int, unit: float) -> float:
    return round(max(count * unit, _LEAST), 2) if count else 0.0


def _round_up(count: int) -> int:
    """Return the next number that reads well on an axis."""
    power = 1
    while True:
        for nice in _NICE:
            if count <= nice * power:
                return nice * power
        power *= 10
