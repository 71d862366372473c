"""Look-ups that are made together travel together."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Generic, TypeVar

T = TypeVar("T")

# How many keys one look-up asks for at the most.
LIMIT: Final = 256


class Coalescer(Generic[T]):
    """Turns the look-ups begun in one turn of the event loop into one call of *load*.

    *load* gets up to `LIMIT` keys and returns what it found; a key it leaves out is not there.
    """

    def __init__(self, load: Callable[[list[str]], Awaitable[Mapping[str, T]]]) -> None:
        self._load = load
        self._waiting: dict[str, asyncio.Future[T | None]] = {}
        self._loading: set[asyncio.Task[None]] = set()

    async def get(self, key: str) -> T | None:
        """Return what *load* finds under *key*, read after this call; raise what it raises."""
        future = self._waiting.get(key)
        if future is None:
            loop = asyncio.get_running_loop()
            if not self._waiting:
                loop.call_soon(self._send)
            future = self._waiting[key] = loop.create_future()
        # Shielded: others may wait for the same future.
        return await asyncio.shield(future)

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, {}
        keys = list(waiting)
        for start in range(0, len(keys), LIMIT):
            batch = {key: waiting[key] for key in keys[start : start + LIMIT]}
            task = asyncio.get_running_loop().create_task(self._answer(batch))
            self._loading.add(task)
            task.add_done_callback(self._loading.discard)

    async def _answer(self, batch: dict[str, asyncio.Future[T | None]]) -> None:
        try:
            found = await self._load(list(batch))
        except BaseException as error:
            for future in batch.values():
                future.set_exception(error)
                future.exception()  # seen, should nobody be waiting any more
            if not isinstance(error, Exception):
                raise
        else:
            for key, future in batch.items():
                future.set_result(found.get(key))
