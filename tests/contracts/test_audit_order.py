"""Facts about the ids of audit rows: a cursor that follows them misses nothing."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import select

from tests.support.failpoints import Failpoint
from tests.support.keys import insert_key
from tests.support.servers import wait_until
from tests.support.sql import execute
from tfm_guard.store import Store, Transaction, schema

Work = Callable[[Transaction], Any]


def work(name: str, *, changes: int) -> Work:
    """Return a transaction that makes *changes* keys, or none and says so once in the log."""

    async def make(transaction: Transaction) -> None:
        for number in range(changes):
            await insert_key(transaction, f"{name}{number:07}", account_id=name)
        if not changes:
            await transaction.audit(
                account_id=name,
                actor="a test",
                action="account.noted",
                target_type="account",
                target_id=name,
                target_name=name,
                meta={},
            )

    return make


def accounts_in(url: str) -> list[str]:
    """Return whose rows are in the audit log, in the order of their ids."""
    audit = schema.audit.c
    return [row.account_id for row in execute(url, select(audit.account_id).order_by(audit.id))]


def last_id(url: str) -> int:
    """Return the last id that an audit row was given, committed or not."""
    ((number,),) = execute(url, "SELECT last_value FROM tfm_audit_id_seq")
    assert isinstance(number, int)
    return number


def waits_for_a_lock(url: str) -> bool:
    """Tell whether somebody in the database waits for a lock."""
    query = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    return bool(execute(url, query))


@pytest.fixture
def before_commit() -> Iterator[Failpoint]:
    """Have every transaction wait when all its statements have run."""
    point = Failpoint("before COMMIT", dies=False)
    yield point
    point.remove()


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("second", [0, 1, 2])
async def test_ids_are_given_in_the_order_of_commits(
    postgres_store: Store, postgres_url: str, before_commit: Failpoint, first: int, second: int
) -> None:
    """While one transaction with audit rows is uncommitted, no other gets an id for its own."""
    one = asyncio.create_task(postgres_store.transact(work("a", changes=first)))
    await asyncio.to_thread(wait_until, lambda: before_commit.reached, what="the first's ids")
    rows = max(first, 1)
    assert last_id(postgres_url) == rows
    other = asyncio.create_task(postgres_store.transact(work("b", changes=second)))
    await asyncio.to_thread(wait_until, lambda: waits_for_a_lock(postgres_url), what="a wait")
    assert last_id(postgres_url) == rows
    assert accounts_in(postgres_url) == []
    before_commit.release()
    await asyncio.gather(one, other)
    assert accounts_in(postgres_url) == ["a"] * rows + ["b"] * max(second, 1)


async def test_no_change_is_numbered_for_an_audit_row_alone(
    store: Store, database_url: str
) -> None:
    """A transaction that changes no key leaves the feed as it was."""
    await store.transact(work("a", changes=1))
    assert (await store.transact(work("b", changes=0)))[1] == []
    assert execute(database_url, select(schema.feed.c.head)) == [(1,)]
    assert accounts_in(database_url) == ["a", "b"]
