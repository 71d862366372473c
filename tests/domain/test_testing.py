"""Facts about what the package offers to others' tests."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfm_guard.clock import Clock, SystemClock
from tfm_guard.errors import ConfigurationError
from tfm_guard.settings import Settings
from tfm_guard.testing import CHEAP_HASHING, ManualClock, seeded_bytes


def test_a_manual_clock_moves_only_when_moved() -> None:
    """Passing seconds move both times; stepping the wall clock moves it alone, either way."""
    clock: Clock = ManualClock()
    moved = ManualClock()
    start = moved.now()
    assert (clock.now(), clock.monotonic()) == (start, 0)
    moved.advance(1.5)
    assert (moved.now(), moved.monotonic()) == (start + timedelta(seconds=1.5), 1.5)
    moved.step_wall(-60)
    assert (moved.now(), moved.monotonic()) == (start - timedelta(seconds=58.5), 1.5)


def test_a_manual_clock_tells_utc() -> None:
    """A start with another zone is the same moment in UTC."""
    start = datetime(2030, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))
    assert ManualClock(start).now() == start
    assert ManualClock(start).now().tzinfo is UTC
    assert repr(ManualClock(start)) == "ManualClock(2030-01-01T00:00:00+00:00, monotonic=0)"


def test_time_does_not_run_backwards() -> None:
    """Negative seconds cannot pass."""
    with pytest.raises(ValueError, match="got -1"):
        ManualClock().advance(-1)


def test_the_system_clock_goes_on() -> None:
    """Both times of the real clock advance, and the wall time is UTC."""
    clock = SystemClock()
    earlier, wall = clock.monotonic(), clock.now()
    while clock.monotonic() == earlier or clock.now() == wall:
        pass
    assert clock.monotonic() > earlier
    assert clock.now() > wall
    assert wall.tzinfo is UTC


@given(st.integers(), st.lists(st.integers(0, 64), max_size=5))
def test_a_seed_repeats_its_bytes(seed: int, counts: list[int]) -> None:
    """The same seed gives the same bytes in the same order, as many as asked for."""
    one, other = seeded_bytes(seed), seeded_bytes(seed)
    drawn = [one(count) for count in counts]
    assert drawn == [other(count) for count in counts]
    assert [len(some) for some in drawn] == counts
    assert one(16) != seeded_bytes(seed + 1)(16) != one(16)


def test_cheap_hashing_is_the_cheapest() -> None:
    """Each of its values is the least that the settings accept."""
    settings = Settings.load({}, database_url="sqlite:///x", **CHEAP_HASHING)
    for name, value in CHEAP_HASHING.items():
        assert getattr(settings, name) == value
        cheaper: dict[str, Any] = {**CHEAP_HASHING, name: value - 1}
        with pytest.raises(ConfigurationError, match=name.upper()):
            Settings.load({}, database_url="sqlite:///x", **cheaper)
