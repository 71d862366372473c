"""Facts about what each way to an answer costs, and about what the caches must not answer."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import delete, update

from tests.support.guards import (
    Cost,
    cost_of,
    create,
    cut_off,
    freshness_of,
    is_revoked,
    linked_guard,
    local_of,
    new_guard,
    prepare,
    refusal,
    revoke,
    shared_of,
    tagger_of,
    written,
)
from tests.support.redis import RedisServer
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.bearer import as_headers
from tfm_guard.errors import Unavailable
from tfm_guard.records import CreatedKey
from tfm_guard.store import schema
from tfm_guard.testing import ManualClock
from tfm_guard.token import RANDOM_BYTES

keys = schema.keys

NOTHING = Cost(redis=0, database=0, argon2=0)

OpenGuard = Callable[..., Any]


@pytest.fixture
async def open_guard(database_url: str, redis_server: RedisServer) -> AsyncIterator[OpenGuard]:
    """Return what opens guards on one database and one Redis, which poll when told to."""
    await prepare(database_url)
    async with AsyncExitStack() as guards:

        async def open_one(**options: Any) -> Guard:
            guard = linked_guard(database_url, redis_server.url, **options)
            return await guards.enter_async_context(guard)

        yield open_one


@pytest.fixture
async def one(open_guard: OpenGuard) -> Guard:
    """Open a guard."""
    guard: Guard = await open_guard()
    return guard


@pytest.fixture
async def another(one: Guard, open_guard: OpenGuard) -> Guard:
    """Open a second guard on the same database and Redis."""
    guard: Guard = await open_guard()
    return guard


def same_prefix(guard: Guard, token: str, number: int = 0) -> bytes:
    """Return a well-formed token with the prefix of *token* and another secret."""
    secret = number.to_bytes(RANDOM_BYTES - 4, "big")
    return tagger_of(guard).mint(bytes.fromhex(token[6:14]) + secret)


def name_in_redis(raw: Redis, created: CreatedKey) -> str:
    """Return the name of a key's entry, which must be there."""
    (name,) = raw.keys(f"tfm:*:v1:key:{created.key.key_prefix}")
    assert isinstance(name, bytes)
    return name.decode()


async def verify_and_fill(guard: Guard, created: CreatedKey) -> None:
    """Verify a key and wait until its entry is in Redis."""
    assert (await guard.verify(created.token)).key_id == created.key.id
    await written(shared_of(guard))


async def test_a_warm_key_costs_nothing(one: Guard) -> None:
    """A key that memory knows is accepted without Redis, database or argon2."""
    created = await create(one)
    await one.verify(created.token)
    for _ in range(10):
        assert await cost_of(one, one.verify(created.token)) == NOTHING
    assert one.recall(as_headers(created.token.encode())) is not None


async def test_a_cold_key_costs_one_look_up_each(one: Guard) -> None:
    """What nobody has asked for costs one read of Redis and one of the database, and no argon2."""
    created = await create(one)
    cost = await cost_of(one, one.verify(created.token))
    assert cost == Cost(redis=1, database=1, argon2=0)
    assert one.counters.shared_misses == 1


async def test_a_key_that_another_process_has_asked_for(one: Guard, another: Guard) -> None:
    """A key in Redis costs one read of it and nothing of the database; then it is remembered."""
    created = await create(
        one,
        scopes=["send", "emails:read"],
        expires_at=one._clock.now() + timedelta(days=1),  # noqa: SLF001
    )
    await verify_and_fill(one, created)
    cost = await cost_of(another, another.verify(created.token))
    assert cost == Cost(redis=1, database=0, argon2=0)
    assert another.counters.shared_hits == 1
    assert await cost_of(another, another.verify(created.token)) == NOTHING
    assert await another.verify(created.token) == await one.verify(created.token)


async def test_a_forged_tag_costs_nothing(one: Guard) -> None:
    """A token whose tag does not match is refused before anything is asked."""
    created = await create(one)
    forged = created.token[:-1] + ("0" if created.token[-1] != "0" else "1")
    for _ in range(2):
        assert await cost_of(one, refusal(one, forged)) == NOTHING
    assert await refusal(one, forged) == "tag does not match"
    assert one.counters.negative_hits == 0


async def test_a_wrong_secret_for_a_remembered_prefix_costs_nothing(one: Guard) -> None:
    """With a key in memory any other secret for its prefix is refused on the spot."""
    created = await create(one)
    await one.verify(created.token)
    for number in range(10):
        wrong = same_prefix(one, created.token, number)
        assert await cost_of(one, refusal(one, wrong)) == NOTHING
        assert await refusal(one, wrong) == "wrong secret"


