"""Facts about one process's place in the feed, on both databases."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import delete, select, update

from tests.support.guards import LONG, installation_of, until
from tests.support.keys import create_key, insert_key
from tests.support.servers import ROOT
from tests.support.sql import execute
from tfm_guard.counters import Counters
from tfm_guard.errors import Unavailable
from tfm_guard.freshness import FLOOR_SECONDS, Freshness
from tfm_guard.records import Change
from tfm_guard.store import FeedState, Store, schema
from tfm_guard.store import Member as Registered
from tfm_guard.testing import ManualClock

LEASE = 2.0
WORKERS = select(schema.workers)


class Member(Freshness):
    """A process that reads the feed when told to, and notes what it hears."""

    def __init__(self, store: Store, *, poll_interval: float = LONG) -> None:
        self.clock = ManualClock()
        self.counted = Counters()
        super().__init__(
            store=store,
            clock=self.clock,
            installation=installation_of(lease=LEASE, poll_interval=poll_interval),
            random=lambda count: uuid4().bytes[:count],
            counters=self.counted,
        )
        self.heard: list[Change] = []
        self.listen(on_change=self.heard.append, on_flush=lambda: None)


Wrap = Callable[[Callable[[FeedState | None], FeedState | None]], None]


@pytest.fixture
async def member(store: Store) -> AsyncIterator[Member]:
    """Start a process on an empty feed."""
    member = Member(store)
    await member.start()
    yield member
    await member.stop()


@pytest.fixture
def change_polls(store: Store, monkeypatch: pytest.MonkeyPatch) -> Wrap:
    """Return what makes polls answer what a function makes of the true answer."""
    poll = store.poll

    def wrap(change: Callable[[FeedState | None], FeedState | None]) -> None:
        async def changed(*args: Any) -> FeedState | None:
            return change(await poll(*args))

        monkeypatch.setattr(store, "poll", changed)

    return wrap


async def bump(store: Store, prefix: str, version: int) -> None:
    """Bring a key to *version*, as a change that takes something away does."""
    key = (await store.find_keys([prefix]))[prefix]
    await store.transact(lambda t: t.revoke_key(key.id, prefix, version))


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
    await bump(store, "00000001", 2)
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
    assert await store.read_register() == {member.worker_id: Registered(2, None)}


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


FORK = """
import asyncio, json, os, sys
from tfm_guard import Guard
from tfm_guard.bearer import as_headers
from tfm_guard.testing import CHEAP_HASHING

async def child(guard, token):
    key = await guard.verify(token)
    warm = guard.recall(as_headers(token.encode())) is not None
    register = await guard._store.read_register()
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
    register = await guard._store.read_register()
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
