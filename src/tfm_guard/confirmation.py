"""Confirming a change that takes something away: returning only once nobody acts on the old state.

The change is committed. It is published on the link, and it is in the feed. Each process in the
register is waited for, until one of these holds:

(a) it has acknowledged the change;
(b) the register says that it has read the feed so far;
(c) it cannot trust its memory any more for want of a proof: a lease has passed since the change was
    published on the link that the register has for it, and since the register was first found to
    say so; or only the latter, if it says that there is no link. A proof that came on an earlier
    link is older than what the register says of the next;
(d) it cannot trust its memory any more whatever its link says: it has not read the feed for
    `unfed` seconds.

Which processes there are is in the database: one that comes later reads the feed before it trusts
anything, and is not waited for.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Final
from uuid import UUID

from tfm_guard.clock import Clock
from tfm_guard.errors import NotConfirmed, Unavailable
from tfm_guard.freshness import Freshness
from tfm_guard.link import Acknowledgements, Link
from tfm_guard.records import Change, Revocation
from tfm_guard.store import MARKED, Installation, Member, Register, Store

_log: Final = logging.getLogger(__name__)

# How long a caller waits, in seconds.
CONFIRM_SECONDS: Final = 5.0
# By how many leases a wait is longer than trust can last: room for clocks of different rates.
_MARGIN: Final = 0.5
_FIRST_PAUSE_SECONDS: Final = 0.005
_LONGEST_PAUSE_SECONDS: Final = 0.05
_PUBLISHING_PAUSE_SECONDS: Final = 0.1

# What is waited for: prefixes and versions; and whether it is to be recorded.
_Wait = tuple[frozenset[tuple[str, int]], bool]


class Confirmation:
    """Waits for the processes in the register of *store*, and tells them over *link*, if any."""

    def __init__(
        self,
        *,
        store: Store,
        installation: Installation,
        freshness: Freshness,
        link: Link | None,
        clock: Clock,
    ) -> None:
        self._store = store
        self._freshness = freshness
        self._link = link
        self._clock = clock
        self._lease = installation.lease
        self._unfed = installation.unfed
        self._running: dict[_Wait, asyncio.Task[Revocation]] = {}
        self._next_reading: asyncio.Task[Register | None] | None = None
        self._reading: asyncio.Task[Register | None] | None = None
        self._closed = False

    async def close(self) -> None:
        """Leave off waiting; what is committed stays so."""
        self._closed = True
        waits = (*self._running.values(), self._reading, self._next_reading)
        pending = [task for task in waits if task is not None]
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)

    async def wait(
        self, changes: Sequence[Change], *, confirmed: Callable[[], Awaitable[None]] | None = None
    ) -> Revocation:
        """Return when no process acts on anything older than *changes*, which are committed.

        *confirmed*, if any, is called before, to record it. Those who wait for the same states of
        the same keys wait together. Raises `NotConfirmed` after `CONFIRM_SECONDS`: then the work
        goes on, and can be joined again.
        """
        if not changes:
            return Revocation(how="acknowledged", workers=0, seconds=0.0)
        for change in changes:
            # It may have been committed by another process, or have been cancelled just then.
            self._freshness.apply(change)
        if self._closed:
            raise NotConfirmed
        # Not by their numbers: asking again, they have the number of the latest change.
        states = frozenset((change.prefix, change.version) for change in changes)
        wait = states, confirmed is not None  # else it would not be recorded
        task = self._running.get(wait)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._confirm(changes, confirmed))
            self._running[wait] = task
            task.add_done_callback(lambda _: self._running.pop(wait))
        done = asyncio.Event()
        task.add_done_callback(lambda _: done.set())
        await self._clock.sleep(CONFIRM_SECONDS, unless=done)
        if not task.done() or task.cancelled():
            raise NotConfirmed
        return task.result()

    async def _confirm(
        self, changes: Sequence[Change], confirmed: Callable[[], Awaitable[None]] | None
    ) -> Revocation:
        with contextlib.ExitStack() as stack:
            telling, acknowledged = None, Acknowledgements()
            if self._link is not None:
                message_id, acknowledged = stack.enter_context(self._link.acknowledgements())
                telling = Telling(self._link, message_id, changes, self._clock)
                stack.callback(telling.stop)
            watch = Watch(changes[-1].id, telling, self._clock, self._lease, self._unfed)
            revocation = await self._watch(watch, acknowledged)
        if confirmed is not None:
            with contextlib.suppress(Unavailable):  # then asking again confirms it again
                await confirmed()
        return revocation

    async def _watch(self, watch: "Watch", acknowledged: Acknowledgements) -> Revocation:
        step = _FIRST_PAUSE_SECONDS
        while True:
            asked = self._clock.monotonic()
            register = await self._read_register()
            end = watch.look(register, {self._freshness.worker_id, *acknowledged})
            if end > asked:
                acknowledged.expect(watch.behind)
                left = end - self._clock.monotonic()
                await self._clock.sleep(min(step, max(left, 0)), unless=acknowledged.complete)
                # The same register: who has joined since has read the feed.
                end = watch.look(register, {self._freshness.worker_id, *acknowledged})
            if end <= asked:
                break
            step = min(2 * step, _LONGEST_PAUSE_SECONDS)
        if watch.silent:
            await self._strike_off(watch)
        return Revocation(
            how="acknowledged" if end == -math.inf else "lease",
            workers=len(register.members if register else ()),
            seconds=self._clock.monotonic() - watch.started,
        )

    async def _read_register(self) -> Register | None:
        """Return who is in the register; none where that cannot be read.

        All who wait share one reading at a time, each one that begins after it was asked for.
        """
        if self._next_reading is None:
            self._next_reading = asyncio.get_running_loop().create_task(
                self._read_after(self._reading)
            )
        return await asyncio.shield(self._next_reading)

    async def _read_after(
        self, previous: "asyncio.Task[Register | None] | None"
    ) -> Register | None:
        if previous is not None:
            await asyncio.wait({previous})
        self._reading, self._next_reading = self._next_reading, None
        try:
            return await self._store.read_register()
        except Unavailable:
            return None

    async def _strike_off(self, watch: "Watch") -> None:
        """Strike off processes that were silent all along, so that nobody waits for them for ever.

        They are dead, as a rule. One that is not finds its mark, or is told, forgets everything and
        registers anew; until then it counts as one that has seen nothing. Only who found it marked,
        told it so, and has then waited as long as it can have trusted its memory, removes it.
        """
        _log.warning(
            "not every process confirmed a change, which took %.1f s to be safe for that: %s",
            self._clock.monotonic() - watch.started,
            ", ".join(map(str, watch.silent)),
        )
        with contextlib.suppress(Unavailable):
            await self._store.strike_off(
                watch.silent - watch.marked, watch.change_id, marked=watch.silent & watch.marked
            )


class Watch:
    """Who is waited for, and until when: the rules (a) to (d) for the change *change_id*."""

    def __init__(
        self, change_id: int, telling: "Telling | None", clock: Clock, lease: float, unfed: float
    ) -> None:
        self.change_id = change_id
        self.started = clock.monotonic()
        self.behind: frozenset[UUID] = frozenset()  # who is waited for
        # Who has been in the register since it was first read, and said nothing; and who was found
        # marked then.
        self.silent: frozenset[UUID] = frozenset()
        self.marked: frozenset[UUID] = frozenset()
        self._first = True
        # Of who was in the register when it was first read: the link that it tells now, and since
        # when it was found to, monotonic.
        self._links: dict[UUID, tuple[str | None, float]] = {}
        self._telling = telling
        self._clock = clock
        self._wait = lease * (1 + _MARGIN)
        self._unfed_wait = unfed + lease * _MARGIN

    def look(self, register: Register | None, heard: Collection[UUID]) -> float:
        """Return from when on, monotonic, nobody trusts what is older, as *register* tells it.

        It counts if the register was read after that. It lies in the past for ever if everybody has
        acknowledged, *heard* being those who did so over the link.
        """
        if register is None or register.head < self.change_id:
            # Nor does a server that lacks the change know who has come since: it is a former one.
            return self.started + self._unfed_wait
        members = register.members
        self._note_links(members)
        behind = self.behind = frozenset(
            worker
            for worker in self._links
            if members[worker].seen < self.change_id and worker not in heard
        )
        if self._first:
            self._first = False
            self.silent = behind
            self.marked = frozenset(w for w in behind if members[w].seen == MARKED)
        self.silent &= behind
        if self._telling is not None:
            self._telling.also_tell(self.marked)
        return max(map(self._end_of_trust, behind), default=-math.inf)

    def _note_links(self, register: dict[UUID, Member]) -> None:
        now = self._clock.monotonic()
        if self._first:
            self._links = {worker: (member.link, now) for worker, member in register.items()}
        self._links = {
            worker: (register[worker].link, since if register[worker].link == link else now)
            for worker, (link, since) in self._links.items()
            if worker in register
        }

    def _end_of_trust(self, worker: UUID) -> float:
        unfed = self.started + self._unfed_wait
        link, since = self._links[worker]
        if link is None:
            return min(since + self._wait, unfed)
        if self._telling is None:
            return unfed
        told = self._telling.told(link, worker if worker in self.marked else None)
        return unfed if told is None else min(max(told, since) + self._wait, unfed)


class Telling:
    """Publishes *changes* on *link* until that has worked; and again when there is more to tell."""

    def __init__(
        self, link: Link, message_id: bytes, changes: Sequence[Change], clock: Clock
    ) -> None:
        self._link = link
        self._message_id = message_id
        self._changes = changes
        self._clock = clock
        self._struck_off: frozenset[UUID] = frozenset()
        self._more = asyncio.Event()
        # link -> when the changes had gone out on it, monotonic; and for a process struck off, when
        # the news of that had.
        self._told: dict[tuple[str, UUID | None], float] = {}
        self._task = asyncio.get_running_loop().create_task(self._tell())

    def stop(self) -> None:
        """Leave off."""
        self._task.cancel()

    def also_tell(self, struck_off: Iterable[UUID]) -> None:
        """Tell these processes that they were struck off, too."""
        if news := frozenset(struck_off) - self._struck_off:
            self._struck_off |= news
            self._more.set()

    def told(self, link: str, struck_off: UUID | None = None) -> float | None:
        """Return since when everybody on *link* has been told, be it that one was struck off."""
        return self._told.get((link, struck_off))

    async def _tell(self) -> None:
        while True:
            self._more.clear()
            struck_off = self._struck_off
            try:
                link = await self._link.tell(self._message_id, self._changes, struck_off=struck_off)
            except Exception as error:  # noqa: BLE001  # the feed tells them, too
                _log.debug("a change was not published: %r", error)
                await self._clock.sleep(_PUBLISHING_PAUSE_SECONDS)
                continue
            now = self._clock.monotonic()
            for about in (None, *struck_off):
                self._told.setdefault((link, about), now)
            await self._more.wait()
