"""Look-ups that are made together travel together."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, Generic, TypeVar

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
    """Turns what is put in during one turn of the event loop into one call of *carry*.

    *carry* gets up to `LIMIT` at once. Where it is cancelled or raises, *fail* gets the same, and
    why.
    """

    def __init__(
        self,
        carry: Callable[[list[T]], Awaitable[None]],
        fail: Callable[[list[T], BaseException], None],
    ) -> None:
        self._carry = carry
        self._fail = fail
        self._next: list[T] | None = None  # what leaves when its task has its turn
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, one: T) -> None:
        """Have *one* carried from the next turn on."""
        if self._next is None or len(self._next) == LIMIT:
            self._next = []
            task = asyncio.get_running_loop().create_task(self._leave(self._next))
            self._tasks.add(task)
            task.add_done_callback(partial(self._end, self._next))
        self._next.append(one)

    async def _leave(self, batch: list[T]) -> None:
        self._close(batch)
        await self._carry(batch)

    def _end(self, batch: list[T], task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._close(batch)  # cancelled by who cancels all tasks, it may not have left
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            self._fail(batch, error)

    def _close(self, batch: list[T]) -> None:
        if self._next is batch:
            self._next = None
