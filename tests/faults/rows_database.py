"""Faults of the database, and of the way to it."""

import asyncio
import contextlib
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
from sqlalchemy import func, select

from tests.faults.deployment import APP, Deployment, Servers, Shape, until
from tests.faults.load import REVOKED
from tests.faults.rows_redis import check_revoked, meanwhile
from tests.faults.trial import Row, Stage
from tests.support.breaks import BREAKS
from tests.support.guards import create, new_guard, prepare, store_of
from tests.support.postgres import PostgresServer
from tests.support.rough_way import STALLED
from tests.support.servers import ROOT
from tests.support.sql import execute
from tests.support.uvicorn_process import UvicornProcess
from tfm_guard import Guard
from tfm_guard.errors import KeyNotFound
from tfm_guard.records import CreatedKey
from tfm_guard.store import schema

_SQLITE = Shape(workers=2, database="sqlite", redis=False)
_NO_REDIS = Shape(redis=False)
_LEASE_SECONDS = 2.0


def _check_unavailable(stage: Stage, worker: int) -> None:
    """Ask with a key that no process knows: nobody can say, and soon."""
    told = stage.deployment.ask(worker, stage.cold.token)
    seconds = told.returned - told.began
    stage.expect(told.status == 503, f"a key that is not known got {told.status or 'no answer'}")
    stage.expect("retry-after: " in told.head, "no Retry-After")
    stage.expect(seconds <= 1.2, f"it took {seconds:.2f} s")
    stage.notes.append(f"{told.status} after {seconds:.2f} s")


def _killed_and_cold(stage: Stage) -> None:
    stage.begin()
    stage.deployment.postgres.kill()
    for worker in range(len(stage.deployment.workers)):
        _check_unavailable(stage, worker)
    stage.deployment.postgres.start()
    accepted = until(lambda: stage.deployment.ask(0, stage.cold.token).status == 200, "a 200", 5.0)
    stage.expect(accepted, "not accepted 5 s after")
    check_revoked(stage)
    stage.watch(1.0)
    stage.end(unavailable=True)


def _frozen(stage: Stage) -> None:
    deployment = stage.deployment
    stage.begin()
    deployment.postgres.freeze()
    _check_unavailable(stage, 1)
    stage.watch(3.0)
    deployment.postgres.thaw()

    def idle() -> bool:
        return all(worker.state()["connections"] <= 2 for worker in deployment.workers)

    stage.expect(until(idle, "connections given back", 5.0), "connections were not given back")
    stage.expect(until(lambda: deployment.is_well(deployment.admin), "well", 5.0), "not well")
    check_revoked(stage)
    stage.watch(1.5)
    stage.end(unavailable=True)


def _both_frozen(stage: Stage) -> None:
    stage.begin()
    frozen = time.monotonic()
    stage.deployment.redis.freeze()
    stage.deployment.postgres.freeze()
    stage.watch(_LEASE_SECONDS + 2.0)
    stage.since = frozen + _LEASE_SECONDS
    refused = stage.count(REVOKED, 0, status=401)
    stage.expect(refused == 0, f"{refused} refused")
    stage.how = "503 after the lease"
    stage.end(unavailable=True)


def _cut_off(stage: Stage) -> None:
    stage.begin()
    stage.deployment.to_redis(STALLED, [1])
    stage.deployment.to_database(STALLED, [1])
    check_revoked(stage)
    stage.watch(2.0)
    stage.end(excused=(1,))


def _write_locked(stage: Stage) -> None:
    deployment = stage.deployment
    stage.begin()
    path = deployment.url.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        deleted = stage.revoke()
        stage.expect(deleted.status == 503, f"revoking answered {deleted.status}")
        stage.expect(deleted.seconds <= 5.5, f"revoking took {deleted.seconds:.1f} s")
        created = deployment.workers[1].call(
            "POST", "/v1/api-keys/", deployment.admin, {"name": "too late"}
        )
        stage.expect(created.status == 503, f"creating answered {created.status}")
        stage.watch(max(began + 10.0 - time.monotonic(), 0) if stage.full else 0.5)
        other.execute("ROLLBACK")
    check_revoked(stage, within=5.5)
    stage.took, stage.how = deleted.seconds, f"{deleted.status}, then {stage.how}"
    stage.watch(1.0)
    stage.end()


def _create_and_delete(deployment: Deployment, number: int) -> list[int]:
    """Create a key and delete it; return the statuses."""
    worker = deployment.workers[number % len(deployment.workers)]
    created = worker.call("POST", "/v1/api-keys/", deployment.admin, {"name": f"key {number}"})
    if created.status != 201:
        return [created.status]
    path = f"/v1/api-keys/{created.json['id']}"
    return [created.status, worker.call("DELETE", path, deployment.admin).status]


