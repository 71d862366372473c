"""Live connections: what was let in and goes on, for as long as its key holds.

A request is over in a moment; a WebSocket may last for days. So each is ended in the same step in
which a change of its key is applied, and where this process cannot know of changes, whatever passes
over the connection is looked into like a request.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

from tfm_guard.errors import Unavailable
from tfm_guard.freshness import Freshness
from tfm_guard.records import Change, VerifiedKey

Holds = Callable[[VerifiedKey], Awaitable[bool]]


class LiveConnection:
    """A connection that was let in with *key*. *ended* is set once the key holds no more."""

    def __init__(self, key: VerifiedKey, freshness: Freshness, holds: Holds) -> None:
        self.key = key
        self.ended = asyncio.Event()
        self._freshness = freshness
        self._holds = holds
        self._epoch = freshness.epoch  # in another one, changes may have been missed

    def __repr__(self) -> str:
        return f"LiveConnection({self.key!r}, {'ended' if self.ended.is_set() else 'live'})"

    async def passes(self) -> bool:
        """Tell whether the key holds now. Raises `Unavailable`."""
        sure = self._freshness.is_fresh() and self._freshness.epoch == self._epoch
        if not sure or self.key.expires_at is not None:
            await self.look()
        return not self.ended.is_set()

    async def look(self) -> None:
        """Ask whether the key still holds, and end if it does not. Raises `Unavailable`."""
        epoch = self._freshness.epoch
        if not await self._holds(self.key):
            self.ended.set()
        self._epoch = epoch


class LiveConnections:
    """The live connections of this process, by the prefix of their keys."""

    def __init__(self, *, freshness: Freshness, holds: Holds) -> None:
        self._freshness = freshness
        self._holds = holds
        self._by_prefix: defaultdict[str, dict[LiveConnection, None]] = defaultdict(dict)
        self._looks: set[asyncio.Task[None]] = set()
        freshness.listen(on_change=self._end, on_flush=self._look_at_all)

    def __len__(self) -> int:
        return sum(map(len, self._by_prefix.values()))

    @contextmanager
    def watch(self, key: VerifiedKey) -> Iterator[LiveConnection]:
        """Yield a connection that ends with *key*.

        The key may have changed since it was verified: ask `look` before relying on it.
        """
        connection = LiveConnection(key, self._freshness, self._holds)
        self._by_prefix[key.key_prefix][connection] = None
        try:
            yield connection
        finally:
            del self._by_prefix[key.key_prefix][connection]
            if not self._by_prefix[key.key_prefix]:
                del self._by_prefix[key.key_prefix]

    def _end(self, change: Change) -> None:
        for connection in self._by_prefix.get(change.prefix, ()):
            connection.ended.set()

    def _look_at_all(self) -> None:
        for connections in self._by_prefix.values():
            for connection in connections:
                look = asyncio.get_running_loop().create_task(self._look(connection))
                self._looks.add(look)
                look.add_done_callback(self._looks.discard)

    async def _look(self, connection: LiveConnection) -> None:
        # Where nothing can be known now, it is asked when something passes over the connection.
        with suppress(Unavailable):
            await connection.look()
