"""Processes that end under load: what is lost of usage, compared with the answers that came."""

import time
from typing import Final

from sqlalchemy import select

from tests.faults.deployment import Key, Shape
from tests.faults.load import REVOKED, Answer
from tests.faults.trial import Row, Stage
from tests.support.sql import execute
from tfm_guard.store import schema

# One process, so that no other one tells of the use of the same keys.
_POSTGRESQL: Final = Shape(workers=1, redis=False)
_SQLITE: Final = Shape(workers=1, redis=False, database="sqlite")
# An interval, and what writing takes on a busy machine.
_LOST_SECONDS: Final = 5.5
_DRAIN_SECONDS: Final = 5.0
_STEP_SECONDS: Final = 0.1  # between the clocks of a machine's processes, and of its PostgreSQL


def _killed(stage: Stage) -> None:
    """The process is killed: what it had not yet written is gone, and nothing else."""
    deployment = stage.deployment
    stage.begin()
    made = deployment.create_key()
    deleted = deployment.delete(stage.cold)
    stage.expect(deleted.status == 204, f"deleting answered {deleted.status}")
    stage.watch(13.0 if stage.full else 7.0)
    worker = deployment.workers[0]
    killed = time.monotonic()
    worker.kill()
    accepted = _end(stage)
    surely = [answer for answer in accepted if answer.ended < killed - _LOST_SECONDS]
    if not surely:
        stage.untried.append("no answer came early enough")
    _check_counts(stage, stage.key, least=len(surely))
    _check_last_use(stage, stage.key, accepted[-1].started - _LOST_SECONDS)
    deployment.restart(worker)
    statuses = [worker.call("GET", "/whoami", key.token).status for key in (made, stage.cold)]
    stage.expect(statuses == [200, 401], f"a new and a deleted key got {statuses} afterwards")


def _told_to_end(stage: Stage) -> None:
    """The process gets SIGTERM: it writes what is left, and ends soon."""
    stage.begin()
    stage.watch(3.0)
    told = time.monotonic()
    stage.deployment.workers[0].stop()
    stage.took = time.monotonic() - told
    stage.expect(stage.took <= _DRAIN_SECONDS, f"it took {stage.took:.1f} s to end")
    accepted = _end(stage)
    _check_counts(stage, stage.key, least=len(accepted))
    _check_last_use(stage, stage.key, accepted[-1].started - _STEP_SECONDS)


def _end(stage: Stage) -> list[Answer]:
    """Stop the load; return the answers that accepted the key, in the order of their requests."""
    stage.end(excused=(0,), unavailable=True)
    accepted = [answer for answer in stage.answers(REVOKED) if answer.status == 200]
    return sorted(accepted, key=lambda answer: answer.started)


def _check_counts(stage: Stage, key: Key, *, least: int) -> None:
    """Check that *least* requests or more are counted, and no more than were sent."""
    assert stage.load is not None
    sent = stage.load.started_since(0.0, 0, REVOKED)
    hours = schema.usage_hours.c
    statement = select(hours.accepted).join(schema.keys, schema.keys.c.id == hours.key_id)
    rows = execute(stage.deployment.url, statement.where(schema.keys.c.prefix == key.prefix))
    counted = sum(row.accepted for row in rows)
    stage.notes.append(f"{counted} counted of {stage.count(REVOKED, 0)} accepted")
    stage.expect(counted >= least, f"{counted} counted, {least} accepted before")
    stage.expect(counted <= sent, f"{counted} counted, {sent} sent")


def _check_last_use(stage: Stage, key: Key, earliest: float) -> None:
    """Check that the key's last use is *earliest*, in monotonic seconds, or later."""
    uses = select(schema.key_usage.c.last_used_at).join(
        schema.keys, schema.keys.c.id == schema.key_usage.c.key_id
    )
    rows = execute(stage.deployment.url, uses.where(schema.keys.c.prefix == key.prefix))
    now = time.time()
    limit = now - (time.monotonic() - earliest)
    late = [limit - row.last_used_at.timestamp() for row in rows]
    stage.expect(bool(late) and late[0] <= 0, f"last use too early, by seconds: {late}")


ROWS = [
    *(
        Row(
            number=47,
            name=f"process killed, on {name}",
            promise="the use of 5 s at the most is lost; no key, no revocation",
            trial=_killed,
            off="no_flushes",
            shows=" counted, ",
            shape=shape,
        )
        for name, shape in (("PostgreSQL", _POSTGRESQL), ("SQLite", _SQLITE))
    ),
    *(
        Row(
            number=48,
            name=f"process told to end, on {name}",
            promise="no use is lost; it ends within 5 s",
            trial=_told_to_end,
            off="no_last_flush",
            shows=" counted, ",
            shape=shape,
        )
        for name, shape in (("PostgreSQL", _POSTGRESQL), ("SQLite", _SQLITE))
    ),
]
