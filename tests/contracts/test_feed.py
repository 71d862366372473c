"""Facts about one process's place in the feed, on both databases."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import delete, select, update

from tests.support.guards import LONG, installation_of, is_settled, until
from tests.support.keys import create_key, insert_key
from tests.support.servers import ROOT
from tests.support.sql import execute
from tfm_guard.counters import Counters
from tfm_guard.errors import Unavailable
from tfm_guard.freshness import FLOOR_SECONDS, Freshness
from tfm_guard.records import Change
from tfm_guard.store import MARKED, FeedState, Place, Store, Transaction, schema
from tfm_guard.store import Member as Registered
from tfm_guard.testing import ManualClock

LEASE = 2.0
WORKERS = select(schema.workers)


class Member(Freshness):
    """A process that reads the feed when told to, and notes what it hears."""

    def __init__(
        self, store: Store, *, poll_interval: float = LONG, linked_poll_interval: float = LONG
    ) -> None:
        self.clock = ManualClock()
        self.counted = Counters()
        installation = installation_of(lease=LEASE, poll_interval=poll_interval)
        super().__init__(
            store=store,
            clock=self.clock,
            installation=installation._replace(linked_poll_interval=linked_poll_interval),
            random=lambda count: uuid4().bytes[:count],
            counters=self.counted,
        )
        self.heard: list[Change] = []
        self.listen(on_change=self.heard.append, on_flush=lambda: None)

    @property
    def linked(self) -> bool:
        """Whether its link counts."""
        return "not linked" not in repr(self)

    @property
    def recorded(self) -> bool:
        """Whether it has nothing to record any more."""
        return self._recording is None

    async def come_to(self, link: str) -> None:
        """Have a link, and return when it counts."""
        self.link_came(link)
        await until(lambda: is_settled(self), what="the link counts")

    def hear(self) -> None:
        """Have the link answer what is asked now."""
        self.link_answered(self.clock.monotonic())


class Polls:
    """The polls of a store, which can be held up after the database's answer, or refused."""

    def __init__(self, store: Store) -> None:
        self._poll = store.poll
        self._held_up: asyncio.Task[None] | None = None
        self._held = asyncio.Semaphore(0)
        self._let_go = asyncio.Semaphore(0)
        self.answered = 0
        self.failing = False

    async def __call__(self, *args: Any) -> FeedState | None:
        """Poll, and return the answer when it is let through."""
        if self.failing:
            raise Unavailable("a test")
        state = await self._poll(*args)
        self.answered += 1
        if asyncio.current_task() is self._held_up:
            self._held.release()
            await self._let_go.acquire()
        return state

    async def begin(self, member: Member) -> None:
        """Have *member* poll; return when that was answered, and *member* does not know it yet."""
        self._held_up = asyncio.create_task(member.poll())
        await self._held.acquire()

    def more_than(self, count: int) -> bool:
        """Tell whether the database has answered more than *count*."""
        return self.answered > count

    async def next(self) -> None:
        """Let the answer through, and return when the same poll has asked once more."""
        self._let_go.release()
        await self._held.acquire()

    async def end(self) -> None:
        """Let the answer through, and return when it has been applied."""
        assert self._held_up is not None
        self._let_go.release()
        await self._held_up


Wrap = Callable[[Callable[[FeedState | None], FeedState | None]], None]


@pytest.fixture
async def member(store: Store) -> AsyncIterator[Member]:
    """Start a process on an empty feed."""
    member = Member(store)
    await member.start()
    yield member
    await member.stop()


@pytest.fixture
def polls(store: Store, monkeypatch: pytest.MonkeyPatch) -> Polls:
    """Get a hold of the polls that follow."""
    polls = Polls(store)
    monkeypatch.setattr(store, "poll", polls)
    return polls


@pytest.fixture
def change_polls(store: Store, monkeypatch: pytest.MonkeyPatch) -> Wrap:
    """Return what makes polls answer what a function makes of the true answer."""
    poll = store.poll

    def wrap(change: Callable[[FeedState | None], FeedState | None]) -> None:
        async def changed(*args: Any) -> FeedState | None:
            return change(await poll(*args))

        monkeypatch.setattr(store, "poll", changed)

    return wrap


