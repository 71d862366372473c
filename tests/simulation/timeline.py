"""Virtual time, and all that is to happen in it, in one order."""

import heapq
import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Protocol

from tfm_guard.clock import SystemClock

START = datetime(2030, 1, 1, tzinfo=UTC)
_BOOTED = 1000.0  # seconds that every monotonic clock shows at first


class Cancellable(Protocol):
    """What may be called off before it happens."""

    def cancelled(self) -> bool:
        """Tell whether it has been."""


class Timeline:
    """The time *now*, in seconds, and the one source of chance, seeded."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.random = Random(seed)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._timers: dict[int, Cancellable] = {}
        self._numbers = itertools.count()

    def at(
        self, when: float, call: Callable[..., None], *args: Any, timer: Cancellable | None = None
    ) -> None:
        """Have *call* made at *when*, or now if that is past, unless *timer* is called off."""
        number = next(self._numbers)
        if timer is not None:
            self._timers[number] = timer
        heapq.heappush(self._events, (max(when, self.now), number, call, args))

    def after(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        """Have *call* made in *seconds*."""
        self.at(self.now + seconds, call, *args)

    def next_time(self) -> float:
        """Return when the next event is due."""
        self._drop_cancelled()
        return self._events[0][0] if self._events else float("inf")

    def advance(self) -> None:
        """Go to the next event, and let it happen."""
        self._drop_cancelled()
        when, number, call, args = heapq.heappop(self._events)
        self._timers.pop(number, None)
        self.now = when
        call(*args)

    def _drop_cancelled(self) -> None:
        while self._events:
            number = self._events[0][1]
            timer = self._timers.get(number)
            if timer is None or not timer.cancelled():
                return
            heapq.heappop(self._events)
            del self._timers[number]


class SimClock(SystemClock):
    """One process's clocks: *rate* seconds pass on it in each second; its wall clock is *off*.

    The monotonic one goes on while the process does not, as CLOCK_BOOTTIME does.
    """

    def __init__(self, timeline: Timeline, *, rate: float, off: float) -> None:
        self._timeline = timeline
        self._rate = rate
        self._start = START + timedelta(seconds=off)

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._timeline.now)

    def monotonic(self) -> float:
        return _BOOTED + self._timeline.now * self._rate

    def time_of(self, monotonic: float) -> float:
        """Return the time at which this clock shows *monotonic*."""
        return (monotonic - _BOOTED) / self._rate
