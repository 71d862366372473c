"""Freshness: until when this process may believe what it remembers.

The truth is the database. Each change of a key is a row of its feed; this process reads the feed at
an interval, applies what is new, and for `lease` seconds from the start of that read may answer
from memory. A process that cannot read the feed thus stops believing itself.

With Redis there is also the link, on which changes arrive as they are made. An answer on it proves
that all that was published before the question has been handled, so it gives a lease too, but only
while

* the process came to the link before it last began to read the feed: what was published earlier is
  in the feed;
* the register says which link that is, for whoever revokes a key to publish on that one, or to know
  that it could not;
* the feed was read within `unfed` seconds: whoever revokes a key and can reach neither the link nor
  the process waits that long.

Changes may arrive early, or twice, or in another order; applying one is idempotent.
"""

import asyncio
import contextlib
import logging
import math
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Final
from uuid import UUID

from tfm_guard.clock import Clock
from tfm_guard.counters import Counters
from tfm_guard.errors import Unavailable
from tfm_guard.outages import Seldom
from tfm_guard.records import Change
from tfm_guard.shared_cache import MAX_AGE_SECONDS
from tfm_guard.store import FeedState, Installation, Place, Store

_log: Final = logging.getLogger(__name__)

# An entry older than a change can be around for `MAX_AGE_SECONDS` after it; twice that leaves room
# for clocks that do not agree.
FLOOR_SECONDS: Final = 2 * MAX_AGE_SECONDS
# The database's clock went back if it reads this much less than what has passed would have it.
_STEP_SECONDS: Final = 1.0
_NOBODY: Final = UUID(int=0)


