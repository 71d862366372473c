"""Faults of the processes themselves: crashes, stalls, wrong clocks, unlucky moments."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import psycopg

from tests.faults.deployment import Deployment, Key, Shape, until
from tests.faults.load import REVOKED
from tests.faults.rows_redis import check_revoked
from tests.faults.trial import Row, Stage
from tests.support.sql import execute
from tfm_guard.store import schema

_FORGETFUL = Shape(redis=False, remembers=1)
# What waits on a link would be handled first, and hide that the lease has ended.
_NO_LINK = Shape(redis=False)
# Where a process dies while it revokes, and the change is not yet committed, or is.
_BEFORE = ("before revoking", "key locked", "before COMMIT")
_AFTER = ("revoked", "before telling", "told", "before confirming")
_SQLITE = Shape(database="sqlite", redis=False)
_UNSEEN_SECONDS = 1.5


def _wrong_clocks(stage: Stage) -> None:
    """One process is an hour ahead, another an hour behind, while a key expires."""
    deployment = stage.deployment
    deployment.workers[1].control("clock", shift=-3600)
    deployment.workers[2].control("clock", shift=3600)
    stage.begin()
    # More than is left of a key for which only the database is asked, its end being so near.
    expires_at = datetime.now(UTC) + timedelta(seconds=3)
    body = {"name": "ends soon", "expires_at": expires_at.isoformat()}
    made = deployment.workers[0].call("POST", "/v1/api-keys/", deployment.admin, body).json
    token, key = made["key"], Key(made["id"], made["key"], made["key_prefix"])
    deployment.workers[0].call("GET", "/whoami", token)
    name = deployment.redis_name(key)
    with deployment.redis.client() as client:
        if not until(lambda: bool(client.exists(name)), "the entry", 1.0):
            stage.untried.append("the others did not find the key in Redis")
    first = [worker.call("GET", "/whoami", token).status for worker in deployment.workers]
    stage.expect(first == [200, 200, 200], f"before its end a key got {first}")
    check_revoked(stage)
    stage.watch(3.0)
    last = [worker.call("GET", "/whoami", token).status for worker in deployment.workers]
    stage.expect(last == [401, 401, 401], f"after its end a key got {last}")
    stage.end()


def _dies(points: tuple[str, ...], *, committed: bool) -> Callable[[Stage], None]:
    """Return a trial in which the process that revokes dies, at each of *points* in turn."""

    def trial(stage: Stage) -> None:
        chosen = points if stage.full else points[-1:]
        for point in chosen:
            _die_at(stage, point, committed=committed)
        stage.notes.append(f"died at {len(chosen)} points")

    return trial


def _die_at(stage: Stage, point: str, *, committed: bool) -> None:
    deployment = stage.deployment
    stage.begin()
    deployment.workers[0].control("failpoint", point=point, does="die")
    deleted = stage.revoke()
    stage.expect(deleted.status == 0, f"answered {deleted.status} at {point!r}")
    stage.expect(
        deployment.is_revoked(stage.key) == committed, f"half-done in the database at {point!r}"
    )
    stage.watch(_UNSEEN_SECONDS)
    late = sum(
        stage.count(REVOKED, worker, since=deleted.returned + _UNSEEN_SECONDS - 0.3)
        for worker in (1, 2)
    )
    if committed:
        stage.watch(0.5)
        late = sum(
            stage.count(REVOKED, worker, since=deleted.returned + _UNSEEN_SECONDS)
            for worker in (1, 2)
        )
        stage.expect(late == 0, f"accepted {late} times 1.5 s after the crash at {point!r}")
    else:
        stage.expect(late > 0, f"refused, though it was not revoked, at {point!r}")
    again = stage.revoke(by=1)
    stage.expect(again.status == 204, f"deleting again answered {again.status} at {point!r}")
    stage.watch(1.0)
    stage.end(excused=(0,))
    deployment.restart(deployment.workers[0])
    stage.since = None


def _dies_within(stage: Stage) -> None:
    """The process that revokes dies while PostgreSQL executes its statement, in a wait for a lock.

    PostgreSQL may complete it, or not: whatever the key's row says, the feed must say, too.
    """
    deployment = stage.deployment
    stage.begin()
    with psycopg.connect(deployment.url) as other:
        other.execute("UPDATE tfm_feed SET head = head")
        with ThreadPoolExecutor(1) as threads:
            deleting = threads.submit(stage.revoke)
            if not until(lambda: _is_waiting(deployment), "a wait for the head", 3.0):
                stage.untried.append("the statement did not wait")
            deployment.workers[0].kill()
            deleted = deleting.result()
        stage.expect(deleted.status == 0, f"answered {deleted.status}")
        other.rollback()
    stage.expect(until(lambda: not _is_waiting(deployment), "its end", 3.0), "it never ended")
    is_revoked = deployment.is_revoked(stage.key)
    stage.notes.append("completed" if is_revoked else "undone")
    changes = schema.changes.select().where(schema.changes.c.prefix == stage.key.prefix)
    told = [change.kind for change in execute(deployment.url, changes)].count("revoked")
    stage.expect(told == is_revoked, f"half-done in the database: {told} changes")
    stage.watch(_UNSEEN_SECONDS)
    again = stage.revoke(by=1)
    stage.expect(again.status == 204, f"deleting again answered {again.status}")
    stage.watch(1.0)
    stage.end(excused=(0,))
    deployment.restart(deployment.workers[0])


def _is_waiting(deployment: Deployment) -> bool:
    """Tell whether a statement waits for a lock."""
    (row,) = execute(
        deployment.url,
        "SELECT count(*) AS number FROM pg_stat_activity"
        " WHERE wait_event_type = 'Lock' AND datname = current_database()",
    )
    return bool(row.number)


def _fill_held_back(stage: Stage) -> None:
    """A read of the key is held between the database and memory while the key is revoked."""
    stage.begin()
    prefix = stage.key.prefix
    stage.deployment.workers[1].control("failpoint", point="key read", does="hold", about=prefix)
    held = until(lambda: bool(stage.deployment.workers[1].state()["reached"]), "the point", 2.0)
    if not held:
        stage.untried.append("no read was held")
    check_revoked(stage)
    stage.watch(0.2)  # some more join
    stage.deployment.workers[1].control("release")
    stage.watch(2.0)
    stage.end(excused=(1,))


def _crowd(stage: Stage) -> None:
    """1,000 requests at once with a key that the process does not know."""
    stage.begin()
    worker = stage.deployment.workers[1]
    before = worker.state()
    statuses = stage.deployment.background.run(_ask_at_once(worker.port, stage.cold.token, 1000))
    after = worker.state()
    reads = after["store_reads"] - before["store_reads"]
    stage.notes.append(f"{reads} database reads, {after['hashes'] - before['hashes']} hashes")
    stage.expect(statuses == {200}, f"answers {statuses}")
    stage.expect(reads <= 2, f"{reads} database reads")
    stage.expect(after["hashes"] == before["hashes"], "argon2 was used")
    check_revoked(stage)
    stage.watch(1.0)
    stage.end()


async def _ask_at_once(port: int, token: str, count: int) -> set[int]:
    """Open *count* connections, then send a request on all of them; return the statuses."""
    request = f"GET / HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {token}\r\n\r\n".encode()
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
    for _, writer in connections:
        writer.write(request)
    statuses = set()
    for reader, writer in connections:
        statuses.add(int((await reader.readline()).split()[1]))
        writer.transport.abort()
    return statuses


def _stalled(stage: Stage) -> None:
    stage.begin()
    stage.rest(1)
    stage.deployment.workers[1].control("stall", seconds=4.5)
    check_revoked(stage)
    stage.go_on(1)
    stage.watch(3.0)
    stage.end(excused=(1,))


def _stopped(stage: Stage) -> None:
    stage.begin()
    stage.rest(1)
    stopped = time.monotonic()
    stage.deployment.workers[1].freeze()
    check_revoked(stage)
    stage.go_on(1)
    stage.watch(stopped + (60.0 if stage.full else 5.0) - time.monotonic())
    stage.deployment.workers[1].thaw()
    stage.watch(2.0)
    stage.end(excused=(1,))


ROWS = [
    Row(
        number=30,
        name="wall clocks wrong by an hour",
        promise="no key lives longer",
        trial=_wrong_clocks,
        off="own_time",
        shows="after its end a key got",
    ),
    Row(
        number=41,
        name="crash after COMMIT, before anybody was told",
        promise="seen within 1.5 s; deleting again answers 204",
        trial=_dies(_AFTER, committed=True),
        off="no_joining",
        shows="deleting again answered",
    ),
    Row(
        number=42,
        name="crash before COMMIT",
        promise="nothing has happened",
        trial=_dies(_BEFORE, committed=False),
        off="commits_early",
        shows="half-done in the database",
        shape=_SQLITE,
    ),
    Row(
        number=42,
        name="crash in the middle of PostgreSQL's statement",
        promise="all of it has happened, or nothing",
        trial=_dies_within,
        off="commits_early",
        shows="half-done in the database",
    ),
    Row(
        number=44,
        name="a read that was under way when the key was revoked",
        promise="what it brings back is not believed, and nobody joins it any more",
        trial=_fill_held_back,
        off="no_detaching",
        shape=_FORGETFUL,
    ),
    Row(
        number=55,
        name="1,000 requests at once on a key that is not known",
        promise="at most 2 database reads, no slow hash",
        trial=_crowd,
        off="no_flights",
        shows="database reads",
        shape=_NO_LINK,
    ),
    Row(
        number=57,
        name="event loop stalled",
        promise="memory is not trusted until it is proven again",
        trial=_stalled,
        off="no_lease",
        shape=_NO_LINK,
    ),
    Row(
        number=58,
        name="process stopped, revoked meanwhile, continued",
        promise="its first answers do not come from memory",
        trial=_stopped,
        off="no_lease",
        shape=_NO_LINK,
    ),
]
