"""Facts about the usage of keys: every answer is counted, once, whatever becomes of its key."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select

from tests.support.guards import (
    create,
    local_of,
    new_guard,
    prepare,
    refusal,
    verifier_of,
    wrong_secret,
)
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.errors import InvalidInput, KeyNotFound
from tfm_guard.records import CreatedKey, KeyUsage
from tfm_guard.settings import Settings
from tfm_guard.store import schema
from tfm_guard.testing import ManualClock
from tfm_guard.usage import Usage

FLUSH_SECONDS = Settings(database_url="").usage_flush_seconds


def usage_of(guard: Guard) -> Usage:
    """Return what counts in an open guard."""
    usage: Usage = verifier_of(guard)._usage  # noqa: SLF001  # nothing else leads inside
    return usage


async def counted(guard: Guard, created: CreatedKey) -> tuple[int, int]:
    """Flush, and return how often a key was accepted and refused in the last 24 hours."""
    await usage_of(guard).flush()
    usage = await guard.keys.usage("acme", created.key.id)
    return usage.accepted, usage.refused


async def verify(guard: Guard, created: CreatedKey, times: int = 1) -> None:
    """Have a key accepted."""
    for _ in range(times):
        await guard.verify(created.token)


async def test_every_way_to_accept_a_key_counts(database_url: str) -> None:
    """From the database, from memory, and read anew once all is forgotten: each is one."""
    await prepare(database_url)
    async with new_guard(database_url) as guard:
        created, other = await create(guard), await create(guard)
        before = datetime.now(UTC)
        await verify(guard, created, 5)
        await verify(guard, other)
        assert guard.counters.store_reads == 2
        local_of(guard).clear()
        await verify(guard, created, 300)
        assert await counted(guard, created) == (305, 0)
        assert await counted(guard, other) == (1, 0)
        listed = {key.id: key.last_used_at for key in await guard.keys.list("acme")}
        last_used = listed[created.key.id]
        assert last_used is not None
        # PostgreSQL's clock is the machine's, too.
        assert before - timedelta(seconds=1) < last_used < datetime.now(UTC) + timedelta(seconds=1)
        assert await counted(guard, created) == (305, 0)


async def test_every_refusal_of_a_known_key_counts(database_url: str) -> None:
    """A wrong secret, known or forgotten, and a revoked key: asked for anew, or from memory."""
    await prepare(database_url)
    async with new_guard(database_url) as guard:
        created = await create(guard)
        wrong = wrong_secret(guard, created.key.key_prefix)
        assert await refusal(guard, wrong) == "wrong secret"  # found in the database
        assert await refusal(guard, wrong) == "wrong secret"  # the key is in memory now
        local_of(guard).clear()
        assert await refusal(guard, wrong) == "wrong secret"  # known to be wrong
        assert (guard.counters.store_reads, guard.counters.negative_hits) == (1, 1)
        await verify(guard, created)
        assert await counted(guard, created) == (1, 3)
        await guard.keys.revoke("acme", created.key.id)
        for _ in range(3):
            assert await refusal(guard, created.token) == "revoked"
        assert guard.counters.negative_hits == 3
        assert await counted(guard, created) == (1, 6)


async def test_a_token_of_no_key_leaves_no_trace(sqlite_url: str) -> None:
    """Forged tokens, and minted ones of prefixes that nobody has, take no memory and no row."""
    await prepare(sqlite_url)
    async with new_guard(sqlite_url) as guard:
        created = await create(guard)
        tagger = verifier_of(guard)._tagger  # noqa: SLF001  # nothing else leads inside
        for number in range(100):
            await refusal(guard, tagger.mint(number.to_bytes(20, "big")))
        await refusal(guard, created.token[:-1] + "x")
        assert repr(usage_of(guard)) == "Usage(0 keys used, 0 hours of keys kept)"
        await usage_of(guard).flush()
        assert guard.counters.usage_flushes == 0


async def test_what_was_used_counts_whatever_becomes_of_it(database_url: str) -> None:
    """Entries evicted, replaced, dropped by a revocation or forgotten are counted all the same."""
    await prepare(database_url)
    async with new_guard(database_url, local_cache_size=1) as guard:
        one, two, three = [await create(guard) for _ in range(3)]
        for _ in range(4):
            await verify(guard, one, 3)
            await verify(guard, two, 2)
        await verify(guard, three, 6)
        await guard.keys.revoke("acme", three.key.id)
        await verify(guard, one, 2)
        local_of(guard).clear()
        assert len(local_of(guard)) == 0
        assert await counted(guard, one) == (14, 0)
        assert await counted(guard, two) == (8, 0)
        assert await counted(guard, three) == (6, 0)


async def test_what_waits_to_be_counted_is_bounded(sqlite_url: str) -> None:
    """With room for 10 keys, no more than 20 entries wait, however many keys come and go."""
    await prepare(sqlite_url)
    async with new_guard(sqlite_url, local_cache_size=10) as guard:
        made = [await create(guard, name=str(number)) for number in range(40)]
        for _ in range(10):
            for created in made:
                await verify(guard, created, 3)
                assert len(local_of(guard).used) <= 20
        assert [await counted(guard, created) for created in made] == [(30, 0)] * 40


async def test_too_much_is_dropped_and_said(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound requests with further keys are not counted; how many, a counter tells."""
    monkeypatch.setattr("tfm_guard.usage._MOST_KEPT", 2)
    await prepare(sqlite_url)
    async with new_guard(sqlite_url) as guard:
        made = [await create(guard) for _ in range(4)]
        for created in made:
            await verify(guard, created, 5)
        assert guard.counters.usage_dropped == 2  # the rest waits in memory's own entries
        for _ in range(3):
            await usage_of(guard).flush()
        assert [await counted(guard, created) for created in made] == [(5, 0)] * 2 + [(4, 0)] * 2
        assert guard.counters.usage_dropped == 2


