"""Facts about the end of waiting: one timer for all, and everyone in time."""

import asyncio

import pytest

from tfm_guard.deadlines import Deadlines
from tfm_guard.errors import Unavailable


class Timers:
    """Counts and keeps the timers of a loop instead of setting them, and is its clock."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.set = 0
        self._due: list[tuple[float, object, tuple[object, ...]]] = []
        loop = asyncio.get_running_loop()
        patch.setattr("tfm_guard.deadlines.DEADLINE_SECONDS", 1.0)
        patch.setattr(loop, "call_at", self._call_at)
        patch.setattr(loop, "time", lambda: self.now)

    def _call_at(self, when: float, callback: object, *args: object) -> object:
        self.set += 1
        self._due.append((when, callback, args))
        return self

    def advance(self, now: float) -> None:
        """Let it be *now*."""
        self.now = now
        due = [timer for timer in self._due if timer[0] <= now]
        self._due = [timer for timer in self._due if timer[0] > now]
        for _, callback, args in due:
            assert callable(callback)
            callback(*args)


@pytest.fixture
async def timers(monkeypatch: pytest.MonkeyPatch) -> Timers:
    """Take the place of the loop's clock."""
    return Timers(monkeypatch)


def reasons(*waits: "asyncio.Future[None]") -> list[str | None]:
    """Return why each of *waits* has failed; None for one that goes on."""
    errors = [wait.exception() if wait.done() else None for wait in waits]
    assert all(error is None or isinstance(error, Unavailable) for error in errors)
    return [error.reason if isinstance(error, Unavailable) else None for error in errors]


async def test_everyone_waits_for_a_second_at_the_most(timers: Timers) -> None:
    """Each wait ends a second after its own beginning, and there is one timer at a time."""
    deadlines, loop = Deadlines(), asyncio.get_running_loop()
    first, second, third = (loop.create_future() for _ in range(3))
    for wait, since in ((first, 1000.0), (second, 1000.0), (third, 1000.5)):
        deadlines.limit(wait, since)
    assert timers.set == 1
    timers.advance(1000.9)
    assert reasons(first, second, third) == [None, None, None]
    timers.advance(1001.0)
    assert reasons(first, second, third) == ["no answer within 1 s"] * 2 + [None]
    assert timers.set == 2
    timers.advance(1001.5)
    assert reasons(third) == ["no answer within 1 s"]
    assert timers.set == 2


async def test_what_is_answered_is_let_be(timers: Timers) -> None:
    """Whoever has an answer or went away keeps no timer going, and is not kept."""
    deadlines, loop = Deadlines(), asyncio.get_running_loop()
    answered, gone = loop.create_future(), loop.create_future()
    for wait in (answered, gone):
        deadlines.limit(wait, 1000.0)
    answered.set_result(None)
    gone.cancel()
    timers.advance(1001.0)
    assert answered.result() is None
    assert gone.cancelled()
    assert timers.set == 1


async def test_who_waits_again_has_what_is_left(timers: Timers) -> None:
    """A second wait of one who asked earlier ends with that one's second."""
    deadlines, loop = Deadlines(), asyncio.get_running_loop()
    later, again = loop.create_future(), loop.create_future()
    deadlines.limit(later, 1000.8)
    deadlines.limit(again, 1000.2)
    timers.advance(1001.2)
    assert reasons(later, again) == [None, "no answer within 1 s"]


async def test_the_answered_are_not_kept(timers: Timers) -> None:
    """However many have been answered, only those that still wait are held on to."""
    deadlines, loop = Deadlines(), asyncio.get_running_loop()
    for number in range(1000):
        wait = loop.create_future()
        deadlines.limit(wait, 1000.0 + number / 10_000)
        wait.set_result(None)
    assert len(deadlines._waits) == 1  # noqa: SLF001
    assert timers.set == 1
