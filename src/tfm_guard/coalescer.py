"""Look-ups that are made together travel together."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

# How many look-ups travel together at the most.
LIMIT: Final = 256


class Shared(Generic[T]):
    """An answer that several wait for, each by a future of their own.

    Who is cancelled so takes nobody along, which with one future for all `asyncio.shield` would see
    to, at the price of three more turns of the event loop for each who waits.
    """

    __slots__ = ("_futures",)

    def __init__(self) -> None:
        self._futures: list[asyncio.Future[T]] = []

    def wait(self) -> "asyncio.Future[T]":
        """Return a future of the answer, to be waited for by one."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._futures.append(future)
        return future

    def answer(self, answer: T) -> None:
        """Give *answer* to all who still wait."""
        for future in self._futures:
            if not future.done():
                future.set_result(answer)

    def fail(self, error: BaseException) -> None:
        """Raise *error* for all who still wait."""
        for future in self._futures:
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen, should the one who waits end otherwise


class Coalescer(Generic[T]):
    """Turns what is put in during one turn of the event loop into one task, that of *carry*.

    *carry* gets up to `LIMIT` at once, and must not raise: it is for those that it gets to know.
    """

    def __init__(self, carry: Callable[[list[T]], Coroutine[Any, Any, None]]) -> None:
        self._carry = carry
        self._waiting: list[T] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, one: T) -> None:
        """Have *one* carried from the next turn on."""
        if not self._waiting:
            self._spawn(self._send())
        self._waiting.append(one)

    async def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for start in range(LIMIT, len(waiting), LIMIT):
            self._spawn(self._carry(waiting[start : start + LIMIT]))
        await self._carry(waiting[:LIMIT])

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