def _check_many_changes(stage: Stage, count: int) -> None:
    with ThreadPoolExecutor(count) as threads:
        work = (threads.submit(_create_and_delete, stage.deployment, n) for n in range(count))
        statuses = [each.result() for each in list(work)]
    bad = [some for some in statuses if some != [201, 204]]
    stage.expect(not bad, f"{len(bad)} of {count} answered {bad[:1]}")


def _many_at_once(stage: Stage) -> None:
    stage.begin()
    _check_many_changes(stage, 20)
    check_revoked(stage)
    stage.watch(1.0)
    stage.end()


@contextlib.contextmanager
def _crossing(url: str, times: int) -> Iterator[None]:
    """Take the two locks of a change, in the other order, so that one of the two must give way."""

    def cross(done: threading.Event) -> None:
        with psycopg.connect(url) as connection:
            # The other one finds the deadlock first, and is the one that is ended.
            connection.execute("SET deadlock_timeout = '10s'")
            for _ in range(times):
                connection.execute("UPDATE tfm_feed SET head = head")
                done.wait(0.1)
                connection.execute("SELECT 1 FROM tfm_accounts FOR UPDATE")
                connection.commit()
                done.wait(0.1)

    with meanwhile(cross):
        yield


def _deadlocked(stage: Stage) -> None:
    stage.begin()
    before = _deadlocks(stage.deployment)
    with _crossing(stage.deployment.url, 2):
        _check_many_changes(stage, 5)
    if not until(lambda: _deadlocks(stage.deployment) > before, "a deadlock", 3.0):
        stage.untried.append("there was no deadlock")
    check_revoked(stage)
    stage.watch(1.0)
    stage.end()


def _deadlocks(deployment: Deployment) -> int:
    (row,) = execute(
        deployment.url,
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()",
    )
    return int(row.deadlocks)


def _at_the_limit(stage: Stage) -> None:
    deployment = stage.deployment
    account = f"limited {len(deployment.workers)} {time.monotonic()}"
    token = deployment.background.run(_first_of(deployment.url, account, 4))

    def ask(number: int) -> int:
        worker = deployment.workers[number % len(deployment.workers)]
        return worker.call("POST", "/v1/api-keys/", token, {"name": f"key {number}"}).status

    with ThreadPoolExecutor(50) as threads:
        statuses = list(threads.map(ask, range(50)))
    keys = schema.keys.c
    (row,) = execute(
        deployment.url, select(func.count().label("count")).where(keys.account_id == account)
    )
    stage.notes.append(f"{statuses.count(201)} of 50 created at limit - 1")
    stage.expect(row.count <= 5, f"{row.count} keys where 5 are allowed")
    stage.expect(statuses.count(201) == 1, f"{statuses.count(201)} were created")
    stage.expect({*statuses} <= {201, 403}, f"answers {sorted({*statuses})}")


async def _first_of(url: str, account: str, count: int) -> str:
    """Put a new account on the plan "few", with some keys; return a token that may create more."""
    async with new_guard(url, plans={"free": 2, "few": 5}) as guard:
        await guard.accounts.set_plan(account, "few")
        made = [
            await guard.keys.create(
                account_id=account, name=f"first {n}", scopes=("send", "api-keys:write")
            )
            for n in range(count)
        ]
        return made[0].token


def _first_start(stage: Stage) -> None:
    servers, off = stage.deployment.servers, stage.off
    urls = [servers.new_database() for _ in range(20)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.first_start", off, *urls],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    stage.notes.append(f"{len(urls)} first starts")
    error = next((line for line in done.stderr.splitlines() if line.startswith("Error: ")), "")
    stage.expect(done.returncode == 0, f"not all started: {error}")
    for url in urls:
        feeds = execute(url, select(schema.feed)) if done.returncode == 0 else [None]
        stage.expect(len(feeds) == 1, f"{len(feeds)} feeds where one belongs")
    if stage.full and not off:
        env = {"TFM_GUARD_DATABASE_URL": servers.new_database()}
        with UvicornProcess(APP, env=env, workers=8, ready_path="/control/state") as server:
            stage.expect("cannot be opened" not in server.output, "a worker did not start")


def _disk_full(stage: Stage) -> None:
    deployment = stage.deployment
    stage.begin()
    limits = []
    for worker in deployment.workers:
        limits.append(resource.prlimit(worker.pid, resource.RLIMIT_FSIZE))
        resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (4096, limits[-1][1]))
    deleted = stage.revoke()
    stage.expect(deleted.status == 503, f"revoking answered {deleted.status}")
    stage.watch(0.5)
    for worker, limit in zip(deployment.workers, limits, strict=True):
        resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, limit)
    check_revoked(stage)
    stage.took, stage.how = deleted.seconds, f"{deleted.status}, then {stage.how}"
    stage.watch(1.0)
    stage.end()


