"""A sudden change in the use of a key, told from the counts of its hours.

An hour is compared with the same hour of the week, and the one before and after it, in the three
weeks before: so nights, weekends and weekly jobs are no news. How far it is outside of those is its
strength. The hour is unusual if it is far outside, and twice as far as any hour of the key's last
four weeks was, the last day left out: so a key that always comes in bursts needs a bigger one.
"""

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

# Hours are numbered from 1970 on.
WEEK: Final = 24 * 7
# Before this there is too little to compare with.
HISTORY: Final = 4 * WEEK

_WEEKS: Final = 3
_NEIGHBOURS: Final = 1  # hours before and after
_STRENGTH: Final = 4.0  # times the most, or the least, that was usual
# Counts below this are as good as none: to go from 1 to 5 is nothing.
_FEW: Final = 10
_MARGIN: Final = 2.0  # times the strongest of the hours that are known
_KNOWN: Final = range(24, 4 * WEEK)  # hours ago
_SILENCE: Final = 3  # hours; one without use can be chance

# How many hours back anything is compared with.
REACH: Final = _KNOWN.stop + _WEEKS * WEEK + _NEIGHBOURS + _SILENCE

UnusualKind = Literal["more_accepted", "more_refused", "fewer_accepted"]
Counts = Mapping[int, int]


class Unusual(NamedTuple):
    """What was unusual: *requests* many, where at most, or at least, *usual* were to be expected.

    With "fewer_accepted" both are totals of three hours.
    """

    kind: UnusualKind
    requests: int
    usual: int


def comparable(hour: int) -> list[int]:
    """Return the hours that tell whether *hour* may be unusual at all."""
    wanted = {hour - back for back in range(_SILENCE)}
    for week in range(1, _WEEKS + 1):
        middle = hour - week * WEEK
        wanted |= {*range(middle - _NEIGHBOURS - _SILENCE + 1, middle + _NEIGHBOURS + 1)}
    return sorted(wanted)


def suspicions(hour: int, accepted: Counts, refused: Counts) -> list[Unusual]:
    """Return in what ways *hour* is far outside of what was usual; `comparable` hours suffice.

    Hours that have no count had no requests.
    """
    found: list[tuple[float, Unusual]] = [
        _more("more_accepted", hour, accepted),
        _more("more_refused", hour, refused),
        _fewer(hour, accepted),
    ]
    return [unusual for strength, unusual in found if strength >= _STRENGTH]


def is_unusual(suspicion: Unusual, hour: int, counts: Counts, *, first: int) -> bool:
    """Tell whether a *suspicion* about *hour* stands out from what the key has done before.

    *counts* are those of all hours within `REACH`, accepted or refused as the suspicion is; *first*
    is the key's first hour in use.
    """
    if hour - first < HISTORY:
        return False
    # The first week had nothing to be compared with.
    known = (hour - ago for ago in _KNOWN if hour - ago >= first + WEEK)
    strongest = max(_strength(suspicion.kind, each, counts) for each in known)
    return _strength(suspicion.kind, hour, counts) >= _MARGIN * strongest


def _strength(kind: UnusualKind, hour: int, counts: Counts) -> float:
    strength, _ = _fewer(hour, counts) if kind == "fewer_accepted" else _more(kind, hour, counts)
    return strength


def _more(kind: UnusualKind, hour: int, counts: Counts) -> tuple[float, Unusual]:
    count = counts.get(hour, 0)
    usual = max(counts.get(each, 0) for each in _usual(hour))
    return count / (usual + _FEW), Unusual(kind, count, usual)


def _fewer(hour: int, counts: Counts) -> tuple[float, Unusual]:
    count = _total(hour, counts)
    usual = min(_total(each, counts) for each in _usual(hour))
    return usual / (count + _FEW), Unusual("fewer_accepted", count, usual)


def _usual(hour: int) -> list[int]:
    return [
        hour - week * WEEK + neighbour
        for week in range(1, _WEEKS + 1)
        for neighbour in range(-_NEIGHBOURS, _NEIGHBOURS + 1)
    ]


def _total(hour: int, counts: Counts) -> int:
    return sum(counts.get(hour - back, 0) for back in range(_SILENCE))