async def test_a_wrong_secret_for_a_prefix_in_redis(one: Guard, another: Guard) -> None:
    """Elsewhere it costs one read of Redis, after which memory knows the key."""
    created = await create(one)
    await verify_and_fill(one, created)
    wrong = same_prefix(one, created.token)
    assert await cost_of(another, refusal(another, wrong)) == Cost(1, 0, 0)
    assert await cost_of(another, another.verify(created.token)) == NOTHING


async def test_an_unknown_prefix_costs_once(one: Guard) -> None:
    """A token of no key costs one look-up each at first and nothing from then on."""
    unknown = tagger_of(one).mint(bytes(RANDOM_BYTES))
    assert await cost_of(one, refusal(one, unknown)) == Cost(redis=1, database=1, argon2=0)
    for _ in range(10):
        assert await cost_of(one, refusal(one, unknown)) == NOTHING
    assert one.counters.negative_hits == 10


async def test_a_key_without_digest_costs_one_hash(
    one: Guard, another: Guard, database_url: str
) -> None:
    """argon2 proves it once; from then on its digest does, here and elsewhere."""
    created = await create(one)
    row = keys.c.id == created.key.id
    execute(database_url, update(keys).where(row).values(digest=None, digest_key_id=None))
    assert await cost_of(one, one.verify(created.token)) == Cost(redis=1, database=1, argon2=1)
    assert await cost_of(one, one.verify(created.token)) == NOTHING
    await written(shared_of(one))
    assert await cost_of(another, another.verify(created.token)) == Cost(1, 0, 0)


async def test_without_redis_a_cold_key_costs_one_query(database_url: str) -> None:
    """The same way runs without the shared cache: one query, then nothing."""
    await prepare(database_url)
    async with new_guard(database_url) as guard:
        created = await create(guard)
        assert await cost_of(guard, guard.verify(created.token)) == Cost(0, 1, 0)
        assert await cost_of(guard, guard.verify(created.token)) == NOTHING


async def test_a_revoked_key_is_refused_by_all(one: Guard, another: Guard) -> None:
    """Once revoking has returned, the key is refused where it was warm, from memory or Redis."""
    created = await create(one)
    await verify_and_fill(one, created)
    await another.verify(created.token)
    await revoke(one, created, another)
    assert await refusal(one, created.token) == "revoked"
    await written(shared_of(one))
    # The tombstone that one has written is all that the other needs.
    assert await cost_of(another, refusal(another, created.token)) == Cost(1, 0, 0)
    assert await cost_of(another, refusal(another, created.token)) == NOTHING
    assert await refusal(another, created.token) == "revoked"


async def test_a_replayed_entry_is_below_the_floor(
    one: Guard, another: Guard, open_guard: OpenGuard, redis_server: RedisServer
) -> None:
    """The entry of before, put back after revoking again and again, is never believed."""
    created = await create(one)
    await verify_and_fill(one, created)
    await another.verify(created.token)
    with redis_server.client() as raw:
        name = name_in_redis(raw, created)
        replayed = raw.get(name)
        await revoke(one, created, another)
        newcomer = await open_guard()
        for number in range(20):
            for guard in (one, another, newcomer):
                raw.set(name, replayed)
                wrong = same_prefix(guard, created.token, number)  # not in the negative cache
                assert await cost_of(guard, refusal(guard, wrong)) == Cost(1, 1, 0)
                await written(shared_of(guard))  # else it may overwrite what comes now
                raw.set(name, replayed)
                assert await refusal(guard, created.token) == "revoked"
                await written(shared_of(guard))
        for guard in (one, another, newcomer):
            assert guard.counters.shared_rejected > 20
            assert guard.recall(as_headers(created.token.encode())) is None


async def test_a_forged_entry_is_no_way_in(
    one: Guard, another: Guard, redis_server: RedisServer
) -> None:
    """The entry of one's own key under another key's name lets nobody in, and is repaired."""
    mine, victim = await create(one), await create(one)
    for created in (mine, victim):
        await verify_and_fill(one, created)
    with redis_server.client() as raw:
        raw.set(name_in_redis(raw, victim), raw.get(name_in_redis(raw, mine)))
    as_victim = mine.token.replace(mine.key.key_prefix, victim.key.key_prefix)
    assert await refusal(another, as_victim) == "tag does not match"
    wrong = same_prefix(another, victim.token)
    assert await cost_of(another, refusal(another, wrong)) == Cost(1, 1, 0)
    assert another.counters.shared_rejected == 1
    await written(shared_of(another))
    local_of(another).clear()
    assert await cost_of(another, another.verify(victim.token)) == Cost(1, 0, 0)


