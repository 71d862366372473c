"""Facts about what counts as a sudden change in use."""

import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.unusual_use import SHAPES, TROUBLES, measure
from tfm_guard.unusual import (
    HISTORY,
    REACH,
    WEEK,
    Unusual,
    comparable,
    is_unusual,
    suspicions,
)

NOW = 500_000
HOURS = range(NOW - REACH, NOW + 1)

# What is promised, with room for another seed: false alarms of a key in a year, and the shares of
# ten times the use, of refusals and of silence that are found within a day.
BOUNDS: Mapping[str, tuple[float, float, float, float]] = {
    "steady": (0.1, 0.85, 0.95, 0.55),
    "day and night": (0.1, 0.9, 0.95, 0.9),
    "office hours": (0.1, 0.75, 0.95, 0.55),
    "bursts": (3.0, 0.05, 0.35, 0.55),
    "weekly job": (0.1, 0.0, 0.95, 0.0),
    "growth": (0.1, 0.9, 0.95, 0.8),
}


def found(
    accepted: Mapping[int, int], refused: Mapping[int, int], *, first: int = HOURS[0]
) -> list[Unusual]:
    """Return what is unusual about the hour `NOW`."""
    confirmed = []
    for suspicion in suspicions(NOW, accepted, refused):
        counts = refused if suspicion.kind == "more_refused" else accepted
        if is_unusual(suspicion, NOW, counts, first=first):
            confirmed.append(suspicion)
    return confirmed


def test_the_rule_keeps_its_bounds() -> None:
    """On made keys of every shape it is wrong at most, and right at least, as often as promised."""
    results = measure(keys=10, seed=2)
    assert set(results) == set(SHAPES) == set(BOUNDS)
    for shape, (alarms, *shares) in BOUNDS.items():
        assert results[shape]["false alarms"] <= alarms, (shape, results[shape])
        for trouble, share in zip(TROUBLES, shares, strict=True):
            assert results[shape][trouble] >= share, (shape, trouble, results[shape])


@pytest.mark.parametrize(
    ("accepted", "refused", "expected"),
    [
        (100, 0, []),
        (439, 0, []),
        (440, 0, [Unusual("more_accepted", 440, 100)]),
        (100, 40, [Unusual("more_refused", 40, 0)]),
        (100, 39, []),
        (440, 40, [Unusual("more_accepted", 440, 100), Unusual("more_refused", 40, 0)]),
    ],
)
def test_more_than_four_times_the_usual_is_unusual(
    accepted: int, refused: int, expected: list[Unusual]
) -> None:
    """A steady key may come to four times its most, and ten requests more than that most."""
    assert found(dict.fromkeys(HOURS, 100) | {NOW: accepted}, {NOW: refused}) == expected


@pytest.mark.parametrize(("last", "expected"), [(66, []), (65, [(65, 300)]), (0, [(0, 300)])])
def test_less_than_a_quarter_in_three_hours_is_unusual(
    last: int, expected: list[tuple[int, int]]
) -> None:
    """A steady key falls silent when three hours together come to less than a quarter of one's."""
    silent = {NOW - 2: 0, NOW - 1: 0, NOW: last}
    fewer = [Unusual("fewer_accepted", *each) for each in expected]
    assert found(dict.fromkeys(HOURS, 100) | silent, {}) == fewer


@pytest.mark.parametrize(("age", "count"), [(HISTORY - 1, 0), (HISTORY, 1)])
def test_a_young_key_is_left_alone(age: int, count: int) -> None:
    """Nothing is unusual about a key in its first four weeks of use."""
    first = NOW - age
    accepted = dict.fromkeys(range(first, NOW), 100) | {NOW: 100_000}
    assert len(found(accepted, {}, first=first)) == count


@pytest.mark.parametrize("ago", [1, 2, 3])
@pytest.mark.parametrize("late", [-1, 0, 1])
def test_a_weekly_job_is_no_news(ago: int, late: int) -> None:
    """What took place at that hour of the week, or one beside it, in three weeks is usual."""
    assert found({NOW: 1000, NOW - ago * WEEK + late: 1000}, {}) == []


def test_a_key_in_bursts_needs_a_bigger_one() -> None:
    """A burst is unusual only from twice what the strongest in four weeks was."""
    quiet = dict.fromkeys(HOURS, 10)
    burst = {NOW - 100: 1000}
    assert found(quiet | {NOW: 1000}, {}) != []
    assert found(quiet | burst | {NOW: 1999}, {}) == []
    assert found(quiet | burst | {NOW: 2000}, {}) != []


def test_the_last_day_is_no_measure() -> None:
    """What began within the last day does not hide how it goes on."""
    quiet = dict.fromkeys(HOURS, 10)
    assert found(quiet | {NOW - 23: 1000, NOW: 1000}, {}) != []
    assert found(quiet | {NOW - 24: 1000, NOW: 1000}, {}) == []


@given(st.integers(0, 2**63), st.floats(0, 40))
def test_the_comparable_hours_suffice(seed: int, spread: float) -> None:
    """What is suspected of an hour does not depend on any other hours."""
    dice = random.Random(seed)
    accepted = {hour: round(dice.expovariate(1) * spread) for hour in HOURS}
    refused = {hour: round(dice.expovariate(1) * spread) for hour in HOURS}
    few = comparable(NOW)
    assert suspicions(NOW, accepted, refused) == suspicions(
        NOW, {hour: accepted[hour] for hour in few}, {hour: refused[hour] for hour in few}
    )


@given(st.integers(0, 2**63), st.floats(0, 40))
def test_hours_within_reach_suffice(seed: int, spread: float) -> None:
    """What is older than that changes no judgement."""
    dice = random.Random(seed)
    near = {hour: round(dice.expovariate(1) * spread) for hour in HOURS} | {NOW: 500}
    far = {hour: dice.randrange(10_000) for hour in range(HOURS[0] - 200, HOURS[0])}
    first = HOURS[0] - 200
    assert found(near, {}, first=first) == found(far | near, {}, first=first)
