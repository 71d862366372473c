"""Facts about revoking among several processes that have a Redis, in real time.

Unless a test says otherwise nobody reads the feed by itself, so what confirms is not the feed.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import insert, select, update

from tests.support.guards import LONG, create, freshness_of, prepare, refusal, store_of, until
from tests.support.proxy import Proxy
from tests.support.redis import RedisServer
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.bearer import as_headers
from tfm_guard.confirmation import CONFIRM_SECONDS
from tfm_guard.errors import NotConfirmed, Unavailable
from tfm_guard.records import CreatedKey
from tfm_guard.settings import Settings
from tfm_guard.store import MARKED, Member, Store, schema
from tfm_guard.testing import CHEAP_HASHING

LEASE, WAIT = 2.0, 3.0  # seconds
MOMENT = 1.0  # less than any wait, and much more than an acknowledgement takes


class CuttableStore(Store):
    """A store whose database can be out of reach for one process."""

    cut = False

    async def poll(self, *args: Any) -> Any:
        """Poll, unless cut off."""
        return await self._unless_cut(super().poll, *args)

    async def record_place(self, *args: Any) -> None:
        """Record the place, unless cut off."""
        await self._unless_cut(super().record_place, *args)

    async def find_keys(self, *args: Any) -> Any:
        """Find keys, unless cut off."""
        return await self._unless_cut(super().find_keys, *args)

    async def _unless_cut(self, call: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        if self.cut:
            raise Unavailable("cut off")
        return await call(*args)


class Worker(Guard):
    """A guard whose database can be out of its reach."""

    def _new_store(self) -> Store:
        return CuttableStore(
            self.settings.database_url,
            pool_size=self.settings.database_pool_size,
            clock=self._clock,
        )

    def cut_off_from_database(self) -> None:
        """Let it have no database from now on."""
        store = store_of(self)
        assert isinstance(store, CuttableStore)
        store.cut = True

    @property
    def linked(self) -> bool:
        """Whether its link counts."""
        return "not linked" not in repr(freshness_of(self))

    @property
    def worker_id(self) -> UUID:
        """Who it is in the register."""
        return freshness_of(self).worker_id

    def remembers(self, created: CreatedKey) -> bool:
        """Tell whether it would accept the key from memory now."""
        return self.recall(as_headers(created.token.encode())) is not None


class Site:
    """A database and a Redis, with guards on both."""

    def __init__(self, url: str, redis: RedisServer, stack: AsyncExitStack) -> None:
        self.url = url
        self.redis = redis
        self._stack = stack

    async def worker(self, redis: str | None = None, *, linked: bool = True, **options: Any) -> Any:
        """Open a guard, on *redis* if that is another way to it, and have its link count."""
        settings = Settings.load(
            {},
            database_url=self.url,
            redis_url=redis or self.redis.url,
            plans={"free": 1000},
            **CHEAP_HASHING,
            **options,
        )
        worker = await self._stack.enter_async_context(Worker(settings))
        if linked:
            await until(lambda: worker.linked, what="the link counts")
        return worker

    async def proxy(self) -> Proxy:
        """Run a proxy before Redis."""
        return await self._stack.enter_async_context(Proxy(self.redis.port))

    def register(self) -> dict[UUID, Member]:
        """Return who is in the register."""
        rows = execute(self.url, select(schema.workers))
        return {row.id: Member(row.seen, row.link) for row in rows}

    def confirmed(self, created: CreatedKey) -> bool:
        """Tell whether it is recorded that the key is refused everywhere."""
        keys = schema.keys.c
        ((moment,),) = execute(self.url, select(keys.confirmed_at).where(keys.id == created.key.id))
        return moment is not None

    def enter_dead_process(self) -> UUID:
        """Put a process into the register that says nothing."""
        row = {"id": uuid4(), "name": "dead", "seen": 0, "turn": 0}
        execute(self.url, insert(schema.workers).values(**row, registered_at=datetime.now(UTC)))
        return UUID(str(row["id"]))


NewSite = Callable[..., Awaitable[Site]]


@pytest.fixture
async def new_site(sqlite_url: str, redis_server: RedisServer) -> AsyncIterator[NewSite]:
    """Make the tables, with the times that a test wants, and close all guards in the end."""
    async with AsyncExitStack() as stack:

        async def make(*, poll: float = LONG, **times: float) -> Site:
            await prepare(sqlite_url, lease=LEASE, poll=poll)
            for name, seconds in times.items():
                row = schema.settings.c.name == f"{name}_seconds"
                execute(sqlite_url, update(schema.settings).where(row).values(value=str(seconds)))
            return Site(sqlite_url, redis_server, stack)

        yield make


def proxied(proxy: Proxy) -> str:
    """Return the way to Redis through *proxy*."""
    return f"redis://127.0.0.1:{proxy.port}/0"


async def key_in_memory_of(first: Worker, *others: Worker) -> CreatedKey:
    """Create a key that all of them remember."""
    created = await create(first)
    for each in (first, *others):
        await each.verify(created.token)
        if not each.remembers(created):  # the news of its creation came in between, for once
            await each.verify(created.token)
        assert each.remembers(created)
    return created


async def test_all_acknowledge_in_milliseconds(new_site: NewSite) -> None:
    """Everybody hears of it over the link, says so, and refuses the key; nobody read the feed."""
    site = await new_site()
    first, *others = [await site.worker() for _ in range(4)]
    for _ in range(3):
        created = await key_in_memory_of(first, *others)
        before = site.register()
        done = await first.keys.revoke("acme", created.key.id)
        assert (done.how, done.workers) == ("acknowledged", 4)
        assert done.seconds < MOMENT
        assert not any(each.remembers(created) for each in (first, *others))
        after = site.register()
        assert [after[each.worker_id] for each in others] == [
            before[each.worker_id] for each in others
        ]
        for each in others:
            assert await refusal(each, created.token) == "revoked"
        assert site.confirmed(created)


async def test_without_publishing_the_feed_confirms(new_site: NewSite) -> None:
    """Where nobody may publish, revoking returns when everybody has read the feed."""
    site = await new_site(poll=0.25)
    first, other = await site.worker(), await site.worker()
    created = await key_in_memory_of(first, other)
    with site.redis.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "-publish")
        try:
            done = await first.keys.revoke("acme", created.key.id)
        finally:
            client.execute_command("ACL", "SETUSER", "default", "+publish")
    assert (done.how, done.workers) == ("acknowledged", 2)
    assert not other.remembers(created)
    assert site.register()[other.worker_id].seen == 2


async def test_who_is_cut_off_from_the_database_acknowledges(new_site: NewSite) -> None:
    """The link alone tells it, and its entry in Redis is too old for it from then on."""
    site = await new_site(poll=0.25)
    first, other = await site.worker(), await site.worker()
    created = await key_in_memory_of(first, other)
    other.cut_off_from_database()
    done = await first.keys.revoke("acme", created.key.id)
    assert (done.how, done.workers) == ("acknowledged", 2)
    assert site.register()[other.worker_id].seen < 2
    with pytest.raises(Unavailable):
        await other.verify(created.token)


async def test_who_is_cut_off_from_both_is_waited_for(new_site: NewSite) -> None:
    """A lease and a half after publishing it has ceased to trust its memory; then it is marked."""
    site = await new_site()
    proxy = await site.proxy()
    first, other = await site.worker(), await site.worker(proxied(proxy))
    created = await key_in_memory_of(first, other)
    other.cut_off_from_database()
    proxy.stall()
    assert other.remembers(created)
    done = await first.keys.revoke("acme", created.key.id)
    assert (done.how, done.workers) == ("lease", 2)
    assert WAIT <= done.seconds < WAIT + MOMENT
    assert not other.remembers(created)
    with pytest.raises(Unavailable):
        await other.verify(created.token)
    assert site.register()[other.worker_id].seen == MARKED


async def test_who_is_cut_off_together_with_redis_is_trusted_for_unfed(new_site: NewSite) -> None:
    """Its link is alive and nothing comes over it: NotConfirmed, until it trusts no link alone."""
    site = await new_site(unfed=7)
    proxy = await site.proxy()
    first, other = await site.worker(proxied(proxy)), await site.worker()
    created = await create(first)
    await freshness_of(other).poll()
    await other.verify(created.token)
    loop = asyncio.get_running_loop()
    started = loop.time()
    other.cut_off_from_database()
    proxy.stall()
    with pytest.raises(NotConfirmed):
        await first.keys.revoke("acme", created.key.id)
    assert CONFIRM_SECONDS <= loop.time() - started < 7
    assert other.remembers(created)
    assert not site.confirmed(created)
    done = await first.keys.revoke("acme", created.key.id)
    assert (done.how, done.workers) == ("lease", 2)
    assert done.seconds >= 7 + LEASE / 2
    assert other.linked
    assert not other.remembers(created)
    assert site.confirmed(created)


async def test_who_has_other_secrets_is_not_thought_to_hear(new_site: NewSite) -> None:
    """The two may not understand each other, so it is waited for until it has read the feed."""
    site = await new_site(poll=0.25)
    first, other = await site.worker(), await site.worker(secrets=["another secret, " * 4])
    links = {each.link for each in site.register().values()}
    assert len(links) == 2
    created = await create(first)
    done = await first.keys.revoke("acme", created.key.id)
    assert (done.how, done.workers) == ("acknowledged", 2)
    assert site.register()[other.worker_id].seen == 2
    # Its own acknowledgement, sealed with what the first does not know, was not believed.
    await until(lambda: first.counters.link_rejected >= 1, what="the acknowledgement")


async def test_who_is_marked_is_told_so(new_site: NewSite) -> None:
    """It forgets everything and registers anew, although it never reads the feed by itself."""
    site = await new_site()
    with site.redis.client() as client:
        client.execute_command(
            *("ACL", "SETUSER", "mute", "on", ">x", "~*", "&*", "+@all", "-publish")
        )
        first = await site.worker()
        other = await site.worker(f"redis://mute:x@127.0.0.1:{site.redis.port}/0")
        created = await key_in_memory_of(first, other)
        marked = other.worker_id
        row = schema.workers.c.id == marked
        execute(site.url, update(schema.workers).where(row).values(seen=MARKED))
        done = await first.keys.revoke("acme", created.key.id)
        assert done.how == "acknowledged"
        assert done.seconds < WAIT
        assert other.counters.flushes >= 1
        assert marked not in site.register()
        assert other.worker_id in site.register()
        assert await refusal(other, created.token) == "revoked"
        client.execute_command("ACL", "DELUSER", "mute")


async def test_two_keys_that_were_revoked_earlier(new_site: NewSite) -> None:
    """Whoever joins for several keys at once is told of each by everybody."""
    site = await new_site()
    first, other = await site.worker(), await site.worker()
    keys = [await key_in_memory_of(first, other) for _ in range(5)]
    # A process that died between COMMIT and telling.
    for created in keys:

        async def revoke(transaction: Any, created: CreatedKey = created) -> None:
            locked = await transaction.lock_key("acme", created.key.id)
            await transaction.change_key("revoked", locked, revoked_at=transaction.now)

        store = Store(site.url, pool_size=1, clock=first._clock)  # noqa: SLF001
        await store.open()
        await store.transact(revoke)
        await store.close()
    assert all(other.remembers(created) for created in keys)

    async def revoke_again(created: CreatedKey) -> bool:
        done = await first.keys.revoke("acme", created.key.id)
        return done.how == "acknowledged" and not other.remembers(created)

    assert all(await asyncio.gather(*map(revoke_again, keys)))


async def test_the_work_goes_on_without_the_caller(new_site: NewSite) -> None:
    """Cancelled while it waits, a revocation is confirmed all the same, when it can be."""
    site = await new_site()
    proxy = await site.proxy()
    first, other = await site.worker(), await site.worker(proxied(proxy))
    created = await key_in_memory_of(first, other)
    proxy.stall()
    revoking = asyncio.create_task(first.keys.revoke("acme", created.key.id))
    await until(lambda: not first.remembers(created), what="the commit")
    revoking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await revoking
    assert not site.confirmed(created)
    proxy.resume()
    await until(lambda: site.confirmed(created), what="the confirmation")
    assert not other.remembers(created)


async def test_closing_while_revoking_waits(new_site: NewSite) -> None:
    """Who waits is told that it is not confirmed, at once, and nothing goes on."""
    site = await new_site()
    first = await site.worker()
    created = await key_in_memory_of(first)
    site.enter_dead_process()
    manager = first.keys
    tasks = asyncio.all_tasks()
    revoking = asyncio.create_task(manager.revoke("acme", created.key.id))
    await until(lambda: not first.remembers(created), what="the commit")
    await first.close()
    with pytest.raises(NotConfirmed):
        await revoking
    assert not site.confirmed(created)

    def connections() -> int:
        with site.redis.client() as client:
            return [each["name"] for each in client.client_list()].count("tfm-guard")

    await until(lambda: connections() == 0, what="the end of the connections")
    assert asyncio.all_tasks() <= tasks
    await first.open()
    assert (await first.keys.revoke("acme", created.key.id)).how == "lease"
