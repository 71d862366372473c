"""The one place that reads time."""

import asyncio
import contextlib
import time
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

# CLOCK_BOOTTIME goes on while the machine sleeps, so a suspended process wakes with its deadlines
# past; where it is missing, the ordinary monotonic clock is the best there is.
_MONOTONIC = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock(Protocol):
    """Where time comes from."""

    def now(self) -> datetime:
        """Return the wall time in UTC: for what is stored and shown."""

    def monotonic(self) -> float:
        """Return seconds since an arbitrary start that never step: for everything measured."""

    async def sleep(self, seconds: float, *, unless: asyncio.Event | None = None) -> None:
        """Return when *seconds* have passed, or before that when the event *unless* is set."""


class SystemClock:
    """The machine's clocks."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    # Read on every request: a C function, without a frame of its own.
    monotonic = staticmethod(partial(time.clock_gettime, _MONOTONIC))

    async def sleep(self, seconds: float, *, unless: asyncio.Event | None = None) -> None:
        if unless is None:
            await asyncio.sleep(seconds)
        else:
            # Not wait_for: Python 3.11's goes on if it is cancelled just as the event is set.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await unless.wait()