async def bump(store: Store, prefix: str) -> None:
    """Bring a key to its next version, as a change that takes something away does."""
    key = (await store.find_keys([prefix]))[prefix]

    async def change(transaction: Transaction) -> None:
        locked = await transaction.lock_key(key.account_id, key.id)
        assert locked is not None
        await transaction.change_key("revoked", locked, revoked_at=transaction.now)

    await store.transact(change)


def age_changes(url: str, seconds: float) -> None:
    """Make every change in the feed older by *seconds*."""
    changes = schema.changes
    for row in execute(url, select(changes)):
        moment = row.created_at - timedelta(seconds=seconds)
        execute(url, update(changes).where(changes.c.id == row.id).values(created_at=moment))


def forgot(member: Member, *, times: int) -> bool:
    """Tell whether *member* forgot everything so often, and that can be seen from the epoch."""
    return member.epoch == member.counted.flushes == times


async def test_a_process_registers_before_it_polls(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the feed is first read the process is registered, has seen and trusts nothing."""
    member = Member(store)
    poll = store.poll
    at_poll: list[Any] = []

    async def watched(*args: Any) -> FeedState | None:
        at_poll.append((member.is_fresh(), execute(database_url, WORKERS)))
        return await poll(*args)

    monkeypatch.setattr(store, "poll", watched)
    assert not member.is_fresh()
    await member.start()
    ((fresh, (row,)),) = at_poll
    assert not fresh
    assert (row.id, row.seen) == (member.worker_id, 0)
    assert member.is_fresh()
    await member.stop()


async def test_a_process_that_stops_leaves_the_register(
    store: Store, database_url: str, member: Member
) -> None:
    """Stopped, it is struck off and trusts nothing any more; others stay."""
    another = Member(store)
    await another.start()
    await member.stop()
    assert not member.is_fresh()
    assert [row.id for row in execute(database_url, WORKERS)] == [another.worker_id]
    await another.stop()


async def test_a_change_is_applied_by_the_next_poll(store: Store, member: Member) -> None:
    """Changes of other processes are applied in their order, once, and become floors."""
    await create_key(store, "00000001")
    await create_key(store, "00000002")
    await bump(store, "00000001")
    assert (member.heard, member.floor("00000001")) == ([], 0)
    await member.poll()
    assert member.heard == [
        Change(1, "created", "00000001", 1),
        Change(2, "created", "00000002", 1),
        Change(3, "revoked", "00000001", 2),
    ]
    assert (member.floor("00000001"), member.floor("00000002")) == (2, 1)
    await member.poll()
    assert len(member.heard) == 3
    assert forgot(member, times=0)


async def test_a_floor_never_sinks(member: Member) -> None:
    """A change that arrives late or twice lowers no floor."""
    for version in (3, 2, 3, 1):
        member.apply(Change(version, "revoked", "00000001", version))
        assert member.floor("00000001") == 3


async def test_what_was_seen_is_recorded(store: Store, database_url: str, member: Member) -> None:
    """After a poll that found changes the register says how far the process has come."""
    await create_key(store, "00000001")
    await create_key(store, "00000002")
    await member.poll()

    def recorded() -> bool:
        return [row.seen for row in execute(database_url, WORKERS)] == [2]

    await until(recorded, what="the record")
    assert (await store.read_register()).members == {member.worker_id: Registered(2, None)}


async def test_a_lease_ends_without_polls(member: Member) -> None:
    """Memory counts for 2 s after a poll, and not at the end of them."""
    member.clock.advance(1.99)
    assert member.is_fresh()
    member.clock.advance(0.01)
    assert not member.is_fresh()
    await member.poll()
    assert member.is_fresh()


async def test_a_lease_begins_when_the_poll_begins(member: Member, change_polls: Wrap) -> None:
    """A poll that took 1.5 s gives half a second; one that took longer than the lease none."""
    took = 1.5

    def slowly(state: FeedState | None) -> FeedState | None:
        member.clock.advance(took)
        return state

    change_polls(slowly)
    member.clock.advance(3)
    await member.poll()
    assert member.is_fresh()
    member.clock.advance(0.5)
    assert not member.is_fresh()
    took = LEASE
    await member.poll()
    assert not member.is_fresh()


async def test_a_failing_poll_renews_nothing(store: Store, database_url: str) -> None:
    """While the feed cannot be read the process goes on trying, and its lease ends all the same."""
    member = Member(store, poll_interval=0.25)
    await member.start()
    await member.clock.wait_for_sleepers(1)
    execute(database_url, "ALTER TABLE tfm_feed RENAME TO gone")
    await member.clock.pass_time(1.9)
    assert member.is_fresh()
    await member.clock.pass_time(0.2)
    assert not member.is_fresh()
    with pytest.raises(Unavailable):
        await member.poll()
    execute(database_url, "ALTER TABLE gone RENAME TO tfm_feed")
    await member.clock.pass_time(0.3)
    assert member.is_fresh()
    await member.stop()


async def test_a_gap_forgets_everything(store: Store, database_url: str, member: Member) -> None:
    """Where a change is missing everything is forgotten, and those that are there are applied."""
    for number in range(1, 4):
        await create_key(store, f"0000000{number}")
    execute(database_url, delete(schema.changes).where(schema.changes.c.id == 2))
    before = member.database_time()
    await member.poll()
    assert forgot(member, times=1)
    assert [change.id for change in member.heard] == [1, 3]
    assert member.sealed_after >= before
    assert member.is_fresh()
    await member.poll()
    assert forgot(member, times=1)


async def test_a_head_that_went_back_forgets_everything(
    store: Store, database_url: str, member: Member
) -> None:
    """On a feed older than what was seen all is forgotten but the floors; then it goes on."""
    for number in range(1, 4):
        await create_key(store, f"0000000{number}")
    await member.poll()
    execute(database_url, delete(schema.changes).where(schema.changes.c.id > 1))
    execute(database_url, update(schema.feed).values(head=1))
    await member.poll()
    assert forgot(member, times=1)
    assert member.floor("00000003") == 1
    await create_key(store, "00000004")
    await member.poll()
    assert forgot(member, times=1)
    assert member.heard[-1] == Change(2, "created", "00000004", 1)


async def test_a_row_that_is_gone_is_made_anew(
    store: Store, database_url: str, member: Member
) -> None:
    """Struck off, a process forgets everything, registers under another id and misses no change."""
    old = member.worker_id
    await create_key(store, "00000001")
    execute(database_url, delete(schema.workers))
    await member.poll()
    assert forgot(member, times=1)
    assert member.worker_id != old
    assert [row.id for row in execute(database_url, WORKERS)] == [member.worker_id]
    assert member.floor("00000001") == 1
    assert member.is_fresh()
    await member.poll()
    assert forgot(member, times=1)


async def test_a_failed_return_to_the_register_is_made_up_for(
    store: Store, database_url: str, member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If registering anew fails nothing is trusted, and the next poll registers."""
    execute(database_url, delete(schema.workers))
    with monkeypatch.context() as patch:

        async def fail(*_: Any) -> None:
            raise Unavailable("a test")

        patch.setattr(store, "register_worker", fail)
        with pytest.raises(Unavailable):
            await member.poll()
    assert not member.is_fresh()
    await member.poll()
    assert member.is_fresh()
    assert [row.id for row in execute(database_url, WORKERS)] == [member.worker_id]


async def test_forgetting_again_and_again_is_told_at_intervals(
    member: Member, change_polls: Wrap, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that fails to register four times a second says so at once, then every 10 s."""
    change_polls(lambda _: None)
    for _ in range(41):
        with pytest.raises(Unavailable):
            await member.poll()
        member.clock.advance(0.25)
    told = [record.getMessage() for record in caplog.records]
    assert [message[-10:] for message in told if "starts afresh" in message] == [
        " (1 times)",
        "(40 times)",
    ]


async def test_recent_changes_are_floors_from_the_start(store: Store, database_url: str) -> None:
    """A new process knows the changes of the last 20 minutes: entries in Redis may be older."""
    await create_key(store, "00000001")
    age_changes(database_url, FLOOR_SECONDS + 60)
    await create_key(store, "00000002")
    age_changes(database_url, FLOOR_SECONDS - 60)
    await create_key(store, "00000003")
    member = Member(store)
    await member.start()
    assert [member.floor(f"0000000{number}") for number in (1, 2, 3)] == [0, 1, 1]
    await member.stop()


async def test_very_many_recent_changes_are_read_in_parts(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process comes in however many changes there were: no query reads more than a page."""
    monkeypatch.setattr("tfm_guard.store.feed.PAGE", 2)
    for number in range(1, 6):
        await create_key(store, f"0000000{number}")
    member = Member(store)
    await member.start()
    assert [member.floor(f"0000000{number}") for number in range(7)] == [0, 1, 1, 1, 1, 1, 0]
    await member.stop()


async def test_a_floor_ends_after_20_minutes(store: Store, member: Member) -> None:
    """A floor holds for twice the age of the oldest entry after its latest change, then it goes."""
    assert FLOOR_SECONDS == 1200
    await create_key(store, "00000001")
    await create_key(store, "00000002")
    await member.poll()
    member.clock.advance(600)
    member.apply(Change(3, "revoked", "00000002", 2))
    for seconds, floors in ((599.9, (1, 2)), (0.2, (0, 2)), (599.7, (0, 2)), (0.2, (0, 0))):
        member.clock.advance(seconds)
        await member.poll()
        assert (member.floor("00000001"), member.floor("00000002")) == floors


@pytest.mark.parametrize(("seconds", "times"), [(-0.5, 0), (-2.0, 1), (-86_400.0, 1), (3600.0, 0)])
async def test_the_databases_clock_going_back_forgets_everything(
    member: Member, change_polls: Wrap, seconds: float, times: int
) -> None:
    """More than a second back, and everything is forgotten once; forward does no harm."""
    shift = timedelta(seconds=seconds)

    def shifted(state: FeedState | None) -> FeedState | None:
        return state and state._replace(now=state.now + shift)

    change_polls(shifted)
    for _ in range(3):
        await member.poll()
        assert forgot(member, times=times)
        assert member.is_fresh()


async def test_a_read_only_server_renews_no_lease(postgres_store: Store, postgres_url: str) -> None:
    """PostgreSQL that takes no writes may be a stale copy: polls fail, and so the lease ends."""
    member = Member(postgres_store)
    await member.start()
    name = postgres_url.rpartition("/")[2]
    execute(postgres_url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    disconnect = """SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
        WHERE application_name = 'tfm-guard' AND datname = current_database()"""
    execute(postgres_url, disconnect)
    member.clock.advance(1.5)
    for _ in range(2):
        with pytest.raises(Unavailable) as caught:
            await member.poll()
        assert "read-only" in caught.value.reason
    assert member.is_fresh()
    member.clock.advance(0.5)
    assert not member.is_fresh()
    execute(postgres_url, f"SET TRANSACTION READ WRITE; ALTER DATABASE {name} RESET ALL")
    execute(postgres_url, disconnect)
    await member.poll()
    assert member.is_fresh()
    await member.stop()


async def test_many_changes_between_two_polls(store: Store, member: Member) -> None:
    """100 changes of one transaction are all applied, in order."""

    async def many(transaction: Any) -> None:
        for number in range(100):
            await insert_key(transaction, f"{number:08x}")

    await store.transact(many)
    await member.poll()
    assert [change.id for change in member.heard] == list(range(1, 101))
    assert all(member.floor(f"{number:08x}") == 1 for number in range(100))


async def test_a_listener_that_fails_has_everything_forgotten(store: Store, member: Member) -> None:
    """A change that was applied by half is not taken for known: nothing from before is trusted."""
    calls: list[str] = []

    def fail_once(change: Change) -> None:
        calls.append(change.prefix)
        if len(calls) == 1:
            raise RuntimeError("a test")

    member.listen(on_change=fail_once, on_flush=lambda: None)
    await create_key(store, "00000001")
    with pytest.raises(RuntimeError, match="a test"):
        await member.poll()
    assert forgot(member, times=1)
    assert not member.is_fresh()
    await until(member.is_fresh, what="the next poll")
    assert calls == ["00000001"]
    assert forgot(member, times=1)


async def test_a_floor_is_not_prolonged_by_what_is_known(member: Member) -> None:
    """Whoever replays a message for ever does not have its floor kept for ever."""
    change = Change(1, "revoked", "00000001", 2)
    member.apply(change)
    member.clock.advance(FLOOR_SECONDS - 1)
    member.apply(change)
    member.apply(change._replace(version=1))
    member.clock.advance(1)
    await member.poll()
    assert member.floor("00000001") == 0
    assert "floors=0" in repr(member)


async def test_a_write_that_comes_late_changes_nothing(store: Store) -> None:
    """Of what a process says of its place only a higher turn counts, however it is said."""
    for number in range(1, 6):
        await create_key(store, f"0000000{number}")
    worker_id = uuid4()
    await store.register_worker(worker_id, "a test")
    await store.record_place(worker_id, Place(3, "x", 7))
    for late in (Place(5, "y", 7), Place(2, None, 6), Place(5, None, 1)):
        await store.record_place(worker_id, late)
        assert (await store.read_register()).members[worker_id] == Registered(3, "x")
        state = await store.poll(worker_id, late)
        assert state is not None
        assert (state.head, state.turn) == (5, 7)
        assert (await store.read_register()).members[worker_id] == Registered(3, "x")
    await store.record_place(worker_id, Place(2, None, 8))
    assert (await store.read_register()).members[worker_id] == Registered(2, None)


async def test_a_mark_cannot_be_written_over(store: Store) -> None:
    """Struck off, a process can record nothing and finds that it has no place any more."""
    workers = [uuid4() for _ in range(3)]
    for worker_id in workers:
        await store.register_worker(worker_id, "a test")
    behind, ahead, marked = workers
    await store.record_place(behind, Place(1, "x", 1))
    await store.record_place(ahead, Place(2, "x", 1))
    # Only who is still behind is marked, and only who is marked is removed.
    await store.strike_off([behind, ahead], 2, marked=[marked])
    register = (await store.read_register()).members
    assert register == {
        behind: Registered(MARKED, "x"),
        ahead: Registered(2, "x"),
        marked: Registered(0, None),
    }
    await store.record_place(behind, Place(2, None, 9))
    assert await store.poll(behind, Place(0, None, 10)) is None
    assert (await store.read_register()).members == register
    await store.strike_off([], 3, marked=[behind])
    assert {*(await store.read_register()).members} == {ahead, marked}


async def test_what_is_seen_while_a_place_is_recorded_is_recorded_next(
    store: Store, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow the first write was, nobody waits an interval for the second."""
    record, let_go = store.record_place, asyncio.Event()

    async def record_slowly(worker_id: UUID, place: Place) -> None:
        await let_go.wait()
        await record(worker_id, place)

    monkeypatch.setattr(store, "record_place", record_slowly)
    member = Member(store)
    await member.start()
    await create_key(store, "00000001")
    await member.poll()
    assert [change.prefix for change in member.heard] == ["00000001"]
    let_go.set()
    await until(lambda: member.recorded, what="nothing is recorded any more")
    assert [row.seen for row in execute(database_url, WORKERS)] == [1]
    await member.stop()


async def test_a_link_counts_once_the_register_tells_it(database_url: str, member: Member) -> None:
    """It comes, is written down, and then counts: as long as its answers are younger than 2 s."""
    member.link_came("x")
    member.hear()
    assert not member.linked
    await until(lambda: member.linked, what="the link counts")
    assert [row.link for row in execute(database_url, WORKERS)] == ["x"]
    member.clock.advance(5)
    assert not member.is_fresh()
    member.link_answered(member.clock.monotonic() - 0.5)
    member.clock.advance(1.49)
    assert member.is_fresh()
    # An answer to an earlier question takes nothing back.
    member.link_answered(1)
    assert member.is_fresh()
    member.clock.advance(0.02)
    assert not member.is_fresh()


async def test_a_link_that_does_not_count_renews_nothing(member: Member, polls: Polls) -> None:
    """Without a link, or with one that the register does not tell yet, no answer counts."""
    member.hear()
    polls.failing = True
    for _ in range(2):
        member.clock.advance(1.5)
        member.hear()
        assert member.is_fresh() == (member.clock.monotonic() < LEASE)
        member.link_came("x")


async def test_a_poll_from_before_the_link_does_not_make_it_count(
    member: Member, polls: Polls
) -> None:
    """What was published before the link came is in the feed, but not in one read earlier."""
    await polls.begin(member)
    member.link_came("x")
    await polls.end()
    assert not member.linked
    await until(lambda: member.linked, what="the link counts")


async def test_a_lost_link_counts_only_after_another_poll(member: Member, polls: Polls) -> None:
    """What was published in between is in the feed, be it the same server that is back."""
    await member.come_to("x")
    await polls.begin(member)
    for link in ("x", "y", "x"):
        member.link_went()
        assert not member.linked
        member.link_came(link)
        member.hear()
    await polls.end()
    assert not member.linked
    await until(lambda: member.linked, what="the link counts")


async def test_a_lost_link_keeps_its_word(member: Member, polls: Polls) -> None:
    """An answer is good for its 2 s although the link is lost, and no later one is."""
    await member.come_to("x")
    member.clock.advance(10)
    member.hear()
    polls.failing = True
    member.link_went()
    member.clock.advance(1.99)
    assert member.is_fresh()
    member.hear()
    member.clock.advance(0.01)
    assert not member.is_fresh()


async def test_a_link_alone_counts_until_unfed(member: Member) -> None:
    """60 s after the last read of the feed began the link is trusted no more."""
    await member.come_to("x")
    started = member.clock.monotonic()
    for _ in range(59):
        member.clock.advance(1)
        member.hear()
        assert member.is_fresh()
    member.clock.advance(0.99)
    member.hear()
    assert member.is_fresh()
    member.clock.advance(0.01)
    assert member.clock.monotonic() == started + 60
    member.hear()
    assert not member.is_fresh()
    await member.poll()
    assert member.is_fresh()


async def test_a_link_that_comes_back_is_told_again(
    store: Store, database_url: str, member: Member, polls: Polls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost and found again while the database was away, it counts when that is back."""
    await member.come_to("x")
    with monkeypatch.context() as patch:

        async def fail(*_: Any) -> None:
            raise Unavailable("a test")

        patch.setattr(store, "record_place", fail)
        polls.failing = True
        member.link_went()
        member.link_came("x")
        with pytest.raises(Unavailable):
            await member.poll()
    polls.failing = False
    await member.poll()
    await until(lambda: member.linked, what="the link counts")
    assert [row.link for row in execute(database_url, WORKERS)] == ["x"]


async def test_no_poll_under_way_outlives_starting_afresh(member: Member, polls: Polls) -> None:
    """Told to forget everything while it polls, a process trusts its link only after the next."""
    await member.come_to("x")
    await polls.begin(member)
    member.start_afresh()
    assert forgot(member, times=1)
    assert not member.is_fresh()
    await polls.end()
    assert not member.linked
    await until(lambda: member.linked, what="the link counts")
    assert forgot(member, times=1)


async def test_a_poll_that_took_too_long_does_not_make_a_link_count(
    store: Store, member: Member, change_polls: Wrap
) -> None:
    """A read of more than a lease is no read: whoever revokes a key may have waited it out."""
    await create_key(store, "00000001")
    slow = True

    def slowly(state: FeedState | None) -> FeedState | None:
        member.clock.advance(LEASE + 0.01 if slow else 0)
        return state

    change_polls(slowly)
    member.link_came("x")
    with pytest.raises(Unavailable, match="could not be checked"):
        await member.poll()
    assert not member.linked
    assert member.heard == []
    slow = False
    await member.poll()
    await until(lambda: member.linked, what="the link counts")
    assert [change.id for change in member.heard] == [1]


async def test_a_new_place_begins_without_a_link(
    database_url: str, member: Member, polls: Polls
) -> None:
    """Registered anew, a process tells its link in its new place before that counts."""
    await member.come_to("x")
    old = member.worker_id
    execute(database_url, delete(schema.workers))
    await polls.begin(member)
    await polls.next()  # it has no place any more, and so reads the feed again in its new one
    await polls.end()
    assert not member.linked
    assert member.worker_id != old
    await until(lambda: member.linked, what="the link counts")
    (row,) = execute(database_url, WORKERS)
    assert (row.id, row.link) == (member.worker_id, "x")


async def test_with_a_link_the_feed_is_read_less_often(store: Store, polls: Polls) -> None:
    """Every 0.25 s without a link, every second with one, and at once when it comes or goes."""
    member = Member(store, poll_interval=0.25, linked_poll_interval=1)
    await member.start()
    await member.clock.wait_for_sleepers(1)
    counts: list[int] = []
    for change in (member.link_went, partial(member.link_came, "x"), member.link_went):
        before = polls.answered
        change()
        if counts:
            await until(partial(polls.more_than, before), what="a poll")  # time stands still
        await until(lambda: member.linked == (len(counts) == 1), what="the link")
        await member.clock.wait_for_sleepers(1)
        before = polls.answered
        await member.clock.pass_time(4)
        counts.append(polls.answered - before)
    assert counts[0] == 16
    assert 4 <= counts[1] <= 5
    assert 16 <= counts[2] <= 17
    await member.stop()


FORK = """
import asyncio, json, os, sys
from tfm_guard import Guard
from tfm_guard.bearer import as_headers
from tfm_guard.testing import CHEAP_HASHING

async def child(guard, token):
    key = await guard.verify(token)
    warm = guard.recall(as_headers(token.encode())) is not None
    register = (await guard._store.read_register()).members
    mine = guard._parts.verifier._freshness.worker_id
    await guard.close()
    return [key.name, warm, len(register), str(mine)]

async def parent(guard):
    await guard.open()
    created = await guard.keys.create(account_id="acme", name="CI")
    await guard.verify(created.token)
    return created.token, guard._parts.verifier._freshness.worker_id

url = sys.argv[1]
guard = Guard.from_urls(database=url, **CHEAP_HASHING)
loop = asyncio.new_event_loop()
token, mine = loop.run_until_complete(parent(guard))
reading, writing = os.pipe()
pid = os.fork()
if pid == 0:
    with os.fdopen(writing, "w") as pipe:
        remembers = guard.recall(as_headers(token.encode())) is not None
        json.dump([remembers, *asyncio.run(child(guard, token))], pipe)
    os._exit(0)
os.close(writing)
with os.fdopen(reading) as pipe:
    answer = json.load(pipe)
os.waitpid(pid, 0)

async def after():
    key = await guard.verify(token)
    register = (await guard._store.read_register()).members
    await guard.close()
    return [key.name, [str(worker) for worker in register]]

print(json.dumps([str(mine), answer, loop.run_until_complete(after())]))
loop.close()
"""


async def test_a_forked_child_has_a_place_of_its_own(database_url: str) -> None:
    """A child remembers nothing, registers beside its parent, and leaves the parent as it was."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", FORK, database_url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    parent, child, after = json.loads(done.stdout)
    remembers, name, warm, registered, own = child
    assert not remembers
    assert (name, warm, registered) == ("CI", True, 2)
    assert own != parent
    assert after == ["CI", [parent]]