async def test_usage_is_written_every_five_seconds(sqlite_url: str) -> None:
    """It is there after one interval, and what came since, after another; unused, nothing is."""
    await prepare(sqlite_url)
    clock = ManualClock()
    async with new_guard(sqlite_url, clock=clock) as guard:
        created = await create(guard)
        for number in (1, 2):
            await verify(guard, created, 10)
            await clock.pass_time(FLUSH_SECONDS)
            usage = await guard.keys.usage("acme", created.key.id)
            assert usage.accepted == 10 * number
            assert guard.counters.usage_flushes == number
        await clock.pass_time(4 * FLUSH_SECONDS)
        assert guard.counters.usage_flushes == 2


async def test_the_interval_is_a_setting(sqlite_url: str) -> None:
    """With 60 s between two flushes nothing is written in the 58 s after one."""
    await prepare(sqlite_url)
    clock = ManualClock()
    async with new_guard(sqlite_url, clock=clock, usage_flush_seconds=60) as guard:
        created = await create(guard)
        await verify(guard, created)
        while guard.counters.usage_flushes == 0:
            await clock.pass_time(1)
        await verify(guard, created)
        await clock.pass_time(58)
        assert guard.counters.usage_flushes == 1
        await clock.pass_time(2)
        assert guard.counters.usage_flushes == 2


async def test_closing_writes_what_is_left(database_url: str) -> None:
    """Nothing that was counted is lost with the process, if it is told to end."""
    await prepare(database_url)
    async with new_guard(database_url) as guard:
        created = await create(guard)
        await verify(guard, created, 7)
    (row,) = execute(database_url, select(schema.usage_hours))
    assert (row.key_id, row.accepted, row.refused) == (created.key.id, 7, 0)


