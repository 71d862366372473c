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
