"""Facts about renaming and narrowing a key, on both databases."""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import insert, select

from tests.support.guards import create, new_guard
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.errors import InvalidInput, KeyNotFound
from tfm_guard.records import CreatedKey
from tfm_guard.store import schema
from tfm_guard.testing import ManualClock

SCOPES = ["send", "domains:read", "domains:write"]


@pytest.fixture
async def guard(database_url: str) -> AsyncIterator[Guard]:
    """Open a guard on an empty database."""
    async with new_guard(database_url) as guard:
        yield guard


@pytest.fixture
async def created(guard: Guard) -> CreatedKey:
    """Create a key that the guard remembers."""
    created = await create(guard, name="CI", scopes=SCOPES)
    await guard.verify(created.token)
    return created


def log_of(url: str) -> list[tuple[str, str, Any]]:
    """Return what was done after the creation: action, what it was done to, the rest."""
    rows = execute(url, select(schema.audit).order_by("id"))[1:]
    return [(row.action, row.target_name, json.loads(row.meta)) for row in rows]


def feed_of(url: str) -> list[tuple[str, int]]:
    """Return the feed after the creation: kind and version."""
    rows = execute(url, select(schema.changes).order_by("id"))[1:]
    return [(row.kind, row.version) for row in rows]


async def test_a_key_is_renamed(guard: Guard, created: CreatedKey, database_url: str) -> None:
    """The new name is what is listed and what is verified; all else is as it was."""
    changed = await guard.keys.change("acme", created.key.id, name="  Shop ", actor="ada")
    assert (changed.name, changed.scopes) == ("Shop", frozenset(SCOPES))
    assert await guard.keys.list("acme") == [changed]
    assert (await guard.verify(created.token)).name == "Shop"
    prefix = created.key.key_prefix
    assert log_of(database_url) == [
        ("api_key.renamed", "CI", {"key_prefix": prefix, "name": "Shop"})
    ]
    assert feed_of(database_url) == [("renamed", 2)]


async def test_a_key_is_narrowed(guard: Guard, created: CreatedKey, database_url: str) -> None:
    """What is taken away is gone when it returns, and the log tells what that was."""
    changed = await guard.keys.change("acme", created.key.id, scopes=["send"])
    assert changed.scopes == {"send"}
    assert await guard.keys.get("acme", created.key.id) == changed
    assert (await guard.verify(created.token)).scopes == {"send"}
    meta = {
        "key_prefix": created.key.key_prefix,
        "permissions": ["send"],
        "removed": ["domains:read", "domains:write"],
    }
    assert log_of(database_url) == [("api_key.narrowed", "CI", meta)]
    assert feed_of(database_url) == [("narrowed", 2)]


async def test_both_at_once_are_one_change(
    guard: Guard, created: CreatedKey, database_url: str
) -> None:
    """A new name and fewer scopes are one version and one row of the feed, and two of the log."""
    changed = await guard.keys.change("acme", created.key.id, name="Shop", scopes=[])
    assert (changed.name, changed.scopes) == ("Shop", frozenset())
    actions = [action for action, _, _ in log_of(database_url)]
    assert actions == ["api_key.renamed", "api_key.narrowed"]
    assert feed_of(database_url) == [("narrowed", 2)]


async def test_what_changes_nothing_is_not_written(
    guard: Guard, created: CreatedKey, database_url: str
) -> None:
    """The same name and the same scopes leave neither a version nor a row."""
    changed = await guard.keys.change("acme", created.key.id, name="CI", scopes=SCOPES)
    assert changed == created.key
    assert (log_of(database_url), feed_of(database_url)) == ([], [])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, ((), "missing")),
        ({"name": " "}, (("name",), "string_too_short")),
        ({"scopes": "send"}, (("scopes",), "list_type")),
        ({"scopes": ["send", "audit:read"]}, (("scopes", 1), "scope_added")),
        ({"name": "Shop", "scopes": ["no such"]}, (("scopes", 0), "scope_added")),
    ],
)
async def test_a_faulty_change_is_refused(
    guard: Guard,
    created: CreatedKey,
    database_url: str,
    change: dict[str, Any],
    fault: tuple[tuple[str | int, ...], str],
) -> None:
    """A key gets no scope that it lacks, also not a former one; nothing is written."""
    with pytest.raises(InvalidInput) as caught:
        await guard.keys.change("acme", created.key.id, **change)
    assert (caught.value.field, caught.value.kind) == fault
    assert (log_of(database_url), feed_of(database_url)) == ([], [])


async def test_what_was_removed_does_not_come_back(guard: Guard, created: CreatedKey) -> None:
    """A scope that a key had cannot be given to it again."""
    await guard.keys.change("acme", created.key.id, scopes=["send"])
    with pytest.raises(InvalidInput):
        await guard.keys.change("acme", created.key.id, scopes=SCOPES)


async def test_what_is_not_there_is_not_changed(guard: Guard, created: CreatedKey) -> None:
    """A revoked key, another account's and one never issued are refused alike."""
    revoked = await create(guard)
    await guard.keys.revoke("acme", revoked.key.id)
    for account_id, key_id in (
        ("acme", revoked.key.id),
        ("another", created.key.id),
        ("acme", uuid4()),
    ):
        with pytest.raises(KeyNotFound):
            await guard.keys.change(account_id, key_id, name="Shop")
        with pytest.raises(KeyNotFound):
            await guard.keys.get(account_id, key_id)


async def test_a_new_name_waits_for_nobody(database_url: str) -> None:
    """A process that never reads the feed delays no renaming: nothing is taken away."""
    async with new_guard(database_url, clock=ManualClock()) as guard:
        created = await create(guard)
        row = {"id": uuid4(), "name": "dead", "seen": 0, "turn": 0}
        execute(database_url, insert(schema.workers).values(**row, registered_at=datetime.now(UTC)))
        assert (await guard.keys.change("acme", created.key.id, name="Shop")).name == "Shop"
