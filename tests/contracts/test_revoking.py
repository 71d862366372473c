"""Facts about revoking in the store: what it changes, in which order, and what it waits for."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import select

from tests.contracts.test_conflicts import set_default, wait_for_a_blocked_backend
from tests.support.keys import create_key
from tests.support.servers import wait_until
from tests.support.sql import execute
from tfm_guard.errors import Unavailable
from tfm_guard.records import Actor, Change
from tfm_guard.store import Store, schema

WHO = Actor("a test", "request 7")


@contextmanager
def held(url: str, *statements: str) -> Iterator[psycopg.Connection]:
    """Execute *statements* in a transaction, which is open until it is committed."""
    with psycopg.connect(url) as holder:
        for statement in statements:
            holder.execute(statement.encode())
        yield holder


async def test_revoking_changes_the_row_the_feed_and_the_audit_log(
    store: Store, database_url: str
) -> None:
    """The key's next version is revoked, with a number in the feed and a row in the log."""
    key = await create_key(store, "00000001")
    told: list[Change] = []
    store.on_commit(told.append)
    revoked = await store.revoke_key("acme", key.id, WHO)
    assert revoked == Change(2, "revoked", "00000001", 2)
    assert told == [revoked]
    row = (await store.find_keys(["00000001"]))["00000001"]
    assert (row.version, row.revoked_at is not None) == (2, True)
    assert await store.changes_between(1, 9) == [revoked]
    audit = schema.audit
    *_, logged = execute(database_url, select(audit).order_by(audit.c.id))
    assert json.loads(logged.meta) == {"key_prefix": "00000001"}
    assert logged.created_at == row.revoked_at
    found = logged._asdict()
    expected = {
        "account_id": "acme",
        "actor": "a test",
        "action": "api_key.revoked",
        "target_type": "API key",
        "target_name": "key 00000001",
        "target_id": str(key.id),
        "category": "Security",
        "request_id": "request 7",
    }
    assert {name: found[name] for name in expected} == expected


async def test_revoking_again_names_the_head_and_changes_nothing(
    store: Store, database_url: str
) -> None:
    """Until it is confirmed; then, as for a key that is not the account's, there is nothing."""
    key = await create_key(store, "00000001")
    await store.revoke_key("acme", key.id, WHO)
    await create_key(store, "00000002")
    told: list[Change] = []
    store.on_commit(told.append)
    again = await store.revoke_key("acme", key.id, WHO)
    assert again == Change(3, "revoked", "00000001", 2)
    assert told == []
    await store.confirm_revocation(key.id)
    rows = execute(database_url, select(schema.audit.c.action))
    for account_id, key_id in (("acme", key.id), ("evil", key.id), ("acme", uuid4())):
        assert await store.revoke_key(account_id, key_id, WHO) is None
    assert len(execute(database_url, select(schema.audit.c.action))) == len(rows) == 3
    assert (await store.read_register()).head == 3


async def test_who_waited_revokes_what_the_key_has_become(
    postgres_store: Store, postgres_url: str
) -> None:
    """Behind another change of the key it takes the next version and the next number."""
    key = await create_key(postgres_store, "00000001")
    change = "UPDATE tfm_keys SET version = 5, name = 'another'"
    number = "UPDATE tfm_feed SET head = 8"
    with held(postgres_url, "SELECT 1 FROM tfm_accounts FOR UPDATE", change, number) as holder:
        revoking = asyncio.create_task(postgres_store.revoke_key("acme", key.id, WHO))
        await wait_for_a_blocked_backend(postgres_url)
        holder.commit()
    revoked = await revoking
    assert revoked == Change(9, "revoked", "00000001", 6)
    *_, logged = execute(postgres_url, select(schema.audit).order_by(schema.audit.c.id))
    assert logged.target_name == "another"


@pytest.mark.parametrize(("end", "number"), [("COMMIT", 3), ("ROLLBACK", 2)])
async def test_its_number_comes_after_who_holds_the_head(
    postgres_store: Store, postgres_url: str, end: str, number: int
) -> None:
    """It takes the next number after an uncommitted one, or the same if that is given back."""
    key = await create_key(postgres_store, "00000001")
    with held(postgres_url, "UPDATE tfm_feed SET head = head + 1") as holder:
        revoking = asyncio.create_task(postgres_store.revoke_key("acme", key.id, WHO))
        await wait_for_a_blocked_backend(postgres_url)
        row = (await postgres_store.find_keys(["00000001"]))["00000001"]
        assert row.revoked_at is None
        holder.execute(end.encode())
    revoked = await revoking
    assert revoked is not None
    assert revoked.id == number


