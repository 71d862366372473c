"""Facts about rotating a key, on both databases."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select

from tests.support.failpoints import Failpoint
from tests.support.guards import create, new_guard, refusal, until
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.errors import (
    AlreadyReplaced,
    InsufficientScope,
    InvalidInput,
    InvalidToken,
    KeyNotFound,
    PlanLimitReached,
)
from tfm_guard.records import CreatedKey
from tfm_guard.store import Transaction, schema
from tfm_guard.testing import seeded_bytes
from tfm_guard.token import RANDOM_BYTES

GRACE = timedelta(hours=24)
NONE = timedelta()


@pytest.fixture
async def guard(database_url: str) -> AsyncIterator[Guard]:
    """Open a guard on an empty database, where an account may hold two keys."""
    async with new_guard(database_url, plans={"free": 2}) as guard:
        yield guard


def row_of(url: str, created: CreatedKey) -> Any:
    """Return a key's row."""
    (row,) = execute(url, select(schema.keys).where(schema.keys.c.id == created.key.id))
    return row


def feed_of(url: str) -> list[tuple[str, str, int]]:
    """Return the feed: kind, prefix, version."""
    rows = execute(url, select(schema.changes).order_by("id"))
    return [(row.kind, row.prefix, row.version) for row in rows]


async def test_a_successor_is_as_the_key_was(guard: Guard, database_url: str) -> None:
    """It has the name and the scopes; the old key works on to the end of the grace, and says so."""
    old = await create(guard, name="CI", scopes=["send", "domains:read"])
    new = await guard.keys.rotate("acme", old.key.id, actor="ada")
    assert (new.key.name, new.key.scopes) == ("CI", frozenset({"send", "domains:read"}))
    assert (new.key.expires_at, new.key.replaced_by) == (None, None)
    assert new.replaces == old.key.id
    assert new.confirmed is not None
    row = row_of(database_url, old)
    assert (row.replaced_by, row.replaced_at) == (new.key.id, new.key.created_at)
    assert row.expires_at == new.key.created_at + GRACE
    verified = await guard.verify(old.token)
    assert (verified.expires_at, verified.replaced_at) == (row.expires_at, row.replaced_at)
    assert verified.credentials.replaced
    assert (await guard.verify(new.token)).replaced_at is None
    listed = await guard.keys.list("acme")
    assert [(key.id, key.replaced_by) for key in listed] == [
        (new.key.id, None),
        (old.key.id, new.key.id),
    ]
    assert feed_of(database_url) == [
        ("created", old.key.key_prefix, 1),
        ("created", new.key.key_prefix, 1),
        ("replaced", old.key.key_prefix, 2),
    ]


async def test_a_rotation_is_audited(guard: Guard, database_url: str) -> None:
    """It leaves a row for the new key and one for the old, which name each other and who did it."""
    old = await create(guard)
    new = await guard.keys.rotate("acme", old.key.id, grace=timedelta(hours=1), actor="ada")
    rows = execute(database_url, select(schema.audit).order_by("id"))[1:]
    assert [(row.actor, row.action, row.target_id) for row in rows] == [
        ("ada", "api_key.created", str(new.key.id)),
        ("ada", "api_key.rotated", str(old.key.id)),
    ]
    assert json.loads(rows[0].meta)["replaces"] == str(old.key.id)
    assert json.loads(rows[1].meta) == {
        "key_prefix": old.key.key_prefix,
        "replaced_by": str(new.key.id),
        "grace_seconds": 3600,
    }


async def test_a_successor_lasts_as_long_as_the_key_did(guard: Guard) -> None:
    """A lifetime begins anew, and a key that ends before its grace does so."""
    first = await create(guard)
    expires_at = first.key.created_at + timedelta(hours=2)
    old = await create(guard, expires_at=expires_at)
    new = await guard.keys.rotate("acme", old.key.id)
    assert new.key.expires_at is not None
    assert new.key.expires_at - new.key.created_at == expires_at - old.key.created_at
    assert (await guard.keys.get("acme", old.key.id)).expires_at == expires_at


