"""Faults of the link, on which changes arrive as they are made."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import msgspec

from tests.faults.deployment import Shape, until
from tests.faults.load import REVOKED, VALID
from tests.faults.rows_redis import check_revoked, entry_of, follow, repeatedly
from tests.faults.trial import LET_IN, Row, Stage, quantile
from tests.support.redis import RedisServer
from tests.support.rough_way import SMOOTH, STALLED, Conduct, RoughWay
from tests.support.servers import ROOT
from tests.support.sql import execute
from tfm_guard.link import Message
from tfm_guard.records import Change
from tfm_guard.store import schema

_UNFED_SECONDS = 6.0
_SHORT_UNFED = Shape(unfed=_UNFED_SECONDS)
_EIGHT = Shape(workers=8, direct=True)
_FEED_SECONDS = 1.5
_LINK_SECONDS = 3.5


def _under(
    inject: Callable[[Stage], None], *, within: float, watch: float = 1.5
) -> Callable[[Stage], None]:
    """Return a trial: the fault, then the revocation."""

    def trial(stage: Stage) -> None:
        stage.begin()
        inject(stage)
        check_revoked(stage, within)
        stage.watch(watch)
        stage.end()

    return trial


def _healthy(stage: Stage) -> None:
    deployment = stage.deployment
    stage.begin()
    check_revoked(stage)
    stage.watch(1.5)
    stage.end()
    trials = 20 if stage.off else 1000 if stage.full else 100
    took, answered, accepted, hows = [], [], 0, set()
    for number in range(trials):
        by = number % len(deployment.workers)
        key = deployment.create_key(by)
        warm = {deployment.ask(w, key.token).status for w in range(len(deployment.workers))}
        if warm != {200}:
            stage.untried.append(f"a new key got {warm}")
            break
        deleted = deployment.delete(key, by)
        answered.append(deleted.seconds)
        state = deployment.workers[by].state()
        took.append(state["revoking"])
        hows.add(state["how"])
        accepted += sum(
            deployment.ask(w, key.token).status != 401 for w in range(len(deployment.workers))
        )
    took.sort()
    p50, p99 = took[len(took) // 2], took[len(took) * 99 // 100]
    stage.took, stage.how = p50, " and ".join(sorted(hows))
    stage.notes.append(
        f"{trials} trials: p50 {p50 * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms; "
        f"with HTTP p50 {sorted(answered)[len(answered) // 2] * 1000:.1f} ms"
    )
    stage.accepted += accepted
    stage.expect(accepted == 0, f"{accepted} {LET_IN}")
    stage.expect(p50 <= 0.005, f"p50 {p50 * 1000:.1f} ms")
    stage.expect(p99 <= 0.05, f"p99 {p99 * 1000:.1f} ms")
    stage.expect(hows == {"acknowledged"}, f"confirmed by {hows}")


def _kill_subscribers(stage: Stage) -> None:
    with stage.deployment.redis.client() as client:
        client.execute_command("CLIENT KILL TYPE pubsub")


def _kill_loop(stage: Stage) -> None:
    deployment = stage.deployment
    stage.begin()
    end = time.monotonic() + (60.0 if stage.full and not stage.off else 5.0)
    took = []
    kill = lambda client: client.execute_command("CLIENT KILL TYPE pubsub")  # noqa: E731
    with repeatedly(kill, deployment.redis, every=0.1):
        stage.watch(0.5)
        check_revoked(stage, _FEED_SECONDS)
        while time.monotonic() < end:
            key = deployment.create_key()
            for worker in range(len(deployment.workers)):
                deployment.ask(worker, key.token)
            deleted = deployment.delete(key)
            took.append(deleted.seconds)
            late = [deployment.ask(w, key.token).status for w in range(len(deployment.workers))]
            stage.accepted += late.count(200)
            stage.expect(200 not in late, f"{late.count(200)} {LET_IN}")
            stage.expect(deleted.status == 204, f"revoking answered {deleted.status}")
            stage.watch(0.2)
        stage.end()
    stage.notes.append(f"{len(took)} more: {max(took, default=0):.2f} s at the most")
    stage.expect(max(took, default=0) <= _FEED_SECONDS, f"revoking took {max(took):.2f} s")


def _demoted(stage: Stage) -> None:
    """The Redis that everybody is on becomes a replica of another; one process goes to that."""
    deployment = stage.deployment
    with RedisServer() as other, deployment.redis.client() as client:
        stage.begin()
        client.replicaof("127.0.0.1", other.port)
        deployment.workers[0].ways["redis"].target = other.port
        deployment.workers[0].ways["redis"].cut()
        check_revoked(stage, _LINK_SECONDS)
        stage.watch(2.0)
        stage.end()
        client.replicaof("NO", "ONE")


def _pause_writes(stage: Stage) -> None:
    with stage.deployment.redis.client() as client:
        client.execute_command("CLIENT PAUSE 10000 WRITE")


def _paused_writes(stage: Stage) -> None:
    _under(_pause_writes, within=_LINK_SECONDS)(stage)
    with stage.deployment.redis.client() as client:
        client.execute_command("CLIENT UNPAUSE")


def _channel(stage: Stage) -> str:
    return stage.deployment.redis_name(stage.valid).partition(":key:")[0] + ":changes"


def _forgery(stage: Stage) -> bytes:
    """Return what would end the valid key, if it were sealed."""
    change = Change(1_000_000, "revoked", stage.valid.prefix, 1_000_000)
    return msgspec.msgpack.encode(Message(bytes(16), (change,), "nobody", ())) + bytes(16)


@contextlib.contextmanager
def _flood(stage: Stage, payloads: list[bytes], per_second: int) -> Iterator[None]:
    """Publish *payloads* in turn on the channel of changes all the while."""
    channel, batch = _channel(stage), max(per_second // 100, 1)

    def publish(client: Any) -> None:
        pipeline = client.pipeline(transaction=False)
        for number in range(batch):
            pipeline.publish(channel, payloads[number % len(payloads)])
        pipeline.execute()

    with repeatedly(publish, stage.deployment.redis, every=batch / per_second):
        yield


@contextlib.contextmanager
def _forgeries(stage: Stage, per_second: int) -> Iterator[None]:
    """Have a process of its own publish forged messages all the while."""
    arguments = (str(stage.deployment.redis.port), _channel(stage), str(per_second))
    command = [sys.executable, "-m", "tests.faults.flood", *arguments, _forgery(stage).hex()]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            yield
        finally:
            process.kill()


def _flooded(stage: Stage) -> None:
    """In turns without and with the flood, as what else the machine does comes and goes."""
    stage.begin()
    seconds = 3.0
    calm: list[float] = []  # when each turn began
    flooded: list[float] = []
    rejected = 0
    for _ in range(7 if stage.full and not stage.off else 1):
        calm.append(_turn(stage, seconds))
        with _forgeries(stage, 10_000):
            stage.watch(1.0)  # until it has begun
            before = stage.deployment.total("link_rejected")
            flooded.append(_turn(stage, seconds))
            rejected += stage.deployment.total("link_rejected") - before
    with _forgeries(stage, 10_000):
        check_revoked(stage, _LINK_SECONDS)
        stage.watch(1.0)
    stage.end()
    p99 = [_median_p99(stage, turns, seconds) * 1000 for turns in (calm, flooded)]
    rate = rejected / stage.deployment.shape.workers / (seconds * len(flooded))
    stage.notes.append(f"{rate:.0f} forged/s: p99 {p99[0]:.2f} -> {p99[1]:.2f} ms")
    if rate < 9_000:
        stage.untried.append(f"only {rate:.0f} messages a second arrived")
    stage.expect(p99[1] <= 1.2 * p99[0], f"p99 grew from {p99[0]:.2f} to {p99[1]:.2f} ms")


def _turn(stage: Stage, seconds: float) -> float:
    """Let the load go on for so long; return when that began."""
    began = time.monotonic()
    stage.watch(seconds)
    return began


def _median_p99(stage: Stage, turns: list[float], seconds: float) -> float:
    """Return the p99, in seconds, of requests in a turn: the median of *turns*."""
    answers = [*stage.answers(VALID), *stage.answers(REVOKED)]  # not revoked yet, then
    return median(
        quantile(
            0.99,
            [a.ended - a.started for a in answers if began <= a.started < began + seconds],
        )
        for began in turns
    )


def _forged_messages(stage: Stage) -> None:
    stage.begin()
    revived = Change(1_000_000, "created", stage.key.prefix, 0)
    payloads = [
        _forgery(stage),
        msgspec.msgpack.encode(Message(bytes(16), (revived,), "nobody", ())) + bytes(16),
        b"",
        b"unrevoke",
        bytes(range(256)),
        b"x" * 100_000,
    ]
    before = stage.deployment.total("flushes")
    with _flood(stage, payloads, 200):
        check_revoked(stage, _LINK_SECONDS)
        stage.churn(2.0)
    stage.notes.append(f"{stage.deployment.total('link_rejected')} rejected")
    stage.expect(stage.deployment.total("link_rejected") > 0, "nothing was counted as rejected")
    stage.expect(stage.deployment.total("flushes") == before, "memory was forgotten for it")
    bad = sum(answer.status != 200 for answer in stage.answers(VALID))
    stage.expect(bad == 0, f"{bad} wrong answers to valid keys")
    stage.end()


def _overflown(stage: Stage) -> None:
    """One subscriber stands still while more is published than Redis keeps for it."""
    deployment, worker = stage.deployment, stage.deployment.workers[1]
    with deployment.redis.client() as client:
        client.config_set("client-output-buffer-limit", "pubsub 65536 0 0")
        stage.begin()
        before = worker.state()["resident"]
        stage.rest(1)
        worker.freeze()
        with _flood(stage, [b"x" * 10_000], 2_000):
            stage.watch(1.0)  # until Redis has given it up
            check_revoked(stage, _LINK_SECONDS)
            stage.go_on(1)
            stage.watch(2.0)
        worker.thaw()
        stage.watch(2.0)
        grown = (worker.state()["resident"] - before) / 2**20
        stage.notes.append(f"+{grown:.0f} MiB")
        stage.expect(grown <= 32, f"memory grew by {grown:.0f} MiB")
        client.config_set("client-output-buffer-limit", "pubsub 33554432 8388608 60")
    stage.end(excused=(1,))


def _fed_by_the_link(stage: Stage) -> None:
    stage.begin()
    stage.deployment.postgres.kill()
    killed = time.monotonic()
    stage.watch(_UNFED_SECONDS - 2.0)
    served = [stage.count(VALID, w, since=killed) for w in range(3)]
    stage.expect(min(served) > 0, "not served while the link was alive")
    early = sum(
        answer.status != 200
        for answer in stage.answers(VALID, since=killed)
        if answer.ended < killed + _UNFED_SECONDS - 2.5
    )
    stage.expect(early == 0, f"{early} not served while the link was alive")
    stage.since = killed + _UNFED_SECONDS
    stage.watch(killed + _UNFED_SECONDS + 2.5 - time.monotonic())
    told = stage.deployment.ask(1, stage.valid.token)
    stage.how = f"{told.status} after unfed"
    stage.expect(told.status == 503, f"answered {told.status} after unfed")
    stage.end(unavailable=True)


def _failing_handler(stage: Stage) -> None:
    worker = stage.deployment.workers[1]
    stage.begin()
    before = worker.state()["flushes"]
    worker.control("break", name="handler_raises")
    check_revoked(stage, _FEED_SECONDS)
    stage.watch(1.0)
    flushes = worker.state()["flushes"] - before
    stage.notes.append(f"{flushes} times forgotten")
    stage.expect(flushes > 0, "what was remembered was still trusted")
    stage.end()


def _with_redis_only(stage: Stage) -> None:
    """One process and Redis on this side, the others and the database on that."""
    deployment = stage.deployment
    stage.begin()
    deployment.to_redis(replace(STALLED), [0, 2])
    deployment.to_database(STALLED, [1])
    for worker in (0, 2):
        deployment.workers[worker].ways["redis"].cut()
    _check_not_before_unfed(stage)
    stage.end(excused=(1,))


def _check_not_before_unfed(stage: Stage) -> None:
    """Revoke, and again as often as the answer is that it is not confirmed."""
    began = time.monotonic()
    statuses: list[int] = []
    while not statuses or statuses[-1] == 503:
        statuses.append(stage.revoke().status)
        if time.monotonic() - began > _UNFED_SECONDS + 10:
            break
    took = time.monotonic() - began
    stage.took, stage.how = took, ", ".join(map(str, statuses))
    stage.expect(statuses[-1] == 204, f"answers {statuses}")
    stage.expect(statuses[0] == 503, "confirmed before unfed had passed")
    stage.watch(2.0)


def _on_the_old_primary(stage: Stage) -> None:
    """The others follow a promoted replica; one process stays, and has lost the database."""
    deployment = stage.deployment
    with RedisServer() as replica, contextlib.ExitStack() as ending:
        way = RoughWay(deployment.background, deployment.redis.port)
        ending.callback(way.close)
        with replica.client() as client:
            follow(client, stage, way.port)
            stage.begin()
            up = until(
                lambda: client.info("replication")["master_link_status"] == "up", "a replica", 5.0
            )
            if not up:
                stage.untried.append("there was no replica")
            way.conduct = STALLED
            client.replicaof("NO", "ONE")
        deployment.to_database(STALLED, [1])
        for worker in (0, 2):
            deployment.workers[worker].ways["redis"].target = replica.port
            deployment.workers[worker].ways["redis"].cut()
        stage.watch(1.0)
        _check_not_before_unfed(stage)
        stage.end(excused=(1,))
        for worker in (0, 2):
            deployment.workers[worker].ways["redis"].target = deployment.redis.port


def _registering(stage: Stage) -> None:
    """One process must register again while the key is revoked; old entries are replayed."""
    deployment, worker = stage.deployment, stage.deployment.workers[2]
    stage.begin()
    old, name = entry_of(stage), deployment.redis_name(stage.key)
    deployment.to_redis(replace(STALLED, kind="link"), [2])
    worker.control("failpoint", point="registered", does="hold")
    execute(deployment.url, schema.workers.delete().where(schema.workers.c.name == worker.name))
    if not until(lambda: bool(worker.state()["reached"]), "the point", 5.0):
        stage.untried.append("it did not register again")
    released = threading.Timer(1.0, lambda: worker.control("release"))
    released.start()
    check_revoked(stage, _LINK_SECONDS)
    released.join()
    deployment.to_redis(SMOOTH)
    with repeatedly(lambda client: client.set(name, old), deployment.redis, every=0.002):
        stage.churn(3.0)
    stage.end()


ROWS = [
    Row(
        number=1,
        name="none, 8 processes",
        promise="revoking returns in 5 ms (p50), 50 ms (p99), acknowledged by all",
        trial=_healthy,
        off="no_publishing",
        shows="p99 ",
        shape=_EIGHT,
    ),
    Row(
        number=2,
        name="what is published is lost",
        promise="the feed tells: revoking returns within 1.5 s",
        trial=_under(
            lambda s: s.deployment.to_redis(Conduct(drops=b"PUBLISH")), within=_FEED_SECONDS
        ),
        off="no_wait",
    ),
    Row(
        number=3,
        name="subscribers killed just before",
        promise="revoking returns within 1.5 s",
        trial=_under(_kill_subscribers, within=_FEED_SECONDS),
        off="no_wait",
    ),
    Row(
        number=4,
        name="subscribers killed ten times a second",
        promise="revoking returns within 1.5 s, each time",
        trial=_kill_loop,
        off="no_wait",
    ),
    Row(
        number=5,
        name="half-open link",
        promise="revoking returns within 2.5 s",
        trial=_under(
            lambda s: s.deployment.to_redis(
                Conduct(kind="link", holds_requests=True, holds_answers=True), [1]
            ),
            within=2.5,
        ),
        off="no_wait",
    ),
    Row(
        number=13,
        name="processes on a demoted primary",
        promise="revoking returns within 3.5 s",
        trial=_demoted,
        off="no_wait",
    ),
    Row(
        number=15,
        name="Redis takes no writes and publishes nothing",
        promise="the feed tells: revoking returns within 3.5 s",
        trial=_paused_writes,
        off="no_wait",
    ),
    Row(
        number=22,
        name="subscriber's buffer overflows",
        promise="it forgets, and catches up; its memory does not grow",
        trial=_overflown,
        off="no_lease",
    ),
    Row(
        number=23,
        name="10,000 forged messages a second",
        promise="p99 grows by no more than a fifth",
        trial=_flooded,
        off="no_link_seal",
        shows="the valid key",
        shape=Shape(workers=1),
    ),
    Row(
        number=27,
        name="forged messages",
        promise="ignored, and counted",
        trial=_forged_messages,
        off="no_link_seal",
        shows="wrong answers to valid keys",
    ),
    Row(
        number=31,
        name="database killed",
        promise="known keys are served while the link lives, up to `unfed`; then 503",
        trial=_fed_by_the_link,
        off="no_unfed",
        shape=_SHORT_UNFED,
    ),
    Row(
        number=56,
        name="handling a message fails",
        promise="everything is forgotten, and the link comes back",
        trial=_failing_handler,
        off="dies_silently",
        shows="still trusted",
    ),
    Row(
        number=60,
        name="one process with Redis, the others with the database",
        promise="503 until `unfed` has passed, then 204, and nothing accepted after",
        trial=_with_redis_only,
        off="lease_is_enough",
        shape=_SHORT_UNFED,
    ),
    Row(
        number=61,
        name="failover, one process stays on the old primary",
        promise="503 until `unfed` has passed, then 204, and nothing accepted after",
        trial=_on_the_old_primary,
        off="any_link",
        shape=_SHORT_UNFED,
    ),
    Row(
        number=62,
        name="a process registers while a key is revoked",
        promise="it knows of the revocation before it trusts anything",
        trial=_registering,
        off="joins_blindly",
        shape=Shape(remembers=1),
    ),
]