def _late_commit(stage: Stage) -> None:
    """Hold one change back before its COMMIT while a key is revoked."""
    deployment = stage.deployment
    stage.begin()
    # Of another account: changes of one account wait for each other anyway.
    token = deployment.background.run(_first_of(deployment.url, f"other {time.monotonic()}", 1))
    made = deployment.workers[0].call("POST", "/v1/api-keys/", token, {"name": "other"}).json
    head = _highest(deployment)
    deployment.workers[0].control("failpoint", point="before COMMIT", does="hold")
    path, less = f"/v1/api-keys/{made['id']}", {"permissions": list[str]()}
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(deployment.workers[0].call, "PATCH", path, token, less)
        until(lambda: bool(deployment.workers[0].state()["reached"]), "the point", 5.0)
        second = threads.submit(stage.revoke, 1)
        overtaken = until(lambda: _highest(deployment) > head, "an overtaking change", 0.7)
        deployment.workers[0].control("release")
        statuses = first.result().status, second.result().status
    stage.expect(not overtaken, "a change was seen before an earlier one")
    stage.expect(statuses == (200, 204), f"answers {statuses}")
    stage.watch(1.5)
    stage.end()


def _highest(deployment: Deployment) -> int:
    (row,) = execute(deployment.url, select(func.max(schema.changes.c.id).label("id")))
    return int(row.id or 0)


def _promoted(stage: Stage) -> None:
    """Revoke on a primary with a synchronous standby, end it, and ask the promoted standby."""
    own = Servers(stage.deployment.background)
    with contextlib.ExitStack() as ending:
        ending.callback(own.close)
        deployment = Deployment(own, Shape(workers=2))
        ending.callback(deployment.close)
        deployment.start()
        if stage.off:
            deployment.break_all(stage.off)
        standby = ending.enter_context(_standby_of(own.postgres))
        stage.deployment = deployment
        stage.begin()
        standby.freeze()
        lost = stage.revoke()
        stage.expect(lost.status == 503, f"revoking answered {lost.status} with no standby")
        standby.thaw()
        stage.watch(1.0)
        check_revoked(stage)
        own.postgres.kill()
        standby.promote()
        for worker in deployment.workers:
            worker.ways["database"].target = standby.port
        stage.watch(4.0)
        (row,) = execute(
            standby.url(deployment.url.rpartition("/")[2]),
            schema.keys.select().where(schema.keys.c.prefix == stage.key.prefix),
        )
        stage.expect(row.revoked_at is not None, "the revocation was lost")
        stage.end(unavailable=True)


class _Standby(PostgresServer):
    def __init__(self, primary: PostgresServer) -> None:
        super().__init__()
        self._primary = primary

    def _initialise(self) -> None:
        if self._run("postgres", "--version").returncode != 0:
            self._copy_binaries()
        where = f"host=127.0.0.1 port={self._primary.port} user=postgres"
        done = self._run(
            "pg_basebackup", "-d", where, "-D", str(self.data), "-R", "-c", "fast", "--no-sync"
        )
        assert done.returncode == 0, done.stdout

    def promote(self) -> None:
        """Make it a primary."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")


@contextlib.contextmanager
def _standby_of(primary: PostgresServer) -> Iterator[_Standby]:
    with (
        _Standby(primary) as standby,
        psycopg.connect(primary.url("postgres"), autocommit=True) as connection,
    ):
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        connection.execute("SELECT pg_reload_conf()")
        yield standby


def _cancelled(stage: Stage) -> None:
    """Cancel revoking after each of its steps in turn, in a process of our own."""
    url = stage.deployment.servers.new_database()
    done = asyncio.run(_cancel_at_each_step(url, stage.off, every=1 if stage.full else 5))
    cancelled, leaked, wrong = done
    stage.notes.append(f"cancelled at {cancelled} points")
    stage.expect(leaked == 0, f"{leaked} connections were not given back")
    stage.expect(wrong == 0, f"{wrong} keys were half revoked")
    if cancelled < 10:
        stage.untried.append(f"cancelled only {cancelled} times")


async def _cancel_at_each_step(url: str, off: str, *, every: int) -> tuple[int, int, int]:
    await prepare(url, lease=2.0, poll=0.05)
    cancelled = leaked = wrong = 0
    async with new_guard(url) as guard:
        undo = BREAKS[off]() if off else None
        try:
            for steps in range(0, 10_000, every):
                created = await create(guard)
                if await _revoke_for(guard, created, steps):
                    break
                cancelled += 1
                leaked = await _checked_out(guard)
                wrong += await asyncio.to_thread(_is_half_revoked, url, created)
                if leaked:
                    break
                wrong += not await _ends(guard, created)
        finally:
            if undo:
                undo()
    return cancelled, leaked, wrong


async def _revoke_for(guard: Guard, created: CreatedKey, steps: int) -> bool:
    """Let revoking go on for so many turns of the event loop; tell whether that was enough."""
    task = asyncio.ensure_future(guard.keys.revoke("acme", created.key.id))
    for _ in range(steps):
        await asyncio.sleep(0)
        if task.done():
            await task
            return True
    task.cancel()
    await asyncio.wait({task})
    return not task.cancelled()


async def _checked_out(guard: Guard) -> int:
    """Return how many connections are still in use when those at work have had time to end."""
    database: Any = store_of(guard)._database  # noqa: SLF001  # nothing else leads inside
    in_use = 0
    for _ in range(200):
        in_use = database._changing.in_use  # noqa: SLF001
        if not in_use:
            return 0
        await asyncio.sleep(0.01)
    return in_use


def _is_half_revoked(url: str, created: CreatedKey) -> bool:
    """Tell whether the key's row says something else about its revocation than the feed."""
    prefix = created.key.key_prefix
    (row,) = execute(url, schema.keys.select().where(schema.keys.c.prefix == prefix))
    told = execute(
        url,
        schema.changes.select().where(
            schema.changes.c.prefix == prefix, schema.changes.c.kind == "revoked"
        ),
    )
    return (row.revoked_at is not None) != bool(told)


