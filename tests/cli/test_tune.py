"""`tfm-guard tune`: what it prints can be used, and nothing is left of what it measured."""

import asyncio
import json
from contextlib import ExitStack
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.support.guards import create, new_guard
from tests.support.redis import RedisServer
from tests.support.servers import free_port
from tests.support.sql import engine_for, execute
from tfm_guard.cli import main
from tfm_guard.cli.advice import (
    Advice,
    HashCost,
    Wishes,
    advise_cache,
    advise_database,
    advise_hashing,
    advise_redis,
    advise_times,
    least_passes,
)
from tfm_guard.cli.database import faults_of
from tfm_guard.cli.database import times as times_command
from tfm_guard.cli.measuring import (
    Crowd,
    DatabaseMeasures,
    Entries,
    RedisMeasures,
    Timing,
    measure_entries,
)
from tfm_guard.clock import SystemClock
from tfm_guard.settings import Settings
from tfm_guard.store import Room, Store, Times, schema

# So that hashing takes least.
SMALL = ("--argon2-mib", "7")
PRESENT = Settings(database_url="")
TIMES = Times(2.0, 60.0, 0.25, 1.0)
DATABASE = DatabaseMeasures(
    poll=Timing(0.0005, 0.002),
    reading=Crowd(4, 900.0, 1000.0),
    flush_seconds=0.06,
    admitted=None,
    account_id_bytes=4,
    name_bytes=2,
)
REDIS = RedisMeasures(Timing(0.0003, 0.001), Crowd(8, 4500.0, 5000.0))


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure with fewer calls: what comes out is not what is tested."""
    for name, count in (("CALLS", 5), ("CALLS_AT_ONCE", 16), ("_HASHES", 1), ("_FLUSHES", 1)):
        monkeypatch.setattr(f"tfm_guard.cli.measuring.{name}", count)


def run(url: str | None, *arguments: str, **variables: str) -> Result:
    """Run the command in this process, on the database at *url*."""
    env = {"TFM_GUARD_DATABASE_URL": url, **variables}
    result = CliRunner().invoke(main, ["tune", *SMALL, *arguments], env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def make_keys(url: str) -> None:
    """Make a database with a few keys, one of them used and one revoked."""

    async def work() -> None:
        async with new_guard(url) as guard:
            keys = [await create(guard) for _ in range(3)]
            await guard.verify(keys[0].token)
            await guard.keys.revoke("acme", keys[2].key.id)

    asyncio.run(work())


def rows(url: str) -> dict[str, list[Any]]:
    """Return every row of every table."""
    with engine_for(url).connect() as connection:
        return {
            table.name: sorted(map(repr, connection.execute(table.select())))
            for table in schema.metadata.sorted_tables
        }


def assignments(result: Result) -> dict[str, str]:
    """Return what the printed lines assign; all other lines are comments."""
    lines = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def by_name(advices: list[Advice]) -> dict[str, float]:
    """Return each value by its name."""
    return {advice.name: advice.value for advice in advices}


def test_nothing_is_left_and_the_lines_are_settings(
    database_url: str, redis_server: RedisServer
) -> None:
    """Every table is row for row as before, Redis is empty, and the lines load as settings."""
    make_keys(database_url)
    before = rows(database_url)
    result = run(database_url, TFM_GUARD_REDIS_URL=redis_server.url)
    assert result.exit_code == 0
    assert rows(database_url) == before
    assert before["tfm_keys"]
    with redis_server.client() as client:
        assert client.dbsize() == 0
    found = assignments(result)
    settings = Settings.load({"TFM_GUARD_DATABASE_URL": database_url, **found})
    assert found.keys() == {
        "TFM_GUARD_ARGON2_MEMORY_KIB",
        "TFM_GUARD_ARGON2_PARALLELISM",
        "TFM_GUARD_ARGON2_TIME_COST",
        "TFM_GUARD_DATABASE_POOL_SIZE",
        "TFM_GUARD_LOCAL_CACHE_SIZE",
        "TFM_GUARD_REDIS_POOL_SIZE",
        "TFM_GUARD_USAGE_FLUSH_SECONDS",
    }
    assert (settings.argon2_memory_kib, settings.argon2_time_cost) == (7 * 1024, 5)
    assert "not measured" not in result.output
    assert "rolled back" in result.stderr
    assert [word for word in ("argon2id", "database", "Redis") if word not in result.stderr] == []


def test_for_programs_each_has_its_value_its_present_value_and_its_reason(
    sqlite_url: str,
) -> None:
    """JSON has the settings by variable, the times by name, and what was not measured."""
    make_keys(sqlite_url)
    result = run(sqlite_url, "--json", "--processes", "3", TFM_GUARD_LOCAL_CACHE_SIZE="77")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    settings = {each["variable"]: each for each in found["settings"]}
    assert settings["TFM_GUARD_LOCAL_CACHE_SIZE"]["present"] == 77
    assert {each["name"] for each in found["times"]} == {
        *("lease_seconds", "poll_seconds", "linked_poll_seconds", "unfed_seconds"),
    }
    assert [each["what"] for each in found["not_measured"]] == ["Redis"]
    assert all(each["reason"] for each in [*found["settings"], *found["times"]])
    assert "(3)" in next(e["reason"] for e in found["times"] if e["name"] == "poll_seconds")


def test_without_tables_the_rest_is_measured_and_the_code_is_1(sqlite_url: str) -> None:
    """argon2 and memory need no database; a smaller budget of memory gives a smaller cache."""
    sizes = []
    for mib in ("128", "512"):
        result = run(sqlite_url, "--memory-mib", mib)
        assert result.exit_code == 1
        assert "the database's file is not there" in result.stderr
        found = assignments(result)
        assert "TFM_GUARD_USAGE_FLUSH_SECONDS" not in found
        sizes.append(int(found["TFM_GUARD_LOCAL_CACHE_SIZE"]))
    assert sizes[1] > 1_000_000
    assert 3.5 < sizes[1] / sizes[0] < 4.5


def test_a_database_that_does_not_answer_ends_with_3() -> None:
    """What needs none is printed all the same, and the password is nowhere."""
    result = run(f"postgresql://acme:hunter2@127.0.0.1:{free_port()}/keys")
    assert result.exit_code == 3
    assert "# not measured: the database\n" in result.stdout
    assert "check that the database runs" in result.stderr
    assert "Connection refused" in result.stderr
    assert "hunter2" not in result.output
    assert "TFM_GUARD_ARGON2_TIME_COST" in assignments(result)


def test_a_redis_that_does_not_answer_ends_with_3(sqlite_url: str) -> None:
    """The settings that need no Redis are printed, and the password is nowhere."""
    make_keys(sqlite_url)
    url = f"redis://:hunter2@127.0.0.1:{free_port()}/0"
    result = run(sqlite_url, TFM_GUARD_REDIS_URL=url)
    assert result.exit_code == 3
    assert "not measured: Redis: " in result.stderr
    assert "check that Redis runs" in result.stderr
    assert "hunter2" not in result.output
    found = assignments(result)
    assert "TFM_GUARD_DATABASE_POOL_SIZE" in found
    assert "TFM_GUARD_REDIS_POOL_SIZE" not in found


def test_tables_of_another_release_end_with_1(sqlite_url: str) -> None:
    """They are not measured, as their statements may be others."""
    make_keys(sqlite_url)
    execute(sqlite_url, "UPDATE tfm_schema_version SET version_num = '0000'")
    result = run(sqlite_url)
    assert result.exit_code == 1
    assert "at revision 0000" in result.stderr


def test_faulty_settings_end_it(sqlite_url: str) -> None:
    """They are told before anything is measured."""
    result = run(sqlite_url, TFM_GUARD_PLANS="{}")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "argon2id" not in result.stderr


def test_timing_a_flush_waits_for_nobody_and_keeps_nobody_waiting(postgres_url: str) -> None:
    """It ends while another holds the feed's head and every key, account and row of usage."""
    make_keys(postgres_url)

    async def work() -> float:
        store = Store(postgres_url, pool_size=1, clock=SystemClock())
        await store.open()
        try:
            return await store.time_flush(10)
        finally:
            await store.close()

    tables = (schema.feed, schema.keys, schema.accounts, schema.key_usage, schema.usage_hours)
    with engine_for(postgres_url).begin() as holder:
        for table in tables:
            assert holder.execute(table.select().with_for_update()).all()
        assert asyncio.run(work()) > 0


