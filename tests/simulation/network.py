"""Messages between processes and servers: they travel, and may be late or lost."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from tests.simulation.timeline import Timeline

if TYPE_CHECKING:
    from tests.simulation.process import Process

T = TypeVar("T")


class Postponed(Exception):
    """Raised by a server that will see to a request at *until*."""

    def __init__(self, until: float) -> None:
        self.until = until


class Network:
    """Who can reach whom, and how long it takes."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._random = timeline.random
        self.seconds = self._random.choice((0.0005, 0.002, 0.02))  # what a message takes, typically
        self.slow = self._random.choice((0.0, 0.05, 0.3))  # how many take far longer,
        self.longest = self._random.choice((0.2, 0.8, 2.0))  # up to so many seconds
        self.silent: set[tuple[str, str]] = set()  # process and server: messages vanish
        self.refused: set[tuple[str, str]] = set()  # process and server: connections fail at once
        self.losing: set[tuple[str, str]] = set()  # process and server: some messages vanish

    def heal(self) -> None:
        """Bring every message through, in good time."""
        self.silent.clear()
        self.refused.clear()
        self.losing.clear()
        self.seconds = 0.001
        self.slow = 0.0

    def ask(self, process: "Process", server: str, execute: Callable[[], T]) -> "asyncio.Future[T]":
        """Have *server* execute a request of *process*, and return what will hold the answer.

        The request or the answer may be lost; then there is never one.
        """
        if process.loop.is_closed():
            raise ConnectionError("this process has ended")
        answer: asyncio.Future[T] = process.loop.create_future()
        if (process.name, server) in self.refused:
            self._deliver(
                process, server, answer, None, ConnectionRefusedError("connection refused")
            )
        else:
            self._timeline.after(self.delay(), self._arrive, process, server, execute, answer)
        return answer

    def delay(self) -> float:
        """Return how long one message takes."""
        if self._random.random() < self.slow:
            return self._random.uniform(0.0, self.longest)
        return self.seconds * self._random.uniform(0.2, 3.0)

    def is_lost(self, process: str, server: str) -> bool:
        """Tell whether a message that arrives now between these two does so."""
        if (process, server) in self.losing and self._random.random() < 0.3:
            return True
        return self.is_cut(process, server)

    def is_cut(self, process: str, server: str) -> bool:
        """Tell whether nothing passes between these two."""
        return (process, server) in self.silent or (process, server) in self.refused

    def _arrive(
        self,
        process: "Process",
        server: str,
        execute: Callable[[], Any],
        answer: "asyncio.Future[Any]",
    ) -> None:
        if self.is_lost(process.name, server):
            return
        result, error = None, None
        try:
            result = execute()
        except Postponed as postponed:
            self._timeline.at(postponed.until, self._arrive, process, server, execute, answer)
            return
        except Exception as raised:  # noqa: BLE001  # it is the answer
            error = raised
        self._timeline.after(self.delay(), self._deliver, process, server, answer, result, error)

    def _deliver(
        self,
        process: "Process",
        server: str,
        answer: "asyncio.Future[Any]",
        result: Any,
        error: Exception | None,
    ) -> None:
        if answer.done() or process.loop.is_closed():
            return
        if not isinstance(error, ConnectionRefusedError) and self.is_lost(process.name, server):
            return
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error)
