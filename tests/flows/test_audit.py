"""The audit log, as an application reads it."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from sqlalchemy import insert, select

from tests.support.guards import new_guard
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.errors import InvalidInput
from tfm_guard.records import Actor
from tfm_guard.store import schema


@pytest.fixture
async def guard(database_url: str) -> AsyncIterator[Guard]:
    """Open a guard on an empty database."""
    async with new_guard(database_url) as guard:
        yield guard


async def write(url: str, *, ago: timedelta = timedelta(0), **columns: Any) -> None:
    """Write a row of some age into the audit log, while the guard may be writing too."""
    row = {
        "account_id": "acme",
        "actor": "ada",
        "action": "api_key.created",
        "target_type": "API key",
        "target_name": "CI",
        "target_id": "1",
        "category": "Security",
        "meta": "{}",
        "created_at": datetime.now(UTC) - ago,
    }
    await asyncio.to_thread(execute, url, insert(schema.audit).values({**row, **columns}))


async def test_a_list_holds_an_accounts_rows(guard: Guard, database_url: str) -> None:
    """Newest first, complete, without those of other accounts, and countable."""
    who = Actor("ada", "req-1")
    created = await guard.keys.create(account_id="acme", name="CI", actor=who)
    await guard.keys.create(account_id="other", name="CI")
    await guard.keys.revoke("acme", created.key.id, actor="bob")
    page = await guard.audit.list("acme")
    assert (page.range, page.total) == ("30d", 2)
    rows = execute(database_url, select(schema.audit).where(schema.audit.c.account_id == "acme"))
    prefix = created.key.key_prefix
    what = {
        "target_type": "API key",
        "target_name": "CI",
        "target_id": str(created.key.id),
        "category": "Security",
    }
    assert [msgspec.structs.asdict(item) for item in page.items] == [
        {
            "id": rows[1].id,
            "actor": "bob",
            "action": "api_key.revoked",
            **what,
            "meta": {"key_prefix": prefix},
            "request_id": None,
            "created_at": rows[1].created_at,
        },
        {
            "id": rows[0].id,
            "actor": "ada",
            "action": "api_key.created",
            **what,
            "meta": {"key_prefix": prefix, "permissions": ["send"]},
            "request_id": "req-1",
            "created_at": rows[0].created_at,
        },
    ]
    assert await guard.audit.list("nobody") == msgspec.structs.replace(page, items=[], total=0)


async def test_a_page_is_what_the_management_api_answers(guard: Guard, database_url: str) -> None:
    """As JSON it has the fields of the contract, with its time in UTC."""
    await write(database_url)
    page = msgspec.json.decode(msgspec.json.encode(await guard.audit.list("acme")))
    assert list(page) == ["items", "range", "total"]
    assert set(page["items"][0]) == {
        *("id", "actor", "action", "target_type", "target_name", "target_id"),
        *("category", "meta", "created_at", "request_id"),
    }
    assert page["items"][0]["created_at"].endswith("Z")


@pytest.mark.parametrize(
    ("length", "total"), [("24h", 1), ("7d", 2), ("30d", 3), (None, 3), ("90d", 4)]
)
async def test_a_range_ends_a_list(
    guard: Guard, database_url: str, length: Any, total: int
) -> None:
    """Rows are listed for 24 hours, 7, 30 or 90 days; 30 if nothing is said."""
    for hours in (24, 7 * 24, 30 * 24, 90 * 24, 200 * 24):
        await write(database_url, ago=timedelta(hours=hours, minutes=-5))
        await write(database_url, ago=timedelta(hours=hours, minutes=5), account_id="other")
    wanted = {} if length is None else {"range": length}
    assert (await guard.audit.list("acme", **wanted)).total == total
    assert (await guard.audit.list("other", **wanted)).total == total - 1


async def test_filters_are_exact_and_add_up(guard: Guard, database_url: str) -> None:
    """Category, action, actor and target each leave only what has exactly that."""
    await write(database_url)
    await write(database_url, actor="bob", action="api_key.revoked")
    await write(database_url, actor="bob", target_id="2", category="Billing")

    async def total(**wanted: Any) -> int:
        return (await guard.audit.list("acme", **wanted)).total

    assert await total(category="Security") == 2
    assert await total(category="security") == 0
    assert await total(action="api_key.created") == 2
    assert await total(actor="bob") == 2
    assert await total(target_id="2") == 1
    assert await total(actor="bob", category="Security") == 1
    assert await total(actor="%") == 0


async def test_a_limit_shortens_the_list_and_not_the_total(guard: Guard, database_url: str) -> None:
    """The newest rows are listed, 100 if nothing is said, and all are counted."""
    for number in range(103):
        await write(database_url, target_id=str(number))
    page = await guard.audit.list("acme", limit=2)
    assert [item.target_id for item in page.items] == ["102", "101"]
    assert page.total == 103
    assert len((await guard.audit.list("acme")).items) == 100
    assert len((await guard.audit.list("acme", limit=500)).items) == 103


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"range": "1y"}, "range"),
        ({"range": ""}, "range"),
        ({"limit": 0}, "limit"),
        ({"limit": 501}, "limit"),
        ({"limit": -1}, "limit"),
    ],
)
async def test_what_cannot_be_listed_is_refused(
    guard: Guard, wanted: dict[str, Any], field: str
) -> None:
    """An unknown range, and a limit outside of 1 to 500, are invalid."""
    with pytest.raises(InvalidInput) as caught:
        await guard.audit.list("acme", **wanted)
    assert caught.value.field == (field,)


async def test_events_are_read_with_a_cursor(guard: Guard, database_url: str) -> None:
    """All accounts' rows come once each in the order of their ids, whatever their times."""
    for number in range(5):
        ago = timedelta(days=number * 100)
        await write(
            database_url, account_id=f"account {number % 2}", target_id=str(number), ago=ago
        )
    seen, cursor = [], 0
    while (page := await guard.audit.events(after=cursor, limit=2)).items:
        assert page.cursor == page.items[-1].id > cursor
        seen += [(event.account_id, event.target_id) for event in page.items]
        cursor = page.cursor
    assert page.cursor == cursor
    assert seen == [(f"account {number % 2}", str(number)) for number in range(5)]
    await write(database_url, target_id="new")
    events = await guard.audit.events(after=cursor)
    assert [event.target_id for event in events.items] == ["new"]


