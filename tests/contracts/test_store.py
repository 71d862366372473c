"""Facts about the store, on both databases: keys, the audit log and the feed of changes."""

import asyncio
import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import insert, select

from tests.support.crowd import run_crowd
from tests.support.keys import create_key, insert_key, revoke_key
from tests.support.sql import execute
from tfm_guard.errors import Unavailable
from tfm_guard.records import Actor, Change
from tfm_guard.store import (
    MARKED,
    LockedAccount,
    Member,
    Place,
    PrefixTaken,
    Store,
    Transaction,
    schema,
)

WRITERS = """
from tests.support.keys import create_key
from tfm_guard.clock import SystemClock
from tfm_guard.store import Store

async def main(url, name):
    store = Store(url, pool_size=10, clock=SystemClock())
    await store.open()
    wait_for_start()
    await asyncio.gather(
        *(create_key(store, f"{name}{i:07x}", account_id=f"account {i % 3}") for i in range(20))
    )
    await store.close()

asyncio.run(main(*sys.argv[1:]))
"""


class Injected(Exception):
    """A failure that a test causes."""


def feed_of(url: str) -> list[tuple[int, str, str, int]]:
    """Return the feed in its order: number, kind, prefix, version."""
    changes = schema.changes.c
    statement = select(changes.id, changes.kind, changes.prefix, changes.version)
    return [tuple(row) for row in execute(url, statement.order_by(changes.id))]


def head_of(url: str) -> int:
    """Return the number of the last change."""
    ((head,),) = execute(url, select(schema.feed.c.head))
    assert isinstance(head, int)
    return head


def contents_of(url: str) -> dict[str, list[Any]]:
    """Return all that a change writes."""
    tables = (schema.accounts, schema.keys, schema.audit, schema.changes, schema.feed)
    return {table.name: execute(url, select(table)) for table in tables}


async def test_keys_are_found_by_prefix(store: Store) -> None:
    """A row comes back as it was written; prefixes that nobody has are absent."""
    expires_at = datetime(2040, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=5.5)))
    before = datetime.now(UTC)
    key = await create_key(store, "00000001", expires_at=expires_at)
    await create_key(store, "00000002")
    found = await store.find_keys(["00000001", "00000002", "0000000f"])
    assert sorted(found) == ["00000001", "00000002"]
    row = found["00000001"]
    assert before <= key.created_at <= row.read_at <= datetime.now(UTC)
    assert row._asdict() == {
        "id": key.id,
        "prefix": "00000001",
        "account_id": "acme",
        "name": "key 00000001",
        "scopes": {"send", "domains:write"},
        "secret_hash": "$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aGFzaA",
        "digest": b"sixteen bytes...",
        "digest_key_id": "0011223344556677",
        "version": 1,
        "expires_at": expires_at,
        "replaced_at": None,
        "revoked_at": None,
        "suspended_at": None,
        "read_at": row.read_at,
    }
    assert row.expires_at is not None
    assert row.expires_at.utcoffset() == timedelta(0)


async def test_many_prefixes_are_one_question(store: Store) -> None:
    """256 prefixes can be asked for at once, and none too."""
    await create_key(store, "000000ff")
    assert list(await store.find_keys(f"{number:08x}" for number in range(256))) == ["000000ff"]
    assert await store.find_keys([]) == {}


async def test_a_revoked_key_is_found_as_revoked(store: Store) -> None:
    """Revoking raises the version and stays visible to who asks for the prefix."""
    key = await create_key(store, "00000001")
    assert await revoke_key(store, key) == [Change(2, "revoked", "00000001", 2)]
    row = (await store.find_keys(["00000001"]))["00000001"]
    assert row.version == 2
    assert row.revoked_at is not None
    assert key.created_at <= row.revoked_at <= row.read_at


async def test_a_transaction_finds_only_an_accounts_own_keys(store: Store) -> None:
    """A key is found by its account and id, revoked or confirmed too; another's never is."""
    key, other = await create_key(store, "00000001"), await create_key(store, "00000002")

    async def find(account_id: str, key_id: UUID) -> Any:
        row, changes = await store.transact(lambda t: t.lock_key(account_id, key_id))
        assert changes == []
        return row

    assert await find("evil", key.id) is None
    assert await find("acme", uuid4()) is None
    row = await find("acme", key.id)
    assert (row.prefix, row.version, row.revoked_at, row.confirmed_at) == (
        "00000001",
        1,
        None,
        None,
    )
    await revoke_key(store, key)
    row = await find("acme", key.id)
    assert row.version == 2
    assert row.confirmed_at is None
    assert row.revoked_at >= key.created_at
    await store.confirm_revocation(key.id)
    assert (await find("acme", key.id)).confirmed_at >= row.revoked_at
    row = await find("acme", other.id)
    assert (row.version, row.revoked_at, row.confirmed_at) == (1, None, None)


