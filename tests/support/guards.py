"""Guards whose moments are the test's: they read the feed when told to, and never by themselves."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import pytest

from tests.support.servers import wait_until
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.clock import SystemClock
from tfm_guard.counters import Counters
from tfm_guard.errors import InvalidToken
from tfm_guard.freshness import Freshness
from tfm_guard.local_cache import LocalCache
from tfm_guard.records import CreatedKey
from tfm_guard.settings import Settings
from tfm_guard.shared_cache import SharedCache
from tfm_guard.store import Installation, Store, schema
from tfm_guard.testing import CHEAP_HASHING, ManualClock
from tfm_guard.token import Tagger

T = TypeVar("T")

LONG = 1_000_000.0  # seconds


class Cost(NamedTuple):
    """How many commands to Redis to read, queries to the database, and argon2 hashes."""

    redis: int
    database: int
    argon2: int


async def prepare(url: str, *, lease: float = LONG, poll: float = LONG) -> str:
    """Make the tables at *url* for guards with that lease and poll interval, in seconds."""
    store = Store(url, pool_size=1, clock=SystemClock())
    await store.open()
    await store.close()
    times = {
        "lease_seconds": lease,
        "poll_seconds": poll,
        "linked_poll_seconds": poll,
        "unfed_seconds": 30 * lease,
    }
    for name, value in times.items():
        row = schema.settings.c.name == name
        execute(url, schema.settings.update().where(row).values(value=str(value)))
    return url


def installation_of(*, lease: float, poll_interval: float) -> Installation:
    """Return an installation with that lease and poll interval, in seconds."""
    return Installation(
        id="here",
        root_secret=bytes(32),
        tag_key=bytes(32),
        lease=lease,
        unfed=30 * lease,
        poll_interval=poll_interval,
        linked_poll_interval=poll_interval,
    )


def new_guard(url: str, redis: str | None = None, **options: Any) -> Guard:
    """Return a guard on *url*; *options* are its clock, its randomness, and settings."""
    parts = {name: options.pop(name) for name in ("clock", "random") if name in options}
    options = {**CHEAP_HASHING, "plans": {"free": 1000}, **options}
    return Guard(Settings.load({}, database_url=url, redis_url=redis, **options), **parts)


async def create(guard: Guard, *, name: str = "CI", **options: Any) -> CreatedKey:
    """Create a key for acme."""
    return await guard.keys.create(account_id="acme", name=name, **options)


async def refusal(guard: Guard, token: str | bytes) -> str:
    """Return why *guard* refuses *token*, as the logs have it."""
    with pytest.raises(InvalidToken) as caught:
        await guard.verify(token)
    return caught.value.reason


async def cost_of(guard: Guard, call: Awaitable[Any]) -> Cost:
    """Await *call* and return what it cost *guard*."""
    before = _spent(guard.counters)
    await call
    after = _spent(guard.counters)
    return Cost(*(late - early for early, late in zip(before, after, strict=True)))


def _spent(counters: Counters) -> tuple[int, int, int]:
    return counters.shared_reads, counters.store_reads, counters.hashes


def verifier_of(guard: Guard) -> Any:
    """Return the verifier of an open guard."""
    assert guard._parts is not None  # noqa: SLF001  # nothing else leads inside
    return guard._parts.verifier  # noqa: SLF001


def wrong_secret(guard: Guard, prefix: str) -> str:
    """Return a token with that prefix, a secret that nobody has, and the right tag."""
    tagger = verifier_of(guard)._tagger  # noqa: SLF001  # nothing else leads inside
    token: bytes = tagger.mint(bytes.fromhex(prefix) + b"another secret..")
    return token.decode()


def store_of(guard: Guard) -> Store:
    """Return the store of a guard."""
    return guard._store  # noqa: SLF001


def freshness_of(guard: Guard) -> Freshness:
    """Return an open guard's place in the feed."""
    freshness: Freshness = verifier_of(guard)._freshness  # noqa: SLF001
    return freshness


@asynccontextmanager
async def linked_guard(url: str, redis: str, **options: Any) -> AsyncIterator[Guard]:
    """Open a guard as `new_guard` makes it, and wait until its link counts.

    Only then does it do nothing by itself, if the intervals are long.
    """
    async with new_guard(url, redis, **options) as guard:
        await until(lambda: is_settled(freshness_of(guard)), what="the link")
        yield guard


def is_settled(freshness: Any) -> bool:
    """Tell whether a process's link counts, and it does nothing before the next interval ends."""
    told = (freshness._seen, freshness._link)  # noqa: SLF001  # nothing else leads inside
    soon = freshness._recording or freshness._poll_soon.is_set()  # noqa: SLF001
    busy = soon or freshness._polling.locked()  # noqa: SLF001
    return bool(freshness._link_counts and freshness._recorded == told and not busy)  # noqa: SLF001


async def cut_off(guard: Guard) -> None:
    """Let *guard* hear of nothing more, neither from the feed nor on its link."""
    link = guard.keys._confirmation._link  # noqa: SLF001  # nothing else leads inside
    if link is not None:
        await link.stop()
    tasks = list(freshness_of(guard)._tasks)  # noqa: SLF001
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def local_of(guard: Guard) -> LocalCache:
    """Return what an open guard remembers."""
    local: LocalCache = verifier_of(guard)._local  # noqa: SLF001
    return local


def shared_of(guard: Guard) -> SharedCache:
    """Return an open guard's way to Redis."""
    shared: SharedCache = verifier_of(guard)._reader._shared  # noqa: SLF001
    return shared


def tagger_of(guard: Guard) -> Tagger:
    """Return what makes the tokens of an open guard's installation."""
    tagger: Tagger = verifier_of(guard)._tagger  # noqa: SLF001
    return tagger


async def written(shared: SharedCache) -> None:
    """Return once *shared* has nothing left to write."""
    while (filling := shared._filling) is not None:  # noqa: SLF001
        await asyncio.wait({filling})


async def until(condition: Callable[[], bool], *, what: str) -> None:
    """Return once *condition*, about something outside this event loop's turn, holds."""
    await asyncio.to_thread(wait_until, condition, what=what)


async def begin_waiting(clock: ManualClock, call: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
    """Begin a *call* that changes a key; return when that is committed and waits for others.

    *clock* is that of the guard, which is settled.
    """
    task = asyncio.create_task(call)
    # Who sleeps: the caller, who watches the register for it, who is about to read the feed, to
    # write usage, and to look for signs of trouble.
    waiting = asyncio.create_task(clock.wait_for_sleepers(5))
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    assert not task.done()
    return task


async def revoke(guard: Guard, created: CreatedKey, *others: Guard) -> None:
    """Revoke a key through *guard* while *others* read the feed once, when it is committed."""
    revoking = asyncio.create_task(guard.keys.revoke("acme", created.key.id))
    await until(lambda: is_revoked(guard, created.key.id), what="the commit")
    for other in others:
        await freshness_of(other).poll()
    await revoking


def is_revoked(guard: Guard, key_id: UUID) -> bool:
    """Tell whether the key's revocation is committed."""
    keys = schema.keys.c
    url = guard.settings.database_url
    (row,) = execute(url, schema.keys.select().where(keys.id == key_id))
    return row.revoked_at is not None