async def _ends(guard: Guard, created: CreatedKey) -> bool:
    """Tell whether revoking the key (again) ends it, as if nothing had been."""
    with contextlib.suppress(KeyNotFound):  # confirmed, just before it was cancelled
        await guard.keys.revoke("acme", created.key.id)
    return created.key.id not in {key.id for key in await guard.keys.list("acme")}


ROWS = [
    Row(
        number=32,
        name="database killed, key not known",
        promise="503 within 1 s, never 401",
        trial=_killed_and_cold,
        off="unavailable_is_no",
        shows="a key that is not known got",
    ),
    Row(
        number=33,
        name="database frozen",
        promise="503 within 1 s; every connection is given back afterwards",
        trial=_frozen,
        off="no_deadline",
        shows="a key that is not known got",
    ),
    Row(
        number=34,
        name="database and Redis frozen",
        promise="nothing is accepted after the lease, and nothing refused as wrong",
        trial=_both_frozen,
        off="no_lease",
    ),
    Row(
        number=35,
        name="one process cut off from both",
        promise="it stops accepting when its lease ends; revoking returns within 3.5 s",
        trial=_cut_off,
        off="no_lease",
    ),
    Row(
        number=37,
        name="SQLite locked by another writer",
        promise="verifying goes on; changes answer 503 within 5 s, nothing half-done",
        trial=_write_locked,
        off="ack_regardless",
        shows="revoking answered",
        shape=_SQLITE,
    ),
    Row(
        number=38,
        name="20 creations and revocations at once on SQLite",
        promise="none fails",
        trial=_many_at_once,
        off="no_busy_wait",
        shows="of 20 answered",
        shape=_SQLITE,
    ),
    Row(
        number=39,
        name="deadlock in PostgreSQL",
        promise="tried again, unseen",
        trial=_deadlocked,
        off="no_retry",
        shows="of 5 answered",
        shape=_NO_REDIS,
    ),
    Row(
        number=40,
        name="PostgreSQL primary replaced by its synchronous standby",
        promise="a confirmed revocation is on the new primary",
        trial=_promoted,
        off="ack_regardless",
        shows="with no standby",
        shape=_NO_REDIS,
    ),
    Row(
        number=43,
        name="revoking cancelled at each of its steps",
        promise="the key is revoked or it is not; no connection is lost",
        trial=_cancelled,
        off="commits_early",
        shows="half revoked",
        shape=_NO_REDIS,
    ),
    Row(
        number=46,
        name="50 creations at once, one below the limit",
        promise="one succeeds",
        trial=_at_the_limit,
        off="no_account_lock",
        shows="were created",
        shape=_NO_REDIS,
    ),
    Row(
        number=49,
        name="8 workers start on an empty database",
        promise="all start, one schema",
        trial=_first_start,
        off="no_schema_lock",
        shows="not all started",
        shape=_NO_REDIS,
    ),
    Row(
        number=59,
        name="disk full under SQLite",
        promise="revoking answers 503, and the key is not revoked",
        trial=_disk_full,
        off="ack_regardless",
        shape=_SQLITE,
    ),
    Row(
        number=63,
        name="a change whose COMMIT is held back",
        promise="no later change is seen before it",
        trial=_late_commit,
        off="numbers_early",
        shows="seen before an earlier one",
    ),
]
