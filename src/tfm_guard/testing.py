"""What tests of an application need: time that they move, cheap hashing, repeatable randomness.

Nothing else in this package imports this module.
"""

import asyncio
import random
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Final

# The least that argon2id takes. As keywords: `Guard.from_urls(database=…, **CHEAP_HASHING)`.
CHEAP_HASHING: Final[Mapping[str, int]] = MappingProxyType(
    {"argon2_time_cost": 1, "argon2_memory_kib": 8, "argon2_parallelism": 1}
)


class ManualClock:
    """A clock that stands still until it is moved: `Guard(settings, clock=ManualClock())`.

    It drives what the guard measures itself. PostgreSQL tells its own time; SQLite has none.
    `advance` jumps, as if the process had been suspended; `pass_time` lets time go by, and all
    that happens regularly happens.
    """

    def __init__(self, start: datetime = datetime(2030, 1, 1, tzinfo=UTC)) -> None:
        self._start = start.astimezone(UTC)  # the wall time at which the monotonic time was 0
        self._monotonic = 0.0
        self._sleepers: dict[asyncio.Future[None], tuple[float, asyncio.Task[Any] | None]] = {}
        self._woken: set[asyncio.Task[Any]] = set()  # who have not slept again since
        self._watchers: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        moment = f"{self.now().isoformat()}, monotonic={self._monotonic:g}"
        return f"ManualClock({moment}, sleepers={len(self._sleepers)})"

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._monotonic)

    def monotonic(self) -> float:
        return self._monotonic

    async def sleep(self, seconds: float, *, unless: asyncio.Event | None = None) -> None:
        """Return when the clock has been moved by *seconds*, or when the event *unless* is set.

        At once if *seconds* is not positive.
        """
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        wake = asyncio.get_running_loop().create_future()
        task = asyncio.current_task()
        self._sleepers[wake] = self._monotonic + seconds, task
        self._woken -= {task}
        self._tell_watchers()
        event = None if unless is None else asyncio.ensure_future(unless.wait())
        if event is not None:
            event.add_done_callback(lambda _: self._wake(wake))
        try:
            await wake
        finally:
            if event is not None:
                event.cancel()
            self._sleepers.pop(wake, None)

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass in one jump, and wake who slept no longer than that.

        They run when the caller next waits for something. Time does not run backwards.
        """
        self._move_to(self._after(seconds))

    async def pass_time(self, seconds: float) -> None:
        """Let *seconds* go by from one awakening to the next.

        Each time those who woke run, for as long as it really takes, until they sleep again or
        have ended; so do those whom `advance` has woken. Do not use it where one of them waits for
        the caller.
        """
        end = self._after(seconds)
        await self._settle()
        while (due := min((due for due, _ in self._sleepers.values()), default=end)) < end:
            self._move_to(due)
            await self._settle()
        self._move_to(end)
        await self._settle()

    async def wait_for_sleepers(self, count: int) -> None:
        """Return once at least *count* tasks sleep."""
        while len(self._sleepers) < count:
            await self._watch()

    def step_wall(self, seconds: float) -> None:
        """Set the wall clock forward, or back, by *seconds* in which nothing passes."""
        self._start += timedelta(seconds=seconds)

    def _after(self, seconds: float) -> float:
        if seconds < 0:
            raise ValueError(f"expected seconds to pass, got {seconds:g}; step_wall() steps back")
        return self._monotonic + seconds

    def _move_to(self, monotonic: float) -> None:
        """Set the time, and wake those who slept until then."""
        self._monotonic = monotonic
        for wake in [wake for wake, (due, _) in self._sleepers.items() if due <= monotonic]:
            self._wake(wake)

    def _wake(self, wake: asyncio.Future[None]) -> None:
        """Wake a sleeper, if it still sleeps."""
        _, task = self._sleepers.pop(wake, (0.0, None))
        if task is not None:
            self._woken.add(task)
        if not wake.done():  # it is if the sleeper was cancelled a moment ago
            wake.set_result(None)

    async def _settle(self) -> None:
        """Wait until each of those who woke sleeps again or has ended."""
        mine = asyncio.current_task()
        while True:
            self._woken = {task for task in self._woken if not (task.done() or task is mine)}
            if not self._woken:
                return
            watcher = self._watch()
            await asyncio.wait({*self._woken, watcher}, return_when=asyncio.FIRST_COMPLETED)
            self._watchers.discard(watcher)

    def _watch(self) -> asyncio.Future[None]:
        """Return a future that is done when somebody goes to sleep."""
        watcher = asyncio.get_running_loop().create_future()
        self._watchers.add(watcher)
        return watcher

    def _tell_watchers(self) -> None:
        for watcher in self._watchers:
            if not watcher.done():
                watcher.set_result(None)
        self._watchers.clear()


def seeded_bytes(seed: int = 0) -> Callable[[int], bytes]:
    """Return a stand-in for `os.urandom` that gives the same bytes for the same *seed*.

    Tokens made from it can be predicted: `Guard(settings, random=seeded_bytes(1))`.
    """
    return random.Random(seed).randbytes  # noqa: S311 - to be predictable is the point