def test_connections_in_use_leave_less_room(postgres_url: str) -> None:
    """The server admits 200 but for the 3 it reserves; those that are open are not free."""

    async def work() -> Room | None:
        store = Store(postgres_url, pool_size=1, clock=SystemClock())
        await store.open()
        try:
            return await store.count_room()
        finally:
            await store.close()

    with ExitStack() as held:
        for _ in range(20):
            held.enter_context(engine_for(postgres_url).connect())
        room = asyncio.run(work())
    assert room is not None
    assert room.admitted == 197
    assert room.free < 177


@pytest.mark.parametrize(
    ("mib", "passes"), [(7, 5), (8, 5), (9, 4), (11, 4), (12, 3), (18, 3), (19, 2), (46, 1)]
)
def test_hashes_are_never_weaker_than_owasp_asks_for(mib: int, passes: int) -> None:
    """For each memory there is a least number of passes, also where less time is wanted."""
    assert least_passes(mib) == passes
    wishes = Wishes(hash_seconds=0.001, hash_mib=mib, memory_mib=64)
    found = list(advise_hashing(wishes, HashCost(0.02, 0.02), PRESENT))
    assert by_name(found)["argon2_time_cost"] == passes
    assert "though that is more than 1 ms" in found[1].reason


@pytest.mark.parametrize(
    ("mib", "milliseconds", "passes"),
    [(19, None, 2), (19, 45, 2), (19, 65, 3), (19, 10_000, 10), (256, 10_000, 2)],
)
def test_more_time_gives_more_passes(mib: int, milliseconds: int | None, passes: int) -> None:
    """As many as fit, at 20 ms each, up to what can be set and verified."""
    seconds = None if milliseconds is None else milliseconds / 1000
    wishes = Wishes(hash_seconds=seconds, hash_mib=mib, memory_mib=64)
    found = by_name(list(advise_hashing(wishes, HashCost(0.02, 0.02), PRESENT)))
    assert found["argon2_time_cost"] == passes
    Settings.load({}, database_url="sqlite:///x.db", **found)