async def test_a_process_that_forgot_believes_nothing_older(
    one: Guard, another: Guard, database_url: str
) -> None:
    """Struck off, a process takes nothing from Redis that was sealed before it returned."""
    created = await create(one)
    await verify_and_fill(one, created)
    await another.verify(created.token)
    execute(database_url, delete(schema.workers))
    await freshness_of(another).poll()
    assert another.recall(as_headers(created.token.encode())) is None
    assert await cost_of(another, another.verify(created.token)) == Cost(1, 1, 0)
    assert another.counters.shared_rejected == 1


async def test_what_is_not_fresh_asks_the_database(
    database_url: str, redis_server: RedisServer
) -> None:
    """Past its lease a process believes neither memory nor Redis, and remembers nothing."""
    await prepare(database_url, lease=2)
    clock = ManualClock()
    async with linked_guard(database_url, redis_server.url, clock=clock) as guard:
        created = await create(guard)
        unknown = tagger_of(guard).mint(bytes(RANDOM_BYTES))
        await verify_and_fill(guard, created)
        await refusal(guard, unknown)
        await cut_off(guard)
        await freshness_of(guard).poll()
        clock.advance(1.9)
        for call in (guard.verify(created.token), refusal(guard, unknown)):
            assert await cost_of(guard, call) == NOTHING
        clock.advance(0.1)
        local_of(guard).clear()
        for token in (created.token, unknown, same_prefix(guard, created.token)):
            for _ in range(3):
                ask = guard.verify(token) if token == created.token else refusal(guard, token)
                assert await cost_of(guard, ask) == Cost(0, 1, 0)
        assert len(local_of(guard)) == 0
        await freshness_of(guard).poll()
        await guard.verify(created.token)
        assert await cost_of(guard, guard.verify(created.token)) == NOTHING


async def test_a_cut_off_process_asks_the_database(one: Guard, another: Guard) -> None:
    """A process that reads no feed, its lease over, refuses a revoked key that it remembers."""
    created = await create(one)
    await verify_and_fill(one, created)
    await another.verify(created.token)
    await cut_off(another)
    freshness_of(another).fresh_until = 0.0  # its lease has ended
    one_lease = one.keys._confirmation  # noqa: SLF001
    one_lease._lease = 0.0  # noqa: SLF001  # and so long one need not wait
    revocation = await one.keys.revoke("acme", created.key.id)
    assert revocation.how == "lease"
    assert is_revoked(one, created.key.id)
    assert await refusal(another, created.token) == "revoked"


async def test_an_entry_ends_with_its_age(database_url: str) -> None:
    """10 minutes after its read an entry of memory is read again, however often it was used."""
    await prepare(database_url)
    clock = ManualClock()
    async with new_guard(database_url, clock=clock) as guard:
        created = await create(guard)
        await guard.verify(created.token)
        for _ in range(5):
            clock.advance(119)
            assert await cost_of(guard, guard.verify(created.token)) == NOTHING
        clock.advance(5.1)
        assert await cost_of(guard, guard.verify(created.token)) == Cost(0, 1, 0)


async def test_an_entry_from_redis_ends_with_its_age(
    sqlite_url: str, redis_server: RedisServer
) -> None:
    """Redis makes no entry younger: its age counts from the read of the database."""
    await prepare(sqlite_url)
    clock = ManualClock()
    async with (
        linked_guard(sqlite_url, redis_server.url, clock=clock) as one,
        linked_guard(sqlite_url, redis_server.url, clock=clock) as another,
    ):
        created = await create(one)
        await verify_and_fill(one, created)
        clock.advance(400)
        assert await cost_of(another, another.verify(created.token)) == Cost(1, 0, 0)
        clock.advance(198)
        assert await cost_of(another, another.verify(created.token)) == NOTHING
        clock.advance(2.1)
        # Redis still has it, as its own clock stands: too old, it is read and refused.
        assert await cost_of(another, another.verify(created.token)) == Cost(1, 1, 0)
        assert another.counters.shared_rejected == 1


