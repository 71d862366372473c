"""Live connections: what was let in and goes on, for as long as its key holds.

A request is over in a moment; a WebSocket may last for days. So each is ended in the same step in
which the revocation of its key is applied, and wherever this process cannot be sure of hearing of
that, what passes over the connection is looked into like a request.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import chain
from typing import Final

from tfm_guard.clock import Clock
from tfm_guard.errors import InvalidToken, Refusal, Unavailable
from tfm_guard.freshness import Freshness
from tfm_guard.records import Change, VerifiedKey

Holds = Callable[[VerifiedKey], Awaitable[bool]]

# Between two attempts to learn whether the key of an idle connection holds.
_PAUSE_SECONDS: Final = 1.0


class Ended(OSError):
    """Nothing passes over this connection any more. ASGI's own kind of error for that."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(f"the connection was ended by the guard: {refusal.reason}")


class LiveConnection:
    """A connection that was let in with *key*; *refusal* says why it has ended, if it has.

    *on_end* is called with that once, in the step in which it ends.
    """

    def __init__(self, key: VerifiedKey, freshness: Freshness, holds: Holds) -> None:
        self.refusal: Refusal | None = None
        self.on_end: Callable[[Refusal], None] | None = None
        self._key = key
        self._expires = key.expires_at is not None
        self._freshness = freshness
        self._holds = holds
        self._limits: set[asyncio.Timeout] = set()
        self._released = False
        # How often its key may have changed unnoticed, and how many of these a look has cleared up.
        # The first: between verifying and here.
        self._doubts = 1
        self._cleared = 0

    def __repr__(self) -> str:
        return f"LiveConnection({self._key!r}, {self.refusal or 'live'!r})"

    @property
    def doubtful(self) -> bool:
        """Whether the key may have changed since it was last looked at."""
        live = self.refusal is None and not self._released
        return live and self._cleared < self._doubts

    async def check(self) -> None:
        """Return if the key holds now; else, or if that cannot be known, end. Raises `Ended`."""
        if self.refusal is None and (
            self.doubtful or self._expires or not self._freshness.is_fresh()
        ):
            try:
                await self.look()
            except Unavailable as error:
                self.end(error)
        if self.refusal is not None:
            raise Ended(self.refusal)

    async def look(self) -> None:
        """Ask whether the key holds, and end if it does not. Raises `Unavailable`."""
        while self.refusal is None:
            doubts = self._doubts
            if not await self._holds(self._key):
                self.end(InvalidToken("revoked or expired while connected"))
            self._cleared = doubts
            if doubts == self._doubts:  # else it may have changed since that question was asked
                break

    def doubt(self) -> None:
        """Let nothing pass before the key was looked at again."""
        self._doubts += 1
        self._expires = True  # it may have been given an end

    def end(self, refusal: Refusal) -> None:
        """Let nothing pass any more, and break off what waits to."""
        if self.refusal is not None or self._released:
            return
        self.refusal = refusal
        for limit in self._limits:
            limit.reschedule(0)
        if self.on_end is not None:
            self.on_end(refusal)

    def release(self) -> None:
        """Let go on to its end what is left: nothing of that reaches the client."""
        self._released = True

    @asynccontextmanager
    async def until_end(self) -> AsyncIterator[None]:
        """Break the block off when the connection ends. Raises `Ended` then, and if it has."""
        if self.refusal is not None:
            raise Ended(self.refusal)
        try:
            async with asyncio.timeout(None) as limit:
                self._limits.add(limit)
                try:
                    yield
                finally:
                    self._limits.discard(limit)
        except TimeoutError:
            if self.refusal is None:
                raise
            raise Ended(self.refusal) from None


class LiveConnections:
    """The live connections of this process, by the prefix of their keys."""

    def __init__(self, *, freshness: Freshness, holds: Holds, clock: Clock) -> None:
        self._freshness = freshness
        self._holds = holds
        self._clock = clock
        self._by_prefix: defaultdict[str, set[LiveConnection]] = defaultdict(set)
        self._looks: set[asyncio.Task[None]] = set()
        freshness.listen(on_change=self._apply, on_flush=self._doubt_all)

    def __repr__(self) -> str:
        return f"LiveConnections({len(self)})"

    def __len__(self) -> int:
        return sum(map(len, self._by_prefix.values()))

    async def close(self) -> None:
        """End all connections: nobody would hear of changes any more."""
        for connection in self._all():
            connection.end(Unavailable("the guard is closed"))
        for look in self._looks:
            look.cancel()
        if self._looks:
            await asyncio.wait(self._looks)

    @contextmanager
    def watch(self, key: VerifiedKey) -> Iterator[LiveConnection]:
        """Yield a connection that ends with *key*.

        The key may have changed since it was verified: `check` before relying on it.
        """
        connection = LiveConnection(key, self._freshness, self._holds)
        prefix = key.key_prefix
        self._by_prefix[prefix].add(connection)
        try:
            yield connection
        finally:
            connection.release()
            self._by_prefix[prefix].remove(connection)
            if not self._by_prefix[prefix]:
                del self._by_prefix[prefix]

    def _all(self) -> list[LiveConnection]:
        return list(chain.from_iterable(self._by_prefix.values()))

    def _apply(self, change: Change) -> None:
        connections = self._by_prefix.get(change.prefix, ())
        if change.kind in {"revoked", "suspended"}:
            for connection in connections:
                connection.end(InvalidToken(f"{change.kind} while connected"))
        else:
            # The news of its creation, for one, may come after the key itself.
            self._doubt(connections)

    def _doubt_all(self) -> None:
        self._doubt(self._all())

    def _doubt(self, connections: Iterable[LiveConnection]) -> None:
        for connection in connections:
            was_doubtful = connection.doubtful
            connection.doubt()
            if connection.doubtful and not was_doubtful:  # else somebody looks, and looks again
                look = asyncio.get_running_loop().create_task(self._look(connection))
                self._looks.add(look)
                look.add_done_callback(self._looks.discard)

    async def _look(self, connection: LiveConnection) -> None:
        """Look until it is known whether the key holds, for a connection that may be idle."""
        while connection.doubtful:
            try:
                await connection.look()
            except Unavailable:
                await self._clock.sleep(_PAUSE_SECONDS)