class Freshness:
    """One process's place in the feed, and the lease that reading it or hearing of it gives.

    The times that all processes must agree on are those of the *installation*.
    """

    def __init__(
        self,
        *,
        store: Store,
        installation: Installation,
        clock: Clock,
        random: Callable[[int], bytes],
        counters: Counters,
    ) -> None:
        # Memory counts while the monotonic clock is below this. Read on every request.
        self.fresh_until = -math.inf
        # Moves whenever everything was forgotten, so that a read begun before is not kept.
        self.epoch = 0
        # Entries sealed before this, in the database's time, may have missed a change.
        self.sealed_after = -math.inf
        self._store = store
        self._installation = installation
        self._clock = clock
        self._random = random
        self._counters = counters
        self._forgetting = Seldom(clock)
        self.worker_id = _NOBODY  # in the register; another one whenever it registers anew
        self._entered: UUID | None = None  # a row in the register that nothing has come of yet
        self._seen = 0
        self._link: str | None = None
        self._turn = 0
        self._link_turn = 0  # the first turn in which the link could be told
        self._recorded: tuple[int, str | None] | None = None  # what the register surely has
        self._recording: asyncio.Task[None] | None = None
        self._polling = asyncio.Lock()
        self._poll_soon = asyncio.Event()
        self._feed = -math.inf  # when the last applied read of the feed began, monotonic
        self._link_counts = False
        self._heard = -math.inf  # when what was last answered on the link was asked, monotonic
        # prefix -> version, and the monotonic time at which it has served its time
        self._floors: dict[str, tuple[int, float]] = {}
        self._floor_ends: deque[tuple[float, str]] = deque()
        # The database's time, seconds since 1970, and the monotonic time just before it was read.
        self._anchor = (0.0, 0.0)
        self._on_change: list[Callable[[Change], None]] = []
        self._on_flush: list[Callable[[], None]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        left = self.fresh_until - self._clock.monotonic()
        state = f"fresh for {left:.2f} s" if left > 0 else "not fresh"
        link = "linked" if self._link_counts else "not linked"
        return f"Freshness({state}, {link}, seen={self._seen}, floors={len(self._floors)})"

    def listen(self, *, on_change: Callable[[Change], None], on_flush: Callable[[], None]) -> None:
        """Call *on_change* with every change as it is applied, *on_flush* when all is forgotten."""
        self._on_change.append(on_change)
        self._on_flush.append(on_flush)

    async def start(self) -> None:
        """Register this process, read the feed, and go on reading it. Raises `Unavailable`."""
        await self._join()
        self._spawn(self._poll_for_ever())

    async def stop(self) -> None:
        """Stop trusting memory, and strike this process off the register."""
        self.fresh_until = -math.inf
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        with contextlib.suppress(Unavailable):
            await self._store.unregister_worker(self.worker_id)
            if self._entered is not None:
                await self._store.unregister_worker(self._entered)

    def is_fresh(self) -> bool:
        """Tell whether memory counts now."""
        return self._clock.monotonic() < self.fresh_until

    def floor(self, prefix: str) -> int:
        """Return the version below which nothing about *prefix* is to be believed."""
        return self._floors.get(prefix, (0, 0.0))[0]

    def database_time(self) -> float:
        """Return the database's time in seconds since 1970, as far as this process can tell."""
        wall, monotonic = self._anchor
        return wall + (self._clock.monotonic() - monotonic)

    def apply(self, change: Change) -> None:
        """Raise the floor and have everything older about the key forgotten, in one step."""
        if change.version <= self.floor(change.prefix):
            return  # known: since then nothing older was believed, or kept
        end = self._clock.monotonic() + FLOOR_SECONDS
        self._floors[change.prefix] = change.version, end
        self._floor_ends.append((end, change.prefix))
        try:
            for listener in self._on_change:
                listener(change)
        except Exception:
            # The floor would have the change pass for known from now on, and it may not be.
            self.start_afresh()
            raise

    def link_came(self, link: str) -> None:
        """Note that from now on changes arrive on *link*.

        It counts once the register says so, and the feed has been read after that.
        """
        self._link = link
        self._heard = -math.inf
        self._discount_link()
        self._poll_soon.set()

    def link_went(self) -> None:
        """Note that changes arrive no more."""
        if self._link is None:
            return
        self._link = None
        self._link_counts = False
        self._poll_soon.set()

    def link_answered(self, asked: float) -> None:
        """Note that what was published before *asked*, monotonic, has been handled."""
        self._heard = max(self._heard, asked)
        self._renew()

    def start_afresh(self) -> None:
        """Forget everything, and trust nothing until the feed has been read."""
        self._forget_everything()
        self._discount_link()  # nor after a read that is under way
        self._poll_soon.set()

    async def poll(self) -> None:
        """Read the feed once, apply what is new, and renew the lease. Raises `Unavailable`."""
        async with self._polling:
            self._poll_soon.clear()
            place = Place(self._seen, self._link, self._next_turn())
            started = self._clock.monotonic()
            state = await self._store.poll(self.worker_id, place)
            changes = None if state is None else await self._new_changes(state)
            if state is None or changes is None:
                self._forget_everything()
                await self._join()
                return
            if self._clock.monotonic() - started > self._installation.lease:
                # Whoever revokes a key relies on it that after a lease the register has what is.
                raise Unavailable("reading the feed took longer than that counts")
            self._set_anchor(state, started)
            for change in changes:
                self.apply(change)
            self._drop_ended_floors()
            if state.turn == place.turn:
                self._note_recorded(place)
            self._advance(state, started)

    async def _join(self) -> None:
        """Enter the register, then read the feed: only then is there anything to trust."""
        worker_id = await self._enter_register()
        started = self._clock.monotonic()
        state = await self._store.poll(worker_id, Place(0, self._link, self._next_turn()))
        if state is None:
            self._entered = None
            raise Unavailable("this process cannot find itself in the register")
        # The shared cache may hold entries that are older than changes made before this process
        # came: their floors are needed from the start.
        recent = await self._store.recent_changes(state, FLOOR_SECONDS)
        self._anchor = (state.now.timestamp(), started)
        for change in recent:
            self.apply(change)
        former, self.worker_id = self.worker_id, worker_id
        self._entered = None
        self._discount_link()  # what was told before, was of the former place
        self._advance(state, started)
        # Nothing is remembered any more that the former place in the register stood for.
        if former != _NOBODY:
            with contextlib.suppress(Unavailable):
                await self._store.unregister_worker(former)

    async def _enter_register(self) -> UUID:
        """Return the id of a new row, or of one where joining came no further: one is enough."""
        if self._entered is None:
            worker_id = UUID(bytes=self._random(16), version=4)
            await self._store.register_worker(worker_id, f"{socket.gethostname()}:{os.getpid()}")
            self._entered = worker_id
        return self._entered

    def _discount_link(self) -> None:
        """Let the link not count until the register was told of it anew, and the feed read then."""
        self._link_turn = self._turn + 1
        self._link_counts = False
        self._recorded = None

    def _note_recorded(self, place: Place) -> None:
        if place.turn >= self._link_turn:
            self._recorded = place.seen, place.link

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn

    def _advance(self, state: FeedState, started: float) -> None:
        """Take note of a read of the feed that began at *started*, monotonic, and is applied."""
        self._seen = state.head
        self._feed = started
        if self._link is not None and state.turn >= self._link_turn:
            self._link_counts = True
        self._renew()
        self._record_soon()

    def _renew(self) -> None:
        times = self._installation
        until = self._feed + times.lease
        if self._link_counts:
            until = max(until, min(self._heard + times.lease, self._feed + times.unfed))
        # Never back: a promise that was good once is good to its end, if the link is lost or not.
        self.fresh_until = max(self.fresh_until, until)

    async def _new_changes(self, state: FeedState) -> list[Change] | None:
        """Return the changes that are new, in their order; none if they cannot all be had."""
        if state.head == self._seen:
            return []
        changes = await self._store.changes_between(self._seen, state.head)
        if len(changes) == state.head - self._seen:
            return changes
        # Some were removed before they were read here, or the database was set back.
        _log.error("the feed led from %d to %d by %d changes", self._seen, state.head, len(changes))
        return None

    def _set_anchor(self, state: FeedState, started: float) -> None:
        expected = self.database_time() - (self._clock.monotonic() - started)
        self._anchor = (state.now.timestamp(), started)
        if state.now.timestamp() < expected - _STEP_SECONDS:
            _log.error("the database's clock went back by %.1f s", expected - self._anchor[0])
            self._forget_everything()

    def _forget_everything(self) -> None:
        """Forget all that is remembered, but for the floors, which only ever refuse."""
        if count := self._forgetting.due():  # a process that fails to join comes here at each poll
            _log.warning(
                "this process forgets what it remembers, and starts afresh (%d times)", count
            )
        self._counters.flushes += 1
        self.fresh_until = self._feed = self._heard = -math.inf
        self._link_counts = False
        self.epoch += 1
        self.sealed_after = self.database_time()
        for listener in self._on_flush:
            listener()

    def _drop_ended_floors(self) -> None:
        now = self._clock.monotonic()
        while self._floor_ends and self._floor_ends[0][0] <= now:
            end, prefix = self._floor_ends.popleft()
            if self._floors.get(prefix, (0, now))[1] <= end:  # else a later change prolonged it
                self._floors.pop(prefix, None)

    async def _poll_for_ever(self) -> None:
        failing = False
        while True:
            await self._clock.sleep(self._interval(), unless=self._poll_soon)
            try:
                await self.poll()
            except Exception as error:  # noqa: BLE001  # the lease ends by itself; this must not
                if not failing:
                    _log.error("the feed cannot be read: %r", error)
                failing = True
            else:
                if failing:
                    _log.warning("the feed can be read again")
                failing = False

    def _interval(self) -> float:
        times = self._installation
        return times.linked_poll_interval if self._link_counts else times.poll_interval

    def _record_soon(self) -> None:
        # As often as it takes: until it is recorded, whoever revokes a key waits for this process.
        if self._recorded != (self._seen, self._link) and self._recording is None:
            self._recording = self._spawn(self._record())

    async def _record(self) -> None:
        recorded: tuple[UUID, int, str | None] | None = None
        try:
            with contextlib.suppress(Unavailable):  # then the next read of the feed has it recorded
                # Again, if there was more to record before this came through.
                while recorded != (current := (self.worker_id, self._seen, self._link)):
                    worker_id, seen, link = recorded = current
                    place = Place(seen, link, self._next_turn())
                    await self._store.record_place(worker_id, place)
                    if worker_id == self.worker_id:
                        self._note_recorded(place)
                        if self._link is not None and not self._link_counts:
                            self._poll_soon.set()
        finally:
            self._recording = None

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
