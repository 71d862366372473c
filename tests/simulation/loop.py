"""An event loop of which the world runs one callback at a time."""

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from tests.simulation.timeline import SimClock, Timeline

T = TypeVar("T")


class SimTask(asyncio.Task[T]):
    """A task whose hash is its number, so that the order of a set of tasks can be repeated."""

    def __init__(self, number: int, coro: Any, **options: Any) -> None:
        self.number = number
        super().__init__(coro, **options)

    __eq__ = object.__eq__

    def __hash__(self) -> int:
        return self.number


class SimLoop(asyncio.AbstractEventLoop):
    """The event loop of one life of one process. It never runs by itself."""

    def __init__(
        self, timeline: Timeline, clock: SimClock, on_error: Callable[[dict[str, Any]], None]
    ) -> None:
        self.ready: deque[asyncio.Handle] = deque()
        self._tasks: list[SimTask[Any]] = []
        self._timeline = timeline
        self._clock = clock
        self._on_error = on_error
        self._numbers = itertools.count()
        self._closed = False

    def run_one(self) -> None:
        """Run the callback that has been ready for the longest time."""
        handle = self.ready.popleft()
        if handle.cancelled():
            return
        asyncio._set_running_loop(self)  # noqa: SLF001  # what makes it the loop of its tasks
        try:
            handle._run()  # noqa: SLF001  # as asyncio's own loops do
        finally:
            asyncio._set_running_loop(None)  # noqa: SLF001

    def crash(self) -> None:
        """End everything without another word from it."""
        self._closed = True
        self.ready.clear()
        for task in self.live_tasks():
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001
            # What its `finally` clauses do reaches nothing: the process has no connections left.
            with contextlib.suppress(BaseException):
                coroutine: Any = task.get_coro()
                coroutine.close()
        self._tasks.clear()

    def live_tasks(self) -> list[SimTask[Any]]:
        """Return the tasks that have not ended, the oldest first."""
        self._tasks = [task for task in self._tasks if not task.done()]
        return self._tasks

    # What asyncio's own parts ask of a loop.

    def time(self) -> float:
        return self._clock.monotonic()

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self._closed

    def is_closed(self) -> bool:
        return self._closed

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task: SimTask[Any] = SimTask(next(self._numbers), coro, loop=self, **options)
        self._tasks.append(task)
        return task

    def call_soon(  # type: ignore[override]  # as loose as asyncio's own
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        if not self._closed:
            self.ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]  # as above

    def call_later(  # type: ignore[override]  # as above
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]  # as above
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._timeline.at(self._clock.time_of(when), self._come_due, handle, timer=handle)
        return handle

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._closed:
            self._on_error(context)

    def _come_due(self, handle: asyncio.TimerHandle) -> None:
        if not self._closed:
            self.ready.append(handle)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: the timeline leaves out what was called off."""


def new_loop(
    timeline: Timeline, clock: SimClock, on_error: Callable[[dict[str, Any]], None]
) -> SimLoop:
    """Return a new loop, of which nobody asks for sockets, signals or subprocesses."""
    return SimLoop(timeline, clock, on_error)  # type: ignore[abstract]  # that is what it lacks