async def test_events_of_one_account(guard: Guard, database_url: str) -> None:
    """With an account only its rows come."""
    for number in range(4):
        await write(database_url, account_id=f"account {number % 2}", target_id=str(number))
    events = await guard.audit.events(account_id="account 1")
    assert [event.target_id for event in events.items] == ["1", "3"]
    assert (await guard.audit.events(account_id="nobody", after=7)).cursor == 7


@pytest.mark.parametrize("wanted", [{"after": -1}, {"after": 2**63}, {"limit": 0}, {"limit": 501}])
async def test_what_is_no_cursor_is_refused(guard: Guard, wanted: dict[str, Any]) -> None:
    """A cursor is no negative number, nor one that no id can be; a limit is 1 to 500."""
    with pytest.raises(InvalidInput) as caught:
        await guard.audit.events(**wanted)
    assert caught.value.field == tuple(wanted)


async def test_a_cursor_misses_nothing_under_way(guard: Guard, database_url: str) -> None:
    """Who reads on while 40 keys are created, and revoked, is told of each change once."""
    done = asyncio.Event()
    seen: list[str] = []

    async def follow() -> None:
        cursor = 0
        while True:
            ending = done.is_set()
            page = await guard.audit.events(after=cursor, limit=7)
            seen.extend(f"{event.action} {event.target_id}" for event in page.items)
            cursor = page.cursor
            if ending and not page.items:
                return

    async def make() -> list[str]:
        created = await guard.keys.create(account_id=f"account {uuid4()}", name="CI")
        await guard.keys.revoke(created.key.account_id, created.key.id)
        return [f"api_key.{what} {created.key.id}" for what in ("created", "revoked")]

    following = asyncio.create_task(follow())
    made = await asyncio.gather(*(make() for _ in range(20)))
    done.set()
    await following
    assert sorted(seen) == sorted(each for both in made for each in both)