async def test_who_revokes_again_waits_for_the_first(
    postgres_store: Store, postgres_url: str
) -> None:
    """Of two at the same time one revokes; the other names a head that is not before that."""
    key = await create_key(postgres_store, "00000001")
    with held(postgres_url, "SELECT 1 FROM tfm_accounts FOR UPDATE") as holder:
        revoking = [
            asyncio.create_task(postgres_store.revoke_key("acme", key.id, WHO)) for _ in range(2)
        ]
        await wait_for_a_blocked_backend(postgres_url)
        query = "SELECT count(*) AS number FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        await asyncio.to_thread(
            wait_until, lambda: execute(postgres_url, query)[0].number == 2, what="two who wait"
        )
        holder.commit()
    for revoked in await asyncio.gather(*revoking):
        assert revoked == Change(2, "revoked", "00000001", 2)
    assert len(execute(postgres_url, select(schema.changes))) == 2


async def test_many_revocations_leave_no_gap(postgres_store: Store, postgres_url: str) -> None:
    """40 at once, of three accounts, each get a number, and so do others beside them."""
    keys = [
        await create_key(postgres_store, f"0000{n:04}", account_id=f"account {n % 3}")
        for n in range(40)
    ]
    done = await asyncio.gather(
        *(postgres_store.revoke_key(key.account_id, key.id, WHO) for key in keys),
        *(create_key(postgres_store, f"1000{n:04}") for n in range(10)),
    )
    assert None not in done
    numbers = execute(postgres_url, select(schema.changes.c.id).order_by(schema.changes.c.id))
    assert [row.id for row in numbers] == list(range(1, 91))


async def test_it_waits_no_longer_than_1_5_seconds_for_a_lock(
    postgres_store: Store, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that somebody holds on to fails it, and nothing is left behind."""
    monkeypatch.setattr("tfm_guard.store.database._ATTEMPTS", 1)
    key = await create_key(postgres_store, "00000001")
    with held(postgres_url, "SELECT 1 FROM tfm_accounts FOR UPDATE"):
        with pytest.raises(Unavailable) as refused:
            await postgres_store.revoke_key("acme", key.id, WHO)
        assert "lock timeout" in refused.value.reason
        row = (await postgres_store.find_keys(["00000001"]))["00000001"]
        assert row.revoked_at is None
    assert await postgres_store.revoke_key("acme", key.id, WHO) is not None


async def test_the_servers_default_isolation_does_not_matter(
    postgres_store: Store, postgres_url: str
) -> None:
    """Where it is serializable, revocations at the same time wait for each other, and no more."""
    set_default(postgres_url, "default_transaction_isolation = 'serializable'")
    keys = [
        await create_key(postgres_store, f"0000000{n}", account_id=f"account {n}") for n in range(8)
    ]
    done = await asyncio.gather(
        *(postgres_store.revoke_key(key.account_id, key.id, WHO) for key in keys)
    )
    assert None not in done


async def test_a_lost_connection_is_made_anew(postgres_store: Store, postgres_url: str) -> None:
    """Revoking goes on where the server has ended the connections that it had been left."""
    for n in range(3):
        key = await create_key(postgres_store, f"0000000{n}")
        assert await postgres_store.revoke_key("acme", key.id, WHO) is not None
        execute(
            postgres_url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'tfm-guard'",
        )


@pytest.mark.parametrize("direct", [True, False])
async def test_statements_are_prepared_where_one_server_process_executes_them(
    postgres_store: Store, postgres_url: str, monkeypatch: pytest.MonkeyPatch, *, direct: bool
) -> None:
    """Where another one answers than was connected to, as behind PgBouncer, they are not."""
    if not direct:
        monkeypatch.setattr(psycopg.ConnectionInfo, "backend_pid", 0)
    seen = []
    for n in range(3):
        key = await create_key(postgres_store, f"0000000{n}")
        assert await postgres_store.revoke_key("acme", key.id, WHO) is not None
        await postgres_store.confirm_revocation(key.id)
        assert await postgres_store.revoke_key("acme", key.id, WHO) is None
        query = "SELECT query FROM pg_stat_activity WHERE application_name = 'tfm-guard'"
        seen += [row.query for row in execute(postgres_url, query)]
    assert any("EXECUTE tfm_revoke" in query for query in seen) == direct
    assert any("UPDATE tfm_feed" in query for query in seen) != direct
