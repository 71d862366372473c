"""An end to waiting, at the price of one timer however many wait."""

import asyncio
from collections import deque
from typing import Any, Final

from tfm_guard.errors import Unavailable

# How long a request waits for an answer about its token.
DEADLINE_SECONDS: Final = 1.0


class Deadlines:
    """Ends waits that are not over in `DEADLINE_SECONDS` with `Unavailable`.

    `asyncio.timeout` makes a timer for each who waits, and undoes it: half the price of a look-up.
    """

    def __init__(self) -> None:
        self._waits: deque[tuple[float, asyncio.Future[Any]]] = deque()  # the earliest end first
        self._timer: asyncio.TimerHandle | None = None

    def limit(self, future: "asyncio.Future[Any]", since: float) -> None:
        """Let *future* fail when the time is over that began at *since*, in the loop's time."""
        end, waits = end_of(since), self._waits
        while waits and waits[0][1].done():
            waits.popleft()
        if waits and end < waits[-1][0]:
            # Who waits once more, for what is left of the time.
            future.get_loop().call_at(end, _fail, future)
            return
        waits.append((end, future))
        if self._timer is None:
            self._timer = future.get_loop().call_at(end, self._end_late_ones)

    def _end_late_ones(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._waits and (self._waits[0][0] <= now or self._waits[0][1].done()):
            _fail(self._waits.popleft()[1])
        self._timer = None
        if self._waits:
            self._timer = loop.call_at(self._waits[0][0], self._end_late_ones)


def end_of(since: float) -> float:
    """Return when who asked at *since* has waited long enough."""
    return since + DEADLINE_SECONDS


def too_late() -> Unavailable:
    """Return what is raised for who has waited long enough."""
    return Unavailable(f"no answer within {DEADLINE_SECONDS:g} s")


def _fail(future: "asyncio.Future[Any]") -> None:
    if not future.done():
        future.set_exception(too_late())