async def test_only_who_is_still_behind_is_marked(store: Store) -> None:
    """Who has meanwhile seen so far, or is not named, is not; who is can record nothing more."""
    behind, late, other = uuid4(), uuid4(), uuid4()
    for worker_id in (behind, late, other):
        await store.register_worker(worker_id, "host:1")
    await store.record_place(late, Place(7, None, 1))
    await store.strike_off([behind, late], 7, marked=[other])
    assert (await store.read_register()).members == {
        behind: Member(MARKED, None),
        late: Member(7, None),
        other: Member(0, None),
    }
    await store.record_place(behind, Place(9, None, 1))
    assert await store.poll(behind, Place(0, None, 2)) is None
    await store.strike_off([late], 8, marked=[behind])
    assert (await store.read_register()).members == {
        late: Member(MARKED, None),
        other: Member(0, None),
    }


async def test_a_listener_hears_of_what_was_committed(store: Store) -> None:
    """Each change is told once it is committed, in its order; what was taken back never is."""
    heard: list[Change] = []
    store.on_commit(heard.append)

    async def two(transaction: Transaction) -> str:
        await insert_key(transaction, "00000002")
        await insert_key(transaction, "00000003")
        assert heard == [Change(1, "created", "00000001", 1)]
        assert await transaction.head() == 1
        return "both"

    async def fail(transaction: Transaction) -> None:
        await insert_key(transaction, "00000004")
        raise Injected

    await create_key(store, "00000001")
    created = [Change(2, "created", "00000002", 1), Change(3, "created", "00000003", 1)]
    assert await store.transact(two) == ("both", created)
    with pytest.raises(Injected):
        await store.transact(fail)
    assert heard[1:] == created


async def test_a_list_holds_an_accounts_active_keys(store: Store, database_url: str) -> None:
    """Newest first, without revoked and expired keys and those of others, with their last use."""
    now = datetime.now(UTC)
    old = await create_key(store, "00000001", expires_at=now + timedelta(hours=1))
    await create_key(store, "00000002", expires_at=now - timedelta(seconds=1))
    revoked = await create_key(store, "00000003")
    await create_key(store, "00000004", account_id="another")
    new = await create_key(store, "00000005")
    await revoke_key(store, revoked)
    used_at = datetime(2030, 1, 1, 0, 0, 0, 1, tzinfo=UTC)
    execute(database_url, insert(schema.key_usage).values(key_id=old.id, last_used_at=used_at))

    assert [key.id for key in await store.list_keys("acme")] == [new.id, old.id]
    listed = (await store.list_keys("acme"))[1]
    assert listed.last_used_at == used_at
    assert listed.expires_at == old.expires_at
    assert (listed.name, listed.scopes) == (old.name, old.scopes)
    assert await store.list_keys("nobody") == []


