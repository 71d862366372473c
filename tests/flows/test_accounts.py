"""Facts about accounts, on both databases: suspended, resumed, erased."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from sqlalchemy import select

from tests.support.guards import (
    create,
    freshness_of,
    local_of,
    new_guard,
    refusal,
    store_of,
    tagger_of,
    verifier_of,
)
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.errors import AccountNotFound, InvalidToken, KeyNotFound, Unavailable
from tfm_guard.records import Change, CreatedKey, Revocation
from tfm_guard.store import schema
from tfm_guard.testing import ManualClock


@pytest.fixture
async def guard(database_url: str) -> AsyncIterator[Guard]:
    """Open a guard on an empty database."""
    async with new_guard(database_url) as guard:
        yield guard


def rows_in(url: str, *tables: str) -> dict[str, list[Any]]:
    """Return all that is in these tables."""
    return {name: execute(url, select(schema.metadata.tables[name])) for name in tables}


def actions_in(url: str) -> list[tuple[str, str, str]]:
    """Return what the log says was done to accounts: the action, to whom, by whom."""
    audit = schema.audit.c
    rows = execute(url, select(schema.audit).where(audit.target_type == "account").order_by("id"))
    return [(row.action, row.target_id, row.actor) for row in rows]


async def accepted(guard: Guard, created: CreatedKey) -> bool:
    """Tell whether the guard accepts the key."""
    try:
        return (await guard.verify(created.token)).key_id == created.key.id
    except InvalidToken:
        return False


async def test_all_keys_of_a_suspended_account_are_refused(guard: Guard, database_url: str) -> None:
    """When suspending returns none is accepted, nor any that is made later; others' are."""
    keys = [await create(guard) for _ in range(3)]
    other = await guard.keys.create(account_id="another", name="CI")
    for created in (*keys, other):
        await guard.verify(created.token)
    await guard.accounts.suspend("acme", actor="ada")
    keys.append(await create(guard))
    assert [await refusal(guard, created.token) for created in keys] == ["account suspended"] * 4
    assert await accepted(guard, other)
    account = await guard.accounts.get("acme")
    assert account.suspended_at is not None
    assert account.active_keys == 4

    await guard.accounts.resume("acme", actor="bob")
    assert all([await accepted(guard, created) for created in keys])
    assert (await guard.accounts.get("acme")).suspended_at is None
    assert actions_in(database_url) == [
        ("account.suspended", "acme", "ada"),
        ("account.resumed", "acme", "bob"),
    ]
    feed = [row.kind for row in execute(database_url, select(schema.changes).order_by("id"))]
    assert feed == ["created"] * 4 + ["suspended"] * 3 + ["created"] + ["resumed"] * 4


async def test_what_is_so_already_is_not_written(guard: Guard, database_url: str) -> None:
    """Suspending twice, or resuming who is not suspended, changes nothing."""
    await create(guard)
    await guard.accounts.resume("acme")
    assert actions_in(database_url) == []
    await guard.accounts.suspend("acme")
    before = rows_in(database_url, "tfm_accounts", "tfm_keys", "tfm_audit", "tfm_changes")
    await guard.accounts.suspend("acme")
    after = rows_in(database_url, "tfm_accounts", "tfm_keys", "tfm_audit", "tfm_changes")
    assert after == before


async def test_revoked_keys_stay_so(guard: Guard) -> None:
    """Resuming brings back no key that was revoked before, or meanwhile."""
    keys = [await create(guard) for _ in range(2)]
    await guard.keys.revoke("acme", keys[0].key.id)
    await guard.accounts.suspend("acme")
    await guard.keys.revoke("acme", keys[1].key.id)
    await guard.accounts.resume("acme")
    assert [await refusal(guard, created.token) for created in keys] == ["revoked"] * 2


