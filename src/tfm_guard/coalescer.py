"""Look-ups that are made together travel together."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Generic, TypeVar

T = TypeVar("T")

# How many keys one look-up asks for at the most.
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
    """Turns the look-ups begun in one turn of the event loop into one call of *load*.

    *load* gets up to `LIMIT` keys and returns what it found; a key it leaves out is not there.
    """

    def __init__(self, load: Callable[[list[str]], Awaitable[Mapping[str, T]]]) -> None:
        self._load = load
        self._waiting: dict[str, Shared[T | None]] = {}
        self._loading: set[asyncio.Task[None]] = set()

    async def get(self, key: str) -> T | None:
        """Return what *load* finds under *key*, read after this call; raise what it raises."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._send)
        shared = self._waiting.get(key)
        if shared is None:
            shared = self._waiting[key] = Shared()
        return await shared.wait()

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, {}
        keys = list(waiting)
        for start in range(0, len(keys), LIMIT):
            batch = {key: waiting[key] for key in keys[start : start + LIMIT]}
            task = asyncio.get_running_loop().create_task(self._answer(batch))
            self._loading.add(task)
            task.add_done_callback(self._loading.discard)

    async def _answer(self, batch: dict[str, Shared[T | None]]) -> None:
        try:
            found = await self._load(list(batch))
        except BaseException as error:
            for shared in batch.values():
                shared.fail(error)
            if not isinstance(error, Exception):
                raise
        else:
            for key, shared in batch.items():
                shared.answer(found.get(key))