async def test_without_a_grace_the_key_ends_at_once(guard: Guard) -> None:
    """When rotating returns the old key is refused, and not listed."""
    old = await create(guard)
    await guard.verify(old.token)
    new = await guard.keys.rotate("acme", old.key.id, grace=NONE)
    assert await refusal(guard, old.token) == "expired"
    assert await guard.keys.list("acme") == [new.key]


async def test_a_change_that_began_before_a_rotation_finds_the_key_ended(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to narrow a key, and comes to it once a rotation has ended it, narrows nothing."""
    lock_key, begun, rotated = Transaction.lock_key, asyncio.Event(), asyncio.Event()

    async def lock_late(self: Transaction, *wanted: Any) -> Any:
        if not begun.is_set():
            begun.set()
            await rotated.wait()
        return await lock_key(self, *wanted)

    monkeypatch.setattr(Transaction, "lock_key", lock_late)
    async with new_guard(postgres_url) as guard:
        old = await create(guard, scopes=["send", "domains:read"])
        changing = asyncio.create_task(guard.keys.change("acme", old.key.id, scopes=["send"]))
        await begun.wait()
        new = await guard.keys.rotate("acme", old.key.id, grace=NONE)
        rotated.set()
        with pytest.raises(KeyNotFound):
            await changing
        assert new.key.scopes == {"send", "domains:read"}


async def test_revoking_cuts_the_grace_short(guard: Guard) -> None:
    """Once revoking the old key has returned it is refused, and its successor is not."""
    old = await create(guard)
    new = await guard.keys.rotate("acme", old.key.id)
    await guard.keys.revoke("acme", old.key.id)
    assert await refusal(guard, old.token) == "revoked"
    assert (await guard.verify(new.token)).key_id == new.key.id


async def test_the_plan_is_no_hindrance(guard: Guard) -> None:
    """With no room for another key a key can be rotated, and that makes no room."""
    first, second = await create(guard), await create(guard)
    for created in (first, second):
        await guard.keys.rotate("acme", created.key.id)
    with pytest.raises(PlanLimitReached) as caught:
        await create(guard)
    assert caught.value.current == 2
    assert len(await guard.keys.list("acme")) == 4


async def test_one_predecessor_at_a_time(guard: Guard) -> None:
    """Neither a key in its grace nor its successor is rotated until the grace is over."""
    first = await create(guard)
    second = await guard.keys.rotate("acme", first.key.id)
    for created in (first, second):
        with pytest.raises(AlreadyReplaced):
            await guard.keys.rotate("acme", created.key.id)
    await guard.keys.revoke("acme", first.key.id)
    third = await guard.keys.rotate("acme", second.key.id, grace=NONE)
    fourth = await guard.keys.rotate("acme", third.key.id)
    assert {key.id for key in await guard.keys.list("acme")} == {third.key.id, fourth.key.id}
    with pytest.raises(KeyNotFound):
        await guard.keys.rotate("acme", second.key.id)


async def test_what_is_not_there_is_not_rotated(guard: Guard, database_url: str) -> None:
    """A revoked key, another account's and one never issued are refused, and nothing is written."""
    revoked, other = await create(guard), await create(guard)
    await guard.keys.revoke("acme", revoked.key.id)
    before = feed_of(database_url)
    for account_id, key_id in (
        ("acme", revoked.key.id),
        ("another", other.key.id),
        ("acme", uuid4()),
    ):
        with pytest.raises(KeyNotFound):
            await guard.keys.rotate(account_id, key_id)
    assert feed_of(database_url) == before


@pytest.mark.parametrize("seconds", [-1, 604_801])
async def test_a_grace_has_bounds(guard: Guard, seconds: int) -> None:
    """A grace below nothing or above seven days is refused."""
    created = await create(guard)
    with pytest.raises(InvalidInput) as caught:
        await guard.keys.rotate("acme", created.key.id, grace=timedelta(seconds=seconds))
    assert (caught.value.field, caught.value.kind) == (("grace",), "grace_range")
    await guard.keys.rotate("acme", created.key.id, grace=timedelta(days=7))


async def test_a_caller_needs_all_that_the_key_may(guard: Guard, database_url: str) -> None:
    """Who lacks a scope of the key, or has lost one by then, gets no successor of it."""
    wide = await create(guard, scopes=["send", "domains:read"])
    caller = await create(guard, scopes=["send", "domains:read", "api-keys:write"])
    verified = await guard.verify(caller.token)
    await guard.keys.change("acme", caller.key.id, scopes=["send", "api-keys:write"])
    before = feed_of(database_url)
    with pytest.raises(InsufficientScope) as caught:
        await guard.keys.rotate("acme", wide.key.id, caller=verified)
    assert caught.value.missing == {"domains:read"}
    assert feed_of(database_url) == before


@pytest.mark.parametrize("how", ["revoked", "suspended"])
async def test_a_caller_that_is_gone_by_then_leaves_nothing(
    guard: Guard, database_url: str, how: str
) -> None:
    """A key that was verified, and ended before the change was made, makes itself no successor."""
    caller = await create(guard)
    verified = await guard.verify(caller.token)
    other = await create(guard)
    if how == "revoked":
        await guard.keys.revoke("acme", caller.key.id)
    else:
        await guard.accounts.suspend("acme")
    before = feed_of(database_url)
    with pytest.raises(InvalidToken):
        await guard.keys.rotate("acme", other.key.id, caller=verified)
    assert feed_of(database_url) == before


async def test_a_key_rotates_itself(guard: Guard, database_url: str) -> None:
    """The log names the key that acted."""
    created = await create(guard)
    verified = await guard.verify(created.token)
    await guard.keys.rotate("acme", created.key.id, caller=verified)
    actors = {row.actor for row in execute(database_url, select(schema.audit))}
    assert actors == {"application", f"api_key:{created.key.id}"}


async def test_a_taken_prefix_is_minted_again(database_url: str) -> None:
    """A successor whose prefix exists gets another, and is one."""
    random, taken = seeded_bytes(), iter([b"\x01" * 4] * 3)

    def repeating(count: int) -> bytes:
        if count == RANDOM_BYTES:
            return next(taken, b"\x02" * 4) + random(count - 4)
        return random(count)

    async with new_guard(database_url, random=repeating) as guard:
        old = await create(guard)
        new = await guard.keys.rotate("acme", old.key.id)
        assert (old.key.key_prefix, new.key.key_prefix) == ("01010101", "02020202")
        assert (await guard.verify(new.token)).key_id == new.key.id
    assert len(feed_of(database_url)) == 3


@pytest.mark.parametrize(
    "point", ["before the transaction", "key locked", "before COMMIT", "after COMMIT"]
)
async def test_cancelled_it_is_whole_or_nothing(database_url: str, point: str) -> None:
    """Wherever it is broken off, there is a successor if the old key is replaced, and else none."""
    async with new_guard(database_url) as guard:
        old = await create(guard)
        failpoint = Failpoint(point, dies=False)
        try:
            call = asyncio.create_task(guard.keys.rotate("acme", old.key.id))
            await until(lambda: failpoint.reached, what=point)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call
        finally:
            failpoint.remove()
    rows = execute(database_url, select(schema.keys))
    made = [row for row in rows if row.id != old.key.id]
    assert len(made) == (1 if point == "after COMMIT" else 0)
    replaced_by = row_of(database_url, old).replaced_by
    assert [row.id for row in made] == ([replaced_by] if replaced_by else [])
    assert len(feed_of(database_url)) == 1 + 2 * len(made)
    assert len(execute(database_url, select(schema.audit))) == 1 + 2 * len(made)