async def test_what_cannot_be_written_is_kept(
    sqlite_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While the database is away counts add up and one line is logged; then each counts once."""
    await prepare(sqlite_url)
    clock = ManualClock()
    file, away = tmp_path / "tfm_guard.db", tmp_path / "away.db"
    async with new_guard(sqlite_url, clock=clock) as guard:
        created = await create(guard)
        await verify(guard, created, 10)
        file.rename(away)
        for _ in range(3):
            await clock.pass_time(FLUSH_SECONDS)
            await verify(guard, created, 5)
        assert guard.counters.usage_failures == 3
        away.rename(file)
        await clock.pass_time(FLUSH_SECONDS)
        usage = await guard.keys.usage("acme", created.key.id)
        assert usage.accepted == 25
        assert guard.counters.usage_flushes == 2  # what was tried first, and the rest
    lines = [each.message for each in caplog.records if each.name == "tfm_guard.usage"]
    assert [line.partition(":")[0] for line in lines] == [
        "usage cannot be written, and is kept for now",
        "usage is written again",
    ]


async def test_what_was_written_without_an_answer_counts_once(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the answer to COMMIT is lost, the same batch is written again and changes nothing."""
    await prepare(sqlite_url)
    clock = ManualClock()
    async with new_guard(sqlite_url, clock=clock) as guard:
        created = await create(guard)
        await verify(guard, created, 10)
        store: Any = guard._store  # noqa: SLF001  # nothing else leads inside
        add_usage = store.add_usage

        async def lose_the_answer(*args: Any) -> None:
            await add_usage(*args)
            raise ConnectionResetError

        with monkeypatch.context() as patch:
            patch.setattr(store, "add_usage", lose_the_answer)
            await clock.pass_time(2 * FLUSH_SECONDS)
            await verify(guard, created, 3)
        assert guard.counters.usage_failures == 2
        assert await counted(guard, created) == (13, 0)


async def test_a_batch_of_unknown_fate_is_given_up_before_its_id_is_forgotten(
    sqlite_url: str, tmp_path: Path
) -> None:
    """After an hour it is dropped, as then nobody could tell whether it had been counted."""
    await prepare(sqlite_url)
    clock = ManualClock()
    file, away = tmp_path / "tfm_guard.db", tmp_path / "away.db"
    async with new_guard(sqlite_url, clock=clock) as guard:
        created = await create(guard)
        await verify(guard, created, 10)
        file.rename(away)
        await clock.pass_time(FLUSH_SECONDS)
        await verify(guard, created, 4)
        clock.advance(3600)
        away.rename(file)
        assert await counted(guard, created) == (4, 0)
        assert guard.counters.usage_dropped == 10


async def test_a_process_that_flushes_late_revives_nothing(database_url: str) -> None:
    """A key revoked after its use and before the flush is refused by all as before, and shown."""
    await prepare(database_url)
    async with new_guard(database_url) as one:
        created = await create(one)
        await verify(one, created, 3)
        async with new_guard(database_url) as two:
            revoking = asyncio.create_task(two.keys.revoke("acme", created.key.id))
            await verifier_of(one)._freshness.poll()  # noqa: SLF001  # nothing else leads inside
            while not revoking.done():
                await verifier_of(one)._freshness.poll()  # noqa: SLF001
            await usage_of(one).flush()
            for guard in (one, two):
                assert await refusal(guard, created.token) == "revoked"
            assert await counted(two, created) == (3, 1)
            assert await two.keys.list("acme") == []


async def test_usage_is_shown_in_full_ranges(sqlite_url: str) -> None:
    """24 or 168 hours, 30 or 90 days of UTC; the oldest first, without gaps, the last is now."""
    await prepare(sqlite_url)
    clock = ManualClock(datetime(2030, 3, 1, 10, 40, tzinfo=UTC))
    async with new_guard(sqlite_url, clock=clock) as guard:
        created = await create(guard)
        for hours in (0, 11, 13, 24, 24 * 7, 24 * 40):
            clock.advance(hours * 3600)
            await verify(guard, created, 1)
            await refusal(guard, wrong_secret(guard, created.key.key_prefix))
            await usage_of(guard).flush()
        now = clock.now()  # 10:40, 49 days later
        assert now == datetime(2030, 4, 19, 10, 40, tzinfo=UTC)
        this_hour = now.replace(minute=0)
        today = now.replace(hour=0, minute=0)
        expected = {
            "24h": ("hour", 24, this_hour, {0: 1}),
            "7d": ("hour", 168, this_hour, {0: 1}),
            "30d": ("day", 30, today, {0: 1}),
            "90d": ("day", 90, today, {0: 1, 40: 1, 47: 1, 48: 1, 49: 2}),
        }
        for name, (unit, count, last, uses) in expected.items():
            usage: KeyUsage = await guard.keys.usage("acme", created.key.id, range=name)  # type: ignore[arg-type]
            assert (usage.range, usage.unit, len(usage.buckets)) == (name, unit, count)
            step = timedelta(hours=1) if unit == "hour" else timedelta(days=1)
            starts = [last - n * step for n in reversed(range(count))]
            assert [bucket.start for bucket in usage.buckets] == starts
            found = {n: bucket.accepted for n, bucket in enumerate(reversed(usage.buckets))}
            assert {n: accepted for n, accepted in found.items() if accepted} == uses
            assert usage.accepted == usage.refused == sum(uses.values())


async def test_the_usage_of_many_keys_is_that_of_each(database_url: str) -> None:
    """Asked for together, each key has its own counts, also one that was never used, and no key."""
    await prepare(database_url)
    async with new_guard(database_url) as guard:
        created = [await create(guard) for _ in range(3)]
        await verify(guard, created[0], 4)
        await verify(guard, created[1])
        await refusal(guard, wrong_secret(guard, created[1].key.key_prefix))
        await usage_of(guard).flush()
        keys = [each.key for each in created]
        found = await guard.keys.usage_of(keys, range="90d")
        assert found == {
            key.id: await guard.keys.usage("acme", key.id, range="90d") for key in keys
        }
        assert [(found[key.id].accepted, found[key.id].refused) for key in keys] == [
            (4, 0),
            (1, 1),
            (0, 0),
        ]
        assert await guard.keys.usage_of([]) == {}


async def test_usage_is_shown_to_nobody_else(sqlite_url: str) -> None:
    """Another account's key and one that never was are not found; no range is made up."""
    await prepare(sqlite_url)
    async with new_guard(sqlite_url) as guard:
        created = await create(guard)
        for account_id, key_id in (("evil", created.key.id), ("acme", uuid4())):
            with pytest.raises(KeyNotFound):
                await guard.keys.usage(account_id, key_id)
        with pytest.raises(InvalidInput):
            await guard.keys.usage("acme", created.key.id, range="1y")  # type: ignore[arg-type]


async def test_closing_does_not_wait_for_a_database_that_is_away(
    sqlite_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The guard closes, and the log says that the usage of the last seconds is lost."""
    caplog.set_level(logging.ERROR)
    await prepare(sqlite_url)
    async with new_guard(sqlite_url) as guard:
        await verify(guard, await create(guard))
        (tmp_path / "tfm_guard.db").rename(tmp_path / "away.db")
    assert "the usage of the last seconds is lost" in caplog.text