async def test_who_joined_a_read_is_told_that_it_was_resumed(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks after resuming, and joins a read from before, is accepted all the same."""
    created = await create(guard)
    await guard.accounts.suspend("acme")
    find_keys = store_of(guard).find_keys
    read, go_on = asyncio.Event(), asyncio.Event()

    async def held(prefixes: Any) -> Any:
        rows = await find_keys(prefixes)
        read.set()
        await go_on.wait()
        return rows

    monkeypatch.setattr(store_of(guard), "find_keys", held)
    before = asyncio.create_task(guard.verify(created.token))
    await read.wait()
    # Another process resumes it, of which this one has not heard yet.
    execute(guard.settings.database_url, "UPDATE tfm_accounts SET suspended_at = NULL")
    after = asyncio.create_task(guard.verify(created.token))
    await asyncio.sleep(0)
    go_on.set()
    assert (await after).key_id == created.key.id
    with pytest.raises(InvalidToken):
        await before


@pytest.mark.parametrize("kind", ["narrowed", "replaced", "renamed", "suspended"])
async def test_what_overtakes_a_creation_does_not_hide_it(sqlite_url: str, kind: Any) -> None:
    """A token refused before its key was made is accepted, whichever of its changes comes first."""
    async with new_guard(sqlite_url, clock=ManualClock()) as guard:
        random = bytes(20)
        token = tagger_of(guard).mint(random).decode()
        assert await refusal(guard, token) == "unknown prefix"
        assert len(verifier_of(guard)._negative) == 1  # noqa: SLF001
        prefix, freshness = random[:4].hex(), freshness_of(guard)
        freshness.apply(Change(2, kind, prefix, 2))  # over the link
        freshness.apply(Change(1, "created", prefix, 1))  # from the feed
        if kind == "suspended":
            freshness.apply(Change(3, "resumed", prefix, 3))
        assert len(verifier_of(guard)._negative) == 0  # noqa: SLF001


async def test_of_an_erased_account_prefixes_are_left(guard: Guard, database_url: str) -> None:
    """Its name, its keys' names, hashes and log are nowhere; its tokens are refused for good."""
    keys = [await create(guard, name=f"secret project {n}") for n in range(2)]
    rotated = await guard.keys.rotate("acme", keys[1].key.id)
    await guard.keys.revoke("acme", keys[0].key.id)
    other = await guard.keys.create(account_id="another", name="CI")
    await guard.accounts.set_plan("acme", "free")
    await guard.accounts.erase("acme")

    everything = repr(rows_in(database_url, *schema.metadata.tables))
    for word in ("acme", "secret project", "api_key.rotated"):
        assert word not in everything
    gone = schema.keys.c.account_id == ""
    rows = execute(database_url, select(schema.keys).where(gone))
    mine = [*keys, rotated]
    assert {row.prefix for row in rows} == {created.key.key_prefix for created in mine}
    for row in rows:
        left = {name for name, value in row._asdict().items() if value not in (None, "")}
        kept = {"id", "prefix", "version", "created_at", "revoked_at", "confirmed_at"}
        assert left == kept
        assert row.created_at == row.revoked_at
    local_of(guard).clear()
    for created in mine:
        with pytest.raises(InvalidToken):
            await guard.verify(created.token)
        with pytest.raises(KeyNotFound):
            await guard.keys.revoke("", created.key.id)
    assert await accepted(guard, other)
    assert [account.id for account in await guard.accounts.list()] == ["another"]


async def test_an_erased_account_may_come_again(guard: Guard) -> None:
    """The same name is a new account, on the plan of new ones, with none of the former's keys."""
    old = await create(guard)
    await guard.accounts.erase("acme")
    new = await create(guard)
    assert await guard.keys.list("acme") == [new.key]
    await guard.accounts.erase("acme")
    assert [await accepted(guard, created) for created in (old, new)] == [False, False]
    assert await guard.accounts.list() == []


@pytest.mark.parametrize("account_id", ["nobody", ""])
async def test_unknown_accounts_are_not_there(
    guard: Guard, database_url: str, account_id: str
) -> None:
    """An account that nobody mentioned, or with no name, is not suspended, resumed or erased."""
    await create(guard)
    await guard.accounts.erase("acme")
    before = rows_in(database_url, "tfm_accounts", "tfm_keys", "tfm_audit", "tfm_changes")
    accounts = guard.accounts
    for call in (accounts.suspend, accounts.resume, accounts.erase, accounts.get):
        with pytest.raises(AccountNotFound):
            await call(account_id)
    after = rows_in(database_url, "tfm_accounts", "tfm_keys", "tfm_audit", "tfm_changes")
    assert after == before


@pytest.mark.parametrize("steps", [1, 2, 3])
async def test_erasing_goes_on_after_a_crash(
    guard: Guard, database_url: str, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Broken off after any of its transactions, it is carried to its end by erasing again."""
    created = await create(guard)
    transact, done = store_of(guard).transact, 0

    async def until_crash(work: Any) -> Any:
        nonlocal done
        result = await transact(work)
        done += 1
        if done == steps:
            raise Unavailable("as good as dead")
        return result

    monkeypatch.setattr(store_of(guard), "transact", until_crash)
    with pytest.raises(Unavailable):
        await guard.accounts.erase("acme")
    monkeypatch.undo()
    assert not await accepted(guard, created)
    async with new_guard(database_url) as other:
        if steps == 3:
            with pytest.raises(AccountNotFound):
                await other.accounts.erase("acme")
        else:
            await other.accounts.erase("acme")
        assert await other.accounts.list() == []


async def test_a_key_that_comes_and_goes_meanwhile_is_waited_for(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others created and revoked while erasing waited is confirmed before it is erased."""
    await create(guard)
    confirmation = guard.accounts._confirmation  # noqa: SLF001  # nothing else leads inside
    wait, waited = confirmation.wait, list[set[str]]()
    late: list[CreatedKey] = []

    async def wait_while_others_act(changes: Sequence[Change], **options: Any) -> Revocation:
        done = await wait(changes, **options)
        waited.append({change.prefix for change in changes})
        if not late:
            late.append(await create(guard))
            await store_of(guard).transact(revoke)
        return done

    async def revoke(transaction: Any) -> None:
        row = await transaction.lock_key("acme", late[0].key.id)
        await transaction.change_key("revoked", row, revoked_at=transaction.now)

    monkeypatch.setattr(confirmation, "wait", wait_while_others_act)
    await guard.accounts.erase("acme")
    assert len(waited) == 2
    assert late[0].key.key_prefix in waited[1]
