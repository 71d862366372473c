"""Facts about plans: how many active keys an account may hold, on both databases."""

import asyncio
import json
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from tests.support.crowd import run_crowd
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.errors import InvalidInput, PlanLimitReached
from tfm_guard.records import CreatedKey
from tfm_guard.settings import DEFAULT_PLANS, Settings
from tfm_guard.store import schema
from tfm_guard.testing import CHEAP_HASHING, ManualClock

keys = schema.keys

CREATORS = """
from tfm_guard import Guard
from tfm_guard.errors import Unavailable
from tfm_guard.testing import CHEAP_HASHING

async def create(guard, name):
    while True:
        try:
            return await guard.keys.create(account_id="acme", name=name)
        except Unavailable:  # so many at once, on a busy machine: whoever is told so tries again
            pass

async def main(url, count):
    async with Guard.from_urls(database=url, **CHEAP_HASHING) as guard:
        wait_for_start()
        results = await asyncio.gather(
            *(create(guard, str(i)) for i in range(int(count))), return_exceptions=True
        )
    print(json.dumps([type(result).__name__ for result in results]))

asyncio.run(main(*sys.argv[1:]))
"""


def new_guard(url: str, *, clock: ManualClock | None = None) -> Guard:
    """Return a guard on *url*."""
    return Guard(Settings.load({}, database_url=url, **CHEAP_HASHING), clock=clock)


async def fill(guard: Guard, count: int) -> list[CreatedKey]:
    """Create *count* keys for acme."""
    return [await guard.keys.create(account_id="acme", name=str(n)) for n in range(count)]


async def limit_reached(guard: Guard) -> tuple[str, int, int]:
    """Return the plan, its limit and the current count, which a further key runs into."""
    with pytest.raises(PlanLimitReached) as caught:
        await fill(guard, 1)
    return caught.value.plan, caught.value.limit, caught.value.current


async def test_a_new_account_is_on_the_free_plan(database_url: str) -> None:
    """Two keys, and no third: not a row of it is written."""
    async with new_guard(database_url) as guard:
        await fill(guard, 2)
        assert await limit_reached(guard) == ("free", 2, 2)
        await guard.keys.create(account_id="another", name="CI")
    assert len(execute(database_url, select(schema.audit))) == 3
    assert len(execute(database_url, select(schema.changes))) == 3


@pytest.mark.parametrize("plan", [*DEFAULT_PLANS])
async def test_each_plan_has_its_limit(sqlite_url: str, plan: str) -> None:
    """An account may hold 2, 5, 15 or 50 active keys."""
    limit = {"free": 2, "starter": 5, "pro": 15, "business": 50}[plan]
    async with new_guard(sqlite_url) as guard:
        await guard.accounts.set_plan("acme", plan)
        await fill(guard, limit)
        assert await limit_reached(guard) == (plan, limit, limit)


async def test_revoking_makes_room_at_once(database_url: str) -> None:
    """The very next creation after a revocation succeeds."""
    async with new_guard(database_url) as guard:
        first, _ = await fill(guard, 2)
        for _ in range(3):
            await guard.keys.revoke("acme", first.key.id)
            (first,) = await fill(guard, 1)
            assert await limit_reached(guard) == ("free", 2, 2)


async def test_an_expired_key_takes_no_room(database_url: str) -> None:
    """From its expiry on a key is not counted."""
    clock = ManualClock(datetime.now(UTC))
    async with new_guard(database_url, clock=clock) as guard:
        expires_at = clock.now() + timedelta(hours=1)
        created = await guard.keys.create(account_id="acme", name="CI", expires_at=expires_at)
        await fill(guard, 1)
        assert await limit_reached(guard) == ("free", 2, 2)
        if database_url.startswith("sqlite"):
            clock.advance(3600)
        else:
            past = datetime.now(UTC) - timedelta(seconds=1)
            row = keys.update().where(keys.c.id == created.key.id)
            execute(database_url, row.values(expires_at=past))
        await fill(guard, 1)
        assert await limit_reached(guard) == ("free", 2, 2)


async def test_a_replaced_key_takes_no_room(database_url: str) -> None:
    """Of a pair only the successor counts."""
    async with new_guard(database_url) as guard:
        old, new = await fill(guard, 2)
        row = keys.update().where(keys.c.id == old.key.id)
        execute(database_url, row.values(replaced_by=new.key.id))
        await fill(guard, 1)
        assert await limit_reached(guard) == ("free", 2, 2)


async def test_a_larger_plan_makes_room_and_a_smaller_takes_no_key(database_url: str) -> None:
    """Keys beyond a smaller plan's limit stay and work; only new ones are refused."""
    async with new_guard(database_url) as guard:
        await guard.accounts.set_plan("acme", "starter")
        created = await fill(guard, 5)
        assert await limit_reached(guard) == ("starter", 5, 5)
        await guard.accounts.set_plan("acme", "free")
        assert await limit_reached(guard) == ("free", 2, 5)
        assert len(await guard.keys.list("acme")) == 5
        assert (await guard.verify(created[0].token)).account_id == "acme"


async def test_a_plan_that_is_gone_grants_what_free_does(database_url: str) -> None:
    """An account on a plan that the settings no longer have is held to the free plan's limit."""
    async with new_guard(database_url) as guard:
        await fill(guard, 2)
        execute(database_url, schema.accounts.update().values(plan="legacy"))
        assert await limit_reached(guard) == ("legacy", 2, 2)


@pytest.mark.parametrize(
    ("account_id", "plan", "field"), [("acme", "gold", "plan"), ("a\nb", "pro", "account_id")]
)
async def test_a_faulty_plan_is_refused(
    database_url: str, account_id: str, plan: str, field: str
) -> None:
    """An unknown plan, or no account's name, is named, and no account is made."""
    async with new_guard(database_url) as guard:
        with pytest.raises(InvalidInput) as caught:
            await guard.accounts.set_plan(account_id, plan)
    assert caught.value.field == (field,)
    assert execute(database_url, select(schema.accounts)) == []


async def test_fifty_creations_for_one_place(database_url: str) -> None:
    """With room for one key, 50 creations at once from 3 processes make exactly one."""
    async with new_guard(database_url) as guard:
        (existing,) = await fill(guard, 1)
        crowd = [(database_url, count) for count in ("17", "17", "16")]
        printed = await asyncio.to_thread(run_crowd, CREATORS, crowd)
        outcomes = Counter(name for line in printed for name in json.loads(line))
        assert outcomes == {"CreatedKey": 1, "PlanLimitReached": 49}
        listed = await guard.keys.list("acme")
        assert len(listed) == 2
        assert existing.key in listed
    assert len(execute(database_url, select(keys))) == 2
    assert [row.id for row in execute(database_url, select(schema.changes).order_by("id"))] == [
        1,
        2,
    ]
    assert len(execute(database_url, select(schema.audit))) == 2