def test_a_key_takes_what_the_readme_says() -> None:
    """With texts of 16 bytes each, at most 300 bytes, and 40 while its use is not yet written."""
    entries = measure_entries(16, 16)
    assert 200 < entries.key <= 345
    assert measure_entries(116, 16).key - entries.key == pytest.approx(100, abs=17)
    assert 50 < entries.refused < 150


def test_the_cache_fills_its_memory_and_no_more() -> None:
    """A key and a refused token of 100 bytes together: a million fit into 100 MiB."""
    wishes = Wishes(hash_seconds=None, hash_mib=19, memory_mib=100)
    assert advise_cache(wishes, Entries(60, 40), PRESENT).value == 1_040_000
    largest = wishes._replace(memory_mib=16_384)
    assert advise_cache(largest, Entries(60, 40), PRESENT).value == 10_000_000
    assert "more cannot be set" in advise_cache(largest, Entries(60, 40), PRESENT).reason


@pytest.mark.parametrize(("processes", "size"), [(1, 8), (4, 8), (7, 3), (9, 2), (1000, 1)])
def test_processes_share_the_servers_connections(processes: int, size: int) -> None:
    """All together take at most nine tenths of 97: two pools each, and five connections more."""
    measures = DATABASE._replace(admitted=97, reading=Crowd(8, 900.0, 1000.0))
    pool, _ = advise_database(processes, measures, PRESENT)
    assert pool.value == size
    assert ("admits no more" in pool.reason) == (1 < size < 8)
    assert ("PgBouncer" in pool.reason) == (size == 1)


