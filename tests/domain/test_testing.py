"""Facts about what the package offers to others' tests."""

import asyncio
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
    assert repr(ManualClock(start)) == (
        "ManualClock(2030-01-01T00:00:00+00:00, monotonic=0, sleepers=0)"
    )


async def test_time_does_not_run_backwards() -> None:
    """Negative seconds cannot pass."""
    clock = ManualClock()
    with pytest.raises(ValueError, match="got -1"):
        clock.advance(-1)
    with pytest.raises(ValueError, match="got -2"):
        await clock.pass_time(-2)
    assert clock.monotonic() == 0


class Sleepers:
    """Tasks that each sleep again and again, and note when they woke."""

    def __init__(self, clock: ManualClock, *pauses: float) -> None:
        self.woke: list[tuple[float, float]] = []
        self.tasks = [asyncio.create_task(self._sleep(clock, pause)) for pause in pauses]

    async def _sleep(self, clock: ManualClock, pause: float) -> None:
        while True:
            await clock.sleep(pause)
            await asyncio.to_thread(self.woke.append, (pause, clock.monotonic()))


async def test_a_sleeper_wakes_when_its_time_has_come() -> None:
    """Whoever sleeps on a manual clock wakes when it was moved so far, and not a moment before."""
    clock = ManualClock()
    task = asyncio.create_task(clock.sleep(2))
    await clock.wait_for_sleepers(1)
    assert repr(clock).endswith("sleepers=1)")
    clock.advance(1.999)
    await clock.pass_time(0)
    assert not task.done()
    clock.advance(0.001)
    await task
    await clock.sleep(0)
    await clock.sleep(-1)
    assert repr(clock).endswith("monotonic=2, sleepers=0)")


async def test_time_passes_from_one_awakening_to_the_next() -> None:
    """Those who sleep regularly wake each at its time, and are asleep again when it has passed."""
    clock = ManualClock()
    sleepers = Sleepers(clock, 1, 0.75)
    await clock.wait_for_sleepers(2)
    await clock.pass_time(3)
    assert sleepers.woke[:5] == [(0.75, 0.75), (1, 1), (0.75, 1.5), (1, 2), (0.75, 2.25)]
    assert sorted(sleepers.woke[5:]) == [(0.75, 3), (1, 3)]
    assert clock.monotonic() == 3
    assert repr(clock).endswith("sleepers=2)")
    for task in sleepers.tasks:
        task.cancel()


async def test_a_jump_in_time_wakes_a_sleeper_once() -> None:
    """As after a suspension, the pauses that were slept through are not made up for."""
    clock = ManualClock()
    sleepers = Sleepers(clock, 1)
    await clock.wait_for_sleepers(1)
    clock.advance(10)
    await clock.wait_for_sleepers(1)
    assert sleepers.woke == [(1, 10)]
    await clock.pass_time(1)
    assert sleepers.woke == [(1, 10), (1, 11)]
    sleepers.tasks[0].cancel()


async def test_time_waits_for_who_is_still_awake() -> None:
    """Before time passes, those whom a jump has woken get done what they woke for."""
    clock = ManualClock()
    sleepers = Sleepers(clock, 1)
    await clock.wait_for_sleepers(1)
    clock.advance(1)
    await clock.pass_time(0.5)
    assert sleepers.woke == [(1, 1)]
    await clock.pass_time(0.5)
    assert sleepers.woke == [(1, 1), (1, 2)]
    sleepers.tasks[0].cancel()


async def test_who_sleeps_may_pass_time() -> None:
    """A task that woke and then lets time pass does not wait for itself."""
    clock = ManualClock()
    task = asyncio.create_task(clock.sleep(1))
    await clock.wait_for_sleepers(1)

    async def sleep_and_pass_time() -> None:
        await clock.sleep(1)
        await clock.pass_time(1)

    another = asyncio.create_task(sleep_and_pass_time())
    await clock.wait_for_sleepers(2)
    clock.advance(1)
    await asyncio.gather(task, another)
    assert clock.monotonic() == 2


async def test_time_passes_over_a_sleeper_that_ended() -> None:
    """A task that ends after waking, and one that is cancelled in its sleep, hold nobody up."""
    clock = ManualClock()
    ending, cancelled = (asyncio.create_task(clock.sleep(1)) for _ in range(2))
    await clock.wait_for_sleepers(2)
    cancelled.cancel()
    await clock.pass_time(5)
    assert ending.done()
    assert cancelled.cancelled()
    assert clock.monotonic() == 5


async def test_an_event_wakes_a_sleeper_early() -> None:
    """Whoever sleeps unless an event is set wakes when it is, or was; else when its time comes."""
    clock = ManualClock()
    event = asyncio.Event()
    for moves, sets in ((0, True), (1, False), (0, True)):
        task = asyncio.create_task(clock.sleep(1, unless=event))
        await clock.wait_for_sleepers(1)
        clock.advance(0.5)
        await clock.pass_time(0)
        assert not task.done()
        if sets:
            event.set()
        await clock.pass_time(moves)
        await task
        assert repr(clock).endswith("sleepers=0)")
        event.clear()
    event.set()
    await clock.sleep(1, unless=event)
    assert clock.monotonic() == 2.5
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("clock", [ManualClock(), SystemClock()], ids=["manual", "system"])
async def test_a_sleeper_is_cancelled_for_sure(clock: Clock) -> None:
    """Cancelled in the moment in which its event is set, it does not go on as if it had woken."""
    event = asyncio.Event()
    task = asyncio.create_task(clock.sleep(60, unless=event))
    await asyncio.wait({task}, timeout=0.01)
    event.set()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


async def test_the_system_clock_sleeps_so_long_unless_woken() -> None:
    """On the real clock, too, an event ends a sleep, and without it the time does."""
    clock = SystemClock()
    event = asyncio.Event()
    started = clock.monotonic()
    await clock.sleep(0.02, unless=event)
    assert 0.015 < clock.monotonic() - started < 30
    event.set()
    await clock.sleep(60, unless=event)
    await clock.sleep(0, unless=event)
    assert clock.monotonic() - started < 30


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