@pytest.mark.parametrize("from_redis", [True, False])
async def test_a_remembered_key_expires_at_its_moment(
    sqlite_url: str, redis_server: RedisServer, *, from_redis: bool
) -> None:
    """A warm key is refused from its expiry on, wherever memory had it from."""
    await prepare(sqlite_url)
    clock = ManualClock()
    async with (
        linked_guard(sqlite_url, redis_server.url, clock=clock) as one,
        linked_guard(sqlite_url, redis_server.url, clock=clock) as another,
    ):
        created = await create(one, expires_at=clock.now() + timedelta(seconds=60))
        await verify_and_fill(one, created)
        guard = another if from_redis else one
        await guard.verify(created.token)
        clock.advance(58.9)
        assert await cost_of(guard, guard.verify(created.token)) == NOTHING
        clock.advance(1.1)
        assert await refusal(guard, created.token) == "expired"
        local_of(guard).clear()
        assert await refusal(guard, created.token) == "expired"


@pytest.mark.parametrize(("ahead", "hits"), [(1.9, 1), (2.1, 0)])
async def test_an_entry_sealed_in_the_future_is_refused(
    sqlite_url: str, redis_server: RedisServer, ahead: float, hits: int
) -> None:
    """What a process sealed whose clock is too far ahead is no hit for the others."""
    await prepare(sqlite_url)
    early, late = ManualClock(), ManualClock()
    early.step_wall(ahead)
    async with (
        linked_guard(sqlite_url, redis_server.url, clock=early) as one,
        linked_guard(sqlite_url, redis_server.url, clock=late) as another,
    ):
        created = await create(one)
        await verify_and_fill(one, created)
        assert (await another.verify(created.token)).key_id == created.key.id
        assert another.counters.shared_hits == hits
        assert another.counters.shared_rejected == 1 - hits


async def test_a_stepped_wall_clock_prolongs_nothing(sqlite_url: str) -> None:
    """Set back by an hour, the wall clock lets no remembered key live longer."""
    await prepare(sqlite_url)
    clock = ManualClock()
    async with new_guard(sqlite_url, clock=clock) as guard:
        created = await create(guard, expires_at=clock.now() + timedelta(seconds=60))
        await guard.verify(created.token)
        clock.step_wall(-3600)
        clock.advance(60)
        assert guard.recall(as_headers(created.token.encode())) is None


@pytest.fixture
def known() -> bytes:
    """Return the random bytes of the next token."""
    return bytes(range(RANDOM_BYTES))


@pytest.fixture
async def predictable(open_guard: OpenGuard, known: bytes) -> Guard:
    """Open a guard that will make a token of *known*."""
    guard: Guard = await open_guard(
        random=lambda count: known if count == RANDOM_BYTES else os.urandom(count)
    )
    return guard


async def test_a_new_key_is_good_where_it_was_made(predictable: Guard, known: bytes) -> None:
    """A token that was refused a moment before its key was created is accepted at once."""
    token = tagger_of(predictable).mint(known)
    for _ in range(3):
        assert await refusal(predictable, token) == "unknown prefix"
    created = await create(predictable)
    assert created.token.encode() == token
    assert (await predictable.verify(token)).key_id == created.key.id


async def test_a_new_key_is_good_after_a_poll(
    predictable: Guard, another: Guard, known: bytes
) -> None:
    """Where that very token had been refused before, its key is good from the next poll on."""
    token = tagger_of(another).mint(known)
    for _ in range(3):
        assert await refusal(another, token) == "unknown prefix"
    created = await create(predictable)
    await freshness_of(another).poll()
    assert (await another.verify(token)).key_id == created.key.id


async def test_a_new_key_is_good_at_once_everywhere(
    predictable: Guard, another: Guard, known: bytes
) -> None:
    """Wrong secrets tried for its prefix before do a new key no harm, on whichever process."""
    token = tagger_of(another).mint(known).decode()
    for guard in (predictable, another):
        for number in range(20):
            assert await refusal(guard, same_prefix(guard, token, number)) == "unknown prefix"
    created = await create(predictable)
    assert created.token == token
    for guard in (another, predictable):
        assert (await guard.verify(token)).key_id == created.key.id


async def test_what_is_older_than_known_is_not_believed(one: Guard, database_url: str) -> None:
    """A database that says less than was seen before is a reason for 503, and for no answer."""
    created = await create(one)
    await one.verify(created.token)
    await revoke(one, created)
    older = update(keys).where(keys.c.id == created.key.id).values(version=1, revoked_at=None)
    execute(database_url, older)
    with pytest.raises(Unavailable):
        await one.verify(created.token)
