"""How long the event loop is held up."""

import asyncio
import time
from types import TracebackType
from typing import Self

_EVERY_SECONDS = 0.001


class Held:
    """Wakes once a millisecond, and keeps by how much it came too late at the most.

    Whatever keeps it waiting counts: a callback that does not return, a thread that holds the
    interpreter's lock, and also a machine that is busy with something else.
    """

    def __init__(self) -> None:
        self.longest = 0.0  # seconds
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch())
        await asyncio.sleep(0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _watch(self) -> None:
        while True:
            due = time.perf_counter() + _EVERY_SECONDS
            await asyncio.sleep(_EVERY_SECONDS)
            self.longest = max(self.longest, time.perf_counter() - due)