def test_pools_are_not_below_four() -> None:
    """However fast one connection is, one slow query must not hold up all others."""
    alone = Crowd(1, 900.0, 1000.0)
    pool, _ = advise_database(1, DATABASE._replace(reading=alone), PRESENT)
    assert (pool.value, pool.present) == (4, 10)
    assert advise_redis(REDIS._replace(reading=alone), PRESENT).value == 4
    assert advise_redis(REDIS, PRESENT).value == 8


@pytest.mark.parametrize(
    ("room", "processes", "seconds"), [(None, 1, 5), (None, 20, 12), (None, 1000, 60), (97, 20, 5)]
)
def test_usage_is_written_for_a_tenth_of_the_time(
    room: int | None, processes: int, seconds: int
) -> None:
    """On SQLite, where all write one by one, many processes write less often."""
    _, flushing = advise_database(processes, DATABASE._replace(admitted=room), PRESENT)
    assert flushing.value == seconds


def test_the_times_of_new_tables_are_right_nearby() -> None:
    """Where reading the feed takes half a millisecond nothing has to change."""
    found = advise_times(8, TIMES, DATABASE, REDIS)
    assert [advice.value for advice in found] == [advice.present for advice in found]


def test_a_slow_database_needs_a_longer_lease() -> None:
    """Four of the slowest reads fit in it, each with the interval before it."""
    far = DATABASE._replace(poll=Timing(0.2, 0.6))
    found = by_name(advise_times(1, TIMES, far, REDIS))
    assert found["lease_seconds"] >= 4 * (found["poll_seconds"] + 0.6)
    assert found["lease_seconds"] <= 8


def test_many_processes_read_the_feed_less_often() -> None:
    """A thousand at half a millisecond each would keep two cores busy; the lease follows."""
    found = by_name(advise_times(1000, TIMES, DATABASE, None))
    assert 1000 / found["poll_seconds"] * 0.0005 <= 0.25
    assert found["linked_poll_seconds"] >= found["poll_seconds"]
    assert found["lease_seconds"] > 2 * found["poll_seconds"]


@pytest.mark.parametrize("processes", [1, 30, 1000, 10_000])
@pytest.mark.parametrize("slowest", [0.0, 0.01, 0.4, 1.0, 9.0])
def test_what_is_advised_goes_together(processes: int, slowest: float) -> None:
    """Whatever was measured, `tfm-guard db times` takes the times that follow from it."""
    far = DATABASE._replace(poll=Timing(slowest / 2, slowest))
    new = by_name(advise_times(processes, TIMES, far, REDIS))
    for name, value in new.items():
        (option,) = (param for param in times_command.params if param.name == name)
        assert option.type.convert(str(value), option, None) == value
    assert faults_of(TIMES._replace(**new)) == []


def test_what_has_to_change_is_told_as_a_command(sqlite_url: str) -> None:
    """The last line is the command that changes the times, and it is accepted."""
    make_keys(sqlite_url)
    execute(sqlite_url, "UPDATE tfm_settings SET value = '1.5' WHERE name = 'lease_seconds'")
    last = run(sqlite_url).stdout.splitlines()[-1]
    command = last.partition("tfm-guard ")[2].split()
    assert command[:2] == ["db", "times"]
    env = {"TFM_GUARD_DATABASE_URL": sqlite_url}
    assert CliRunner().invoke(main, command, env=env).exit_code == 0
    assert "db times" not in run(sqlite_url).stdout
