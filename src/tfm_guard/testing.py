"""What tests of an application need: time that they move, cheap hashing, repeatable randomness.

Nothing else in this package imports this module.
"""

import random
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Final

# The least that argon2id takes. As keywords: `Guard.from_urls(database=…, **CHEAP_HASHING)`.
CHEAP_HASHING: Final[Mapping[str, int]] = MappingProxyType(
    {"argon2_time_cost": 1, "argon2_memory_kib": 8, "argon2_parallelism": 1}
)


class ManualClock:
    """A clock that stands still until it is moved: `Guard(settings, clock=ManualClock())`.

    It drives what the guard measures itself. PostgreSQL tells its own time; SQLite has none.
    """

    def __init__(self, start: datetime = datetime(2030, 1, 1, tzinfo=UTC)) -> None:
        self._now = start.astimezone(UTC)
        self._monotonic = 0.0

    def __repr__(self) -> str:
        return f"ManualClock({self._now.isoformat()}, monotonic={self._monotonic:g})"

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass; time does not run backwards."""
        if seconds < 0:
            raise ValueError(f"expected seconds to pass, got {seconds:g}; step_wall() steps back")
        self._now += timedelta(seconds=seconds)
        self._monotonic += seconds

    def step_wall(self, seconds: float) -> None:
        """Set the wall clock forward, or back, by *seconds* in which nothing passes."""
        self._now += timedelta(seconds=seconds)


def seeded_bytes(seed: int = 0) -> Callable[[int], bytes]:
    """Return a stand-in for `os.urandom` that gives the same bytes for the same *seed*.

    Tokens made from it can be predicted: `Guard(settings, random=seeded_bytes(1))`.
    """
    return random.Random(seed).randbytes  # noqa: S311 - to be predictable is the point