async def test_active_keys_are_counted_like_they_are_listed(
    store: Store, database_url: str
) -> None:
    """Revoked, expired and replaced keys take no room."""
    successor = await create_key(store, "00000001")
    await create_key(store, "00000002", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    replaced = await create_key(store, "00000003")
    assert await store.transact(lambda t: t.count_active_keys("acme")) == (2, [])
    keys = schema.keys
    rotated = keys.update().where(keys.c.id == replaced.id).values(replaced_by=successor.id)
    execute(database_url, rotated)
    assert await store.transact(lambda t: t.count_active_keys("acme")) == (1, [])
    # Without its successor it is not one of a pair.
    await revoke_key(store, successor)
    assert await store.transact(lambda t: t.count_active_keys("acme")) == (1, [])
    assert await store.transact(lambda t: t.count_active_keys("another")) == (0, [])


async def test_an_account_is_made_when_first_locked(store: Store) -> None:
    """A new account is on the plan "free"; locking it again changes nothing, only set_plan does."""
    free, pro = LockedAccount("acme", "free", None), LockedAccount("acme", "pro", None)
    for _ in range(2):
        assert await store.transact(lambda t: t.lock_account("acme")) == (free, [])
    await store.transact(lambda t: t.set_plan("acme", "pro"))
    assert await store.transact(lambda t: t.lock_account("acme")) == (pro, [])


async def test_a_prefix_is_given_once(store: Store, database_url: str) -> None:
    """A prefix that any key has or had is taken, and nothing of the second key is written."""
    key = await create_key(store, "00000001")
    await revoke_key(store, key)
    before = contents_of(database_url)
    with pytest.raises(PrefixTaken):
        await create_key(store, "00000001", account_id="another")
    assert contents_of(database_url) == before


async def test_a_digest_is_no_change(store: Store, database_url: str) -> None:
    """Storing a digest leaves the key's version and the feed as they are."""
    key = await create_key(store, "00000001")
    await store.set_digest(key.id, b"another digest..", "another key's id")
    row = (await store.find_keys(["00000001"]))["00000001"]
    assert (row.digest, row.digest_key_id) == (b"another digest..", "another key's id")
    assert row.version == 1
    assert head_of(database_url) == 1


async def test_every_change_is_in_the_feed(store: Store, database_url: str) -> None:
    """Changes are numbered from 1, several of one transaction too, with kind and new version."""

    async def two(transaction: Transaction) -> None:
        await insert_key(transaction, "00000002")
        await insert_key(transaction, "00000003")

    key = await create_key(store, "00000001")
    await store.transact(two)
    await revoke_key(store, key)
    assert feed_of(database_url) == [
        (1, "created", "00000001", 1),
        (2, "created", "00000002", 1),
        (3, "created", "00000003", 1),
        (4, "revoked", "00000001", 2),
    ]
    assert head_of(database_url) == 4


async def test_the_audit_row_is_complete(store: Store, database_url: str) -> None:
    """Who did what to which key stands in the audit log, at the transaction's time."""
    key = await create_key(store, "00000001")
    (row,) = execute(database_url, select(schema.audit))
    assert row._asdict() == {
        "id": 1,
        "account_id": "acme",
        "actor": "a test",
        "action": "api_key.created",
        "target_type": "API key",
        "target_name": "key 00000001",
        "target_id": str(key.id),
        "category": "Security",
        "meta": '{"key_prefix":"00000001"}',
        "request_id": None,
        "created_at": key.created_at,
    }
    assert json.loads(row.meta) == {"key_prefix": "00000001"}


async def test_an_audit_row_can_name_a_request_and_an_account(
    store: Store, database_url: str
) -> None:
    """Who acts may come with the id of a request; what is acted on may be an account."""

    async def suspend(transaction: Transaction) -> None:
        await transaction.audit(
            account_id="acme",
            actor=Actor("person:7", "req-1"),
            action="account.suspended",
            target_type="account",
            target_id="acme",
            target_name="acme",
            meta={},
        )

    assert await store.transact(suspend) == (None, [])
    (row,) = execute(database_url, select(schema.audit))
    assert (row.actor, row.request_id) == ("person:7", "req-1")
    assert (row.target_type, row.target_id, row.target_name) == ("account", "acme", "acme")


@pytest.mark.parametrize("prefixes", [[], ["00000002"], ["00000002", "00000003"]])
async def test_a_failed_change_leaves_nothing(
    store: Store, database_url: str, prefixes: list[str]
) -> None:
    """A failure after any number of statements takes back key, audit and account; no number."""

    async def fail(transaction: Transaction) -> None:
        await transaction.lock_account("new")
        for prefix in prefixes:
            await insert_key(transaction, prefix, account_id="new")
        raise Injected

    await create_key(store, "00000001")
    before = contents_of(database_url)
    with pytest.raises(Injected):
        await store.transact(fail)
    assert contents_of(database_url) == before
    await create_key(store, "00000004")
    assert [number for number, *_ in feed_of(database_url)] == [1, 2]


async def test_a_change_that_cannot_be_numbered_is_none(store: Store, database_url: str) -> None:
    """If the feed row cannot be written, the key is not created either."""
    await create_key(store, "00000001")
    now = datetime.now(UTC)
    stray = {"id": 2, "kind": "created", "prefix": "x", "version": 1, "created_at": now}
    execute(database_url, insert(schema.changes).values(stray))
    before = contents_of(database_url)
    with pytest.raises(Unavailable):
        await create_key(store, "00000002")
    assert contents_of(database_url) == before


async def test_a_cancelled_change_leaves_nothing(store: Store, database_url: str) -> None:
    """A caller that goes away before COMMIT leaves no trace, and its connection is free again."""
    reached = asyncio.Event()

    async def stall(transaction: Transaction) -> None:
        await insert_key(transaction, "00000002")
        reached.set()
        await asyncio.Event().wait()

    await create_key(store, "00000001")
    before = contents_of(database_url)
    for _ in range(12):  # more than there are connections
        reached.clear()
        change = asyncio.create_task(store.transact(stall))
        await reached.wait()
        change.cancel()
        with pytest.raises(asyncio.CancelledError):
            await change
    await create_key(store, "00000003")
    assert len(contents_of(database_url)["tfm_keys"]) == len(before["tfm_keys"]) + 1
    assert feed_of(database_url)[1:] == [(2, "created", "00000003", 1)]


async def test_twenty_writers_at_once(store: Store, database_url: str) -> None:
    """20 changes at the same time all take place, with numbers without gaps, failures between."""

    async def fail(transaction: Transaction) -> None:
        await insert_key(transaction, "ffffffff")
        raise Injected

    writers = [create_key(store, f"{number:08x}") for number in range(20)]
    failures = [store.transact(fail) for _ in range(5)]
    results = await asyncio.gather(*writers, *failures, return_exceptions=True)
    assert [type(result) for result in results[20:]] == [Injected] * 5
    assert not [result for result in results[:20] if isinstance(result, BaseException)]
    feed = feed_of(database_url)
    assert [number for number, *_ in feed] == list(range(1, 21))
    assert sorted(prefix for _, _, prefix, _ in feed) == [f"{number:08x}" for number in range(20)]


async def test_three_processes_of_writers(store: Store, database_url: str) -> None:
    """20 writers in each of 3 processes all succeed: 60 changes, without gaps."""
    await asyncio.to_thread(run_crowd, WRITERS, [(database_url, name) for name in "abc"])
    feed = feed_of(database_url)
    assert [number for number, *_ in feed] == list(range(1, 61))
    assert len({prefix for _, _, prefix, _ in feed}) == 60
    assert head_of(database_url) == 60
