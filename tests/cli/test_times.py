"""`tfm-guard db times`: what all processes share changes only while none runs."""

import asyncio
import json
import os
import socket
import time
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from click.testing import CliRunner, Result

from tests.support.guards import create, freshness_of, new_guard, prepare, verifier_of
from tests.support.sql import engine_for, execute
from tfm_guard.cli import main
from tfm_guard.clock import SystemClock
from tfm_guard.errors import Unavailable
from tfm_guard.store import Installation, Store, Times, schema


def run(url: str, *arguments: str) -> Result:
    """Run the command in this process, on the database at *url*."""
    env = {"TFM_GUARD_DATABASE_URL": url}
    result = CliRunner().invoke(main, ["db", "times", *arguments], env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def make_tables(url: str) -> None:
    """Make the tables at *url*."""
    env = {"TFM_GUARD_DATABASE_URL": url}
    assert CliRunner().invoke(main, ["db", "upgrade"], env=env).exit_code == 0


def shared(url: str) -> dict[str, str]:
    """Return what all processes share."""
    return dict(map(tuple, execute(url, schema.settings.select())))


def test_without_options_the_times_are_printed(sqlite_url: str) -> None:
    """Those of new tables are told with their seconds, and for programs as numbers."""
    make_tables(sqlite_url)
    before = shared(sqlite_url)
    assert run(sqlite_url).stdout.split() == [
        *("time", "seconds", "lease_seconds", "2", "unfed_seconds", "60"),
        *("poll_seconds", "0.25", "linked_poll_seconds", "1"),
    ]
    assert json.loads(run(sqlite_url, "--json").stdout)["poll_seconds"] == 0.25
    assert shared(sqlite_url) == before


def test_they_change_while_no_process_runs(database_url: str) -> None:
    """What is named changes and nothing else; a guard that opens then has the new times."""
    make_tables(database_url)
    before = shared(database_url)
    result = run(database_url, "--lease-seconds", "3.5", "--poll-seconds", "0.5", "--json")
    assert result.exit_code == 0
    changed = {"lease_seconds": "3.5", "poll_seconds": "0.5"}
    assert shared(database_url) == before | changed

    async def lease_of_a_guard() -> float:
        async with new_guard(database_url) as guard:
            installation: Installation = verifier_of(guard)._freshness._installation  # noqa: SLF001
            return installation.lease

    assert asyncio.run(lease_of_a_guard()) == 3.5


def test_a_process_in_the_register_keeps_them(database_url: str) -> None:
    """While one is there nothing changes, and the message names it by host and process id."""
    make_tables(database_url)
    before = shared(database_url)

    async def change_meanwhile() -> Result:
        async with new_guard(database_url):
            return await asyncio.to_thread(run, database_url, "--lease-seconds", "3")

    result = asyncio.run(change_meanwhile())
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"in the register: {socket.gethostname()}:{os.getpid()}" in result.stderr
    assert shared(database_url) == before


CHANGE = ("--lease-seconds", "3", "--unfed-seconds", "10", "--ended")


def test_of_the_dead_nobody_is_left(database_url: str) -> None:
    """With --ended they change once whoever may live cannot trust its memory any more."""
    asyncio.run(prepare(database_url, lease=0.02, poll=0.01))
    enter = schema.workers.insert().values(
        id=uuid4(), name="dead", seen=0, turn=0, registered_at=datetime.now(UTC)
    )
    execute(database_url, enter)
    started = time.monotonic()
    done = run(database_url, *CHANGE)
    assert time.monotonic() - started >= 0.62
    assert (done.exit_code, done.stderr) == (
        0,
        "Waiting 0.62 s, for none of them to trust its memory.\n",
    )
    assert shared(database_url)["lease_seconds"] == "3"
    assert execute(database_url, schema.workers.select()) == []


def test_who_was_taken_for_dead_and_lives_keeps_them(database_url: str) -> None:
    """It registers anew while --ended waits, and is named: nothing changes, and it goes on."""
    asyncio.run(prepare(database_url, lease=0.2, poll=0.05))
    before = shared(database_url)

    async def change_meanwhile() -> Result:
        async with new_guard(database_url) as guard:
            created = await create(guard)
            done = await asyncio.to_thread(run, database_url, *CHANGE)
            assert (await guard.verify(created.token)).key_id == created.key.id
            await guard.keys.revoke("acme", created.key.id)
        return done

    result = asyncio.run(change_meanwhile())
    assert result.exit_code == 1
    assert f"in the register: {socket.gethostname()}:{os.getpid()}" in result.stderr
    assert shared(database_url) == before


async def test_who_knows_other_times_stays_out(database_url: str) -> None:
    """A process that opened with former times cannot register, and trusts nothing."""
    await prepare(database_url)
    async with new_guard(database_url) as guard:
        execute(database_url, schema.workers.delete())
        times = schema.settings.c
        lease = schema.settings.update().where(times.name == "lease_seconds")
        execute(database_url, lease.values(value="3"))
        with pytest.raises(Unavailable) as caught:
            await freshness_of(guard).poll()
        assert "must be started anew" in caught.value.reason
        assert not freshness_of(guard).is_fresh()
        assert execute(database_url, schema.workers.select()) == []


async def test_who_is_just_entering_the_register_is_waited_for(postgres_url: str) -> None:
    """A process whose row is not yet committed, and that knows the former times, keeps them."""
    store = Store(postgres_url, pool_size=1, clock=SystemClock())
    await store.open()
    entering = schema.workers.insert().values(
        id=uuid4(), name="entering", seen=0, turn=0, registered_at=datetime.now(UTC)
    )
    with engine_for(postgres_url).begin() as connection:
        connection.execute(entering)
        changing = asyncio.create_task(store.change_times(Times(3.0, 60.0, 0.25, 1.0)))
        waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'tfm_workers'::regclass"
        while execute(postgres_url, f"{waiting} AND NOT granted")[0][0] == 0:
            assert not changing.done()
            await asyncio.sleep(0)
    assert await changing == ["entering"]
    assert shared(postgres_url)["lease_seconds"] == "2"
    await store.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--lease-seconds", "1", "--poll-seconds", "0.6"],
            "--lease-seconds 1: it must be at least twice as long as --poll-seconds 0.6",
        ),
        (
            ["--linked-poll-seconds", "2"],
            "--lease-seconds 2: it must be longer than --linked-poll-seconds 2",
        ),
        (
            ["--lease-seconds", "15", "--unfed-seconds", "20"],
            "--unfed-seconds 20: it must be at least twice as long as --lease-seconds 15",
        ),
    ],
)
def test_times_that_do_not_go_together_are_refused(
    sqlite_url: str, options: list[str], words: str
) -> None:
    """Each contradiction is told, and nothing changes."""
    make_tables(sqlite_url)
    before = shared(sqlite_url)
    result = run(sqlite_url, *options)
    assert result.exit_code == 1
    assert words in result.stderr
    assert shared(sqlite_url) == before


@pytest.mark.parametrize(
    "options", [["--lease-seconds", "0.5"], ["--lease-seconds", "21"], ["--ended"]]
)
def test_what_cannot_be_a_time_is_a_usage_error(sqlite_url: str, options: list[str]) -> None:
    """A value out of its range, or --ended with nothing to change, ends with 2."""
    assert run(sqlite_url, *options).exit_code == 2


def test_without_tables_there_are_no_times(sqlite_url: str) -> None:
    """The code is 1, and what to run is told."""
    result = run(sqlite_url)
    assert result.exit_code == 1
    assert "tfm-guard db upgrade" in result.stderr
