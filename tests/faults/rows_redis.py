"""Faults of Redis, and of the way to it, that concern the shared cache."""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
from redis.exceptions import ResponseError

from tests.faults.deployment import Shape, until
from tests.faults.load import VALID
from tests.faults.trial import Row, Stage
from tests.support.redis import RedisServer
from tests.support.rough_way import STALLED, Conduct, RoughWay
from tfm_guard.records import CacheEntry

# Memory has room for one key only, so that Redis is asked all the time.
COLD = Shape(remembers=1)

_REVOKING_SECONDS = 3.5


def check_revoked(stage: Stage, within: float = _REVOKING_SECONDS) -> None:
    """Revoke the key: it must be confirmed, and in time."""
    deleted = stage.revoke()
    stage.expect(deleted.status == 204, f"revoking answered {deleted.status}")
    stage.expect(deleted.seconds <= within, f"revoking took more than {within:g} s")


def most_seconds(stage: Stage) -> float:
    """Return what a request may take: 300 ms more than it took before."""
    stage.watch(1.0)
    return stage.latency(0.99, since=0.0) + 0.3


def _slow_or_silent(
    inject: Callable[[Stage], None], *, heal: Callable[[Stage], None] = lambda _: None
) -> Callable[[Stage], None]:
    """Return a trial of a Redis that does not answer in time: the breaker opens, and stays so."""

    def trial(stage: Stage) -> None:
        stage.begin()
        most = most_seconds(stage)
        injected = time.monotonic()
        inject(stage)
        stage.watch(1.0)
        before = stage.deployment.total("shared_reads")
        check_revoked(stage)
        stage.watch(1.5)
        slow = stage.latency(0.99, since=injected)
        later = stage.latency(0.9, since=injected + 1.0)
        stage.notes.append(f"p99 {slow * 1000:.0f} ms, then p90 {later * 1000:.1f} ms")
        asked = stage.deployment.total("shared_reads") - before
        stage.expect(slow <= most, f"p99 {slow * 1000:.0f} ms")
        stage.expect(later <= 0.1, f"p90 {later * 1000:.0f} ms with the breaker open")
        stage.expect(asked == 0, f"Redis was asked {asked} times with the breaker open")
        heal(stage)
        stage.end()

    return trial


def _killed(stage: Stage) -> None:
    stage.begin()
    stage.deployment.redis.kill()
    stage.watch(0.5)
    before = [worker.ways["redis"].accepted for worker in stage.deployment.workers]
    began = time.monotonic()
    check_revoked(stage)
    stage.watch(2.0)
    seconds = time.monotonic() - began
    attempts = max(
        (worker.ways["redis"].accepted - earlier) / seconds
        for worker, earlier in zip(stage.deployment.workers, before, strict=True)
    )
    stage.notes.append(f"{attempts:.1f} connects/s")
    stage.expect(attempts <= 10, f"{attempts:.0f} connects a second")
    stage.end()


def _reads_per_second(stage: Stage, seconds: float) -> float:
    before, began = stage.deployment.total("store_reads"), time.monotonic()
    stage.watch(seconds)
    reads = stage.deployment.total("store_reads") - before
    return reads / (time.monotonic() - began) / len(stage.deployment.workers)


def _restarted_empty(stage: Stage) -> None:
    stage.begin()
    stage.deployment.redis.kill()
    stage.deployment.redis.start()
    check_revoked(stage)
    stage.watch(1.5)
    reads = _reads_per_second(stage, 1.5)
    stage.notes.append(f"{reads:.1f} database reads/s per process")
    stage.expect(reads <= 20, f"{reads:.0f} database reads a second per process")
    stage.end()


def _flushed_all_the_time(stage: Stage) -> None:
    stage.begin()
    with repeatedly(lambda client: client.flushall(), stage.deployment.redis, every=0.1):
        check_revoked(stage)
        reads = _reads_per_second(stage, 2.0)
    stage.notes.append(f"{reads:.0f} database reads/s per process")
    stage.expect(reads <= 25, f"{reads:.0f} database reads a second per process")
    stage.end()


@contextlib.contextmanager
def meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Do *work* in a thread of its own, until it is told that the block is done."""
    done = threading.Event()
    thread = threading.Thread(target=work, args=(done,))
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def repeatedly(
    work: Callable[[Any], object], server: RedisServer, *, every: float
) -> Iterator[None]:
    """Do *work* with a client of *server* all the while."""

    def run(done: threading.Event) -> None:
        with server.client() as client:
            while not done.wait(every):
                work(client)

    with meanwhile(run):
        yield


def entry_of(stage: Stage) -> bytes:
    """Return what stands in Redis for the key while it is active."""
    name = stage.deployment.redis_name(stage.key)
    with stage.deployment.redis.client() as client:
        if not until(lambda: bool(client.exists(name)), "the entry", 5.0):
            stage.untried.append("the key never was in Redis")
        value: bytes = client.get(name) or b""
    return value


def _restored(stage: Stage) -> None:
    stage.begin()
    entry_of(stage)
    redis = stage.deployment.redis
    with redis.client() as client:
        client.save()
    check_revoked(stage)
    stage.watch(0.5)
    redis.kill()
    redis.start()
    with redis.client() as client:
        if not client.exists(stage.deployment.redis_name(stage.key)):
            stage.untried.append("the old entry did not come back")
    stage.churn(3.0)
    stage.end()


def follow(client: Any, stage: Stage, port: int) -> None:
    """Make the Redis behind *client* a replica of the one that the processes use, at *port*."""
    with stage.deployment.redis.client() as master:
        master.config_set("repl-diskless-sync-delay", "0")
    client.replicaof("127.0.0.1", port)


def _failed_over(stage: Stage) -> None:
    deployment = stage.deployment
    with RedisServer() as replica, contextlib.ExitStack() as ending:
        way = RoughWay(deployment.background, deployment.redis.port)
        ending.callback(way.close)
        with replica.client() as client:
            follow(client, stage, way.port)
            stage.begin()
            entry_of(stage)
            name = deployment.redis_name(stage.key)
            if not until(lambda: bool(client.exists(name)), "the replica has it", 5.0):
                stage.untried.append("the entry was not replicated")
            way.conduct = STALLED
            check_revoked(stage)
            stage.watch(0.5)
            client.replicaof("NO", "ONE")
        for worker in deployment.workers:
            worker.ways["redis"].target = replica.port
            worker.ways["redis"].cut()
        stage.churn(3.0)
        stage.end()
        for worker in deployment.workers:
            worker.ways["redis"].target = deployment.redis.port


def _pointed_at_replica(stage: Stage) -> None:
    deployment, worker = stage.deployment, stage.deployment.workers[2]
    with RedisServer() as replica:
        with replica.client() as client:
            follow(client, stage, deployment.redis.port)
        worker.stop()
        worker.ways["redis"].target = replica.port
        deployment.restart(worker)
        stage.begin()
        stage.expect(not worker.state()["redis_in_use"], "the replica was used")
        check_revoked(stage)
        stage.watch(1.5)
        stage.expect(worker.state()["shared_reads"] == 0, "the replica was read")
        stage.expect("must lead to the master" in worker.output_since_start, "no word of it")
        worker.ways["redis"].target = deployment.redis.port
        stage.end()


def _delayed(stage: Stage) -> None:
    stage.begin()
    most, later = most_seconds(stage), 0.0
    for delay in (0.02, 0.1, 0.5):
        began = time.monotonic()
        # Half of it there and half of it back.
        stage.deployment.to_redis(Conduct(delay=delay / 2, jitter=delay / 10))
        stage.watch(2.0)
        p99 = stage.latency(0.99, since=began)
        later = stage.latency(0.9, since=began + 1.0)
        stage.notes.append(f"{delay * 1000:.0f} ms: p99 {p99 * 1000:.0f} ms")
        stage.expect(p99 <= most, f"p99 {p99:.2f} s at a latency of {delay:g} s")
    stage.expect(later <= 0.1, f"p90 {later * 1000:.0f} ms at a latency of 500 ms")
    check_revoked(stage)
    stage.watch(1.0)
    stage.end()


def _torn(conduct: Conduct) -> Callable[[Stage], None]:
    def trial(stage: Stage) -> None:
        stage.begin()
        most = most_seconds(stage)
        began = time.monotonic()
        stage.deployment.to_redis(conduct)
        stage.watch(1.5)
        check_revoked(stage)
        stage.watch(1.5)
        slow = stage.latency(0.99, since=began)
        stage.notes.append(f"p99 {slow * 1000:.0f} ms")
        stage.expect(slow <= most, f"p99 {slow * 1000:.0f} ms")
        bad = sum(answer.status != 200 for answer in stage.answers(VALID))
        stage.expect(bad == 0, f"{bad} errors")
        stage.end()

    return trial


def _evicted(stage: Stage) -> None:
    stage.begin()
    old, name = entry_of(stage), stage.deployment.redis_name(stage.key)
    check_revoked(stage)
    stage.watch(0.3)
    with stage.deployment.redis.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", str(client.info("memory")["used_memory"] + 2**20))

        def evicted() -> bool:
            with contextlib.suppress(ResponseError):  # it could not make room fast enough
                client.set(random.randbytes(8), b"x" * 4000)
            return not client.exists(name)

        if not until(evicted, "eviction", 10.0):
            stage.untried.append("the tombstone was not evicted")
        client.set(name, old)  # as a process would that had read it long before
        stage.churn(2.0)
        client.config_set("maxmemory", "0")
        client.config_set("maxmemory-policy", "noeviction")
    stage.end()


def _full(stage: Stage) -> None:
    stage.begin()
    entry_of(stage)
    with stage.deployment.redis.client() as client:
        client.config_set("maxmemory", "1mb")
        client.config_set("maxmemory-policy", "noeviction")
        with contextlib.suppress(Exception):
            for _ in range(1000):
                client.set(random.randbytes(8), b"x" * 4000)
        check_revoked(stage)
        stage.churn(2.0)
        client.config_set("maxmemory", "0")
    stage.end()


def _forged(old: bytes) -> bytes:
    """Return an active entry of a later version, whose seal nobody made."""
    entry = msgspec.msgpack.decode(old[17:-16], type=CacheEntry)
    entry = msgspec.structs.replace(entry, version=99, revoked=False)
    return b"1" + b"%016x" % 99 + msgspec.msgpack.encode(entry) + bytes(16)


def _garbage(stage: Stage) -> None:
    stage.begin()
    deployment, old = stage.deployment, entry_of(stage)
    names = [deployment.redis_name(stage.key), deployment.redis_name(stage.valid)]
    before = deployment.workers[1].state()
    check_revoked(stage)
    values = [old[:-5], b"", b"1", random.randbytes(200), old + b"x", bytes(10_000_000)]

    def spoil(client: Any) -> None:
        name = random.choice(names)
        pipeline = client.pipeline().delete(name)
        if random.random() < 0.2:
            pipeline.lpush(name, b"x").execute()
        else:
            pipeline.set(name, random.choice([*values, _forged(old)])).execute()

    def forge(client: Any) -> None:
        client.set(names[0], _forged(old))

    with repeatedly(spoil, deployment.redis, every=0.01):
        stage.churn(1.5)
    with repeatedly(forge, deployment.redis, every=0.002):
        stage.churn(1.5)
    after = deployment.workers[1].state()
    rejected = after["shared_rejected"] - before["shared_rejected"]
    grown = (after["resident"] - before["resident"]) / 2**20
    stage.notes.append(f"{rejected} rejected, +{grown:.0f} MiB")
    stage.expect(rejected > 0, "nothing was counted as rejected")
    stage.expect(grown <= 64, f"memory grew by {grown:.0f} MiB")
    stage.end()


def _forged_and_swapped(stage: Stage) -> None:
    stage.begin()
    deployment, old = stage.deployment, entry_of(stage)
    revoked, valid = deployment.redis_name(stage.key), deployment.redis_name(stage.valid)
    check_revoked(stage)

    def forge(client: Any) -> None:
        client.set(revoked, _forged(old))
        client.set(valid, old)

    with repeatedly(forge, deployment.redis, every=0.002):
        stage.churn(2.5)
    stage.end()


def _replayed(stage: Stage) -> None:
    stage.begin()
    old, name = entry_of(stage), stage.deployment.redis_name(stage.key)
    check_revoked(stage)
    with repeatedly(lambda client: client.set(name, old), stage.deployment.redis, every=0.001):
        stage.churn(3.0)
    stage.end()


def _thawed(stage: Stage) -> None:
    stage.begin()
    entry_of(stage)
    stage.deployment.redis.freeze()
    stage.watch(0.5)
    check_revoked(stage)
    stage.deployment.redis.thaw()
    stage.churn(3.0)
    stage.end()


def _locked_out(stage: Stage) -> None:
    deployment = stage.deployment
    stage.begin()
    with deployment.redis.client() as client:
        client.execute_command("ACL SETUSER tester on >tests ~* &* +@all")
    with deployment.redis.client(username="tester", password="tests") as client:
        client.execute_command("ACL SETUSER default resetpass >rotated")
        client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
        client.execute_command("CLIENT KILL TYPE pubsub")
        stage.watch(1.0)
        _check_left_aside(stage)
        check_revoked(stage)
        stage.watch(0.5)
        client.execute_command("ACL SETUSER default nopass")
        _check_back(stage)
        client.execute_command("ACL SETUSER default -mget -get -subscribe -role -info")
        stage.watch(1.5)
        _check_left_aside(stage)
        client.execute_command("ACL SETUSER default +@all")
        _check_back(stage)
        client.execute_command("ACL DELUSER tester")
    stage.end()


def _check_left_aside(stage: Stage) -> None:
    for worker in stage.deployment.workers:
        stage.expect(not worker.state()["redis_in_use"], "Redis was still asked")
        stage.expect("Redis is left aside" in worker.output_since_start, "no word of it")


def _check_back(stage: Stage) -> None:
    def back() -> bool:
        return all(worker.state()["redis_in_use"] for worker in stage.deployment.workers)

    stage.expect(until(back, "Redis in use", 5.0), "not in use 5 s later")


def _two_releases(stage: Stage) -> None:
    stage.deployment.workers[1].control("break", name="other_format")
    stage.begin()
    check_revoked(stage)
    # So that each of the releases writes some of the entries anew.
    with repeatedly(lambda client: client.flushall(), stage.deployment.redis, every=0.1):
        stage.churn(2.5)
    bad = sum(answer.status != 200 for answer in stage.answers(VALID))
    stage.expect(bad == 0, f"{bad} errors")
    stage.end()


def _pause(stage: Stage, kind: str) -> None:
    with stage.deployment.redis.client() as client:
        client.execute_command("CLIENT PAUSE 5000", kind)


ROWS = [
    Row(
        number=6,
        name="half-open connections to Redis",
        promise="requests wait 300 ms more at the most; then Redis is not asked any more",
        trial=_slow_or_silent(lambda s: s.deployment.to_redis(replace(STALLED, kind="data"))),
        off="no_breaker",
        shows="with the breaker open",
        shape=COLD,
    ),
    Row(
        number=7,
        name="Redis frozen",
        promise="requests wait 300 ms more at the most; then Redis is not asked any more",
        trial=_slow_or_silent(lambda s: s.deployment.redis.freeze()),
        off="no_breaker",
        shows="with the breaker open",
        shape=COLD,
    ),
    Row(
        number=8,
        name="Redis thawed after a revocation",
        promise="what it had stored before is not believed",
        trial=_thawed,
        off="no_floors",
        shape=COLD,
    ),
    Row(
        number=9,
        name="Redis killed",
        promise="the database answers; no more than 10 connects a second and process",
        trial=_killed,
        off="no_breaker",
        shows="connects a second",
        shape=COLD,
    ),
    Row(
        number=10,
        name="Redis restarted empty",
        promise="the database is asked no more than it takes to fill Redis again",
        trial=_restarted_empty,
        off="no_fill",
        shows="database reads a second",
        shape=COLD,
    ),
    Row(
        number=11,
        name="Redis restored from an old dump",
        promise="resurrected entries are not believed",
        trial=_restored,
        off="no_floors",
        shape=COLD,
    ),
    Row(
        number=12,
        name="failover to a replica that missed the revocation",
        promise="what it had stored before is not believed",
        trial=_failed_over,
        off="no_floors",
        shape=COLD,
    ),
    Row(
        number=14,
        name="the URL leads to a replica",
        promise="it is not used, and the log says why",
        trial=_pointed_at_replica,
        off="no_role_check",
        shows="the replica was",
        shape=COLD,
    ),
    Row(
        number=16,
        name="Redis paused for all commands",
        promise="requests wait 300 ms more at the most; then Redis is not asked any more",
        trial=_slow_or_silent(lambda s: _pause(s, "ALL"), heal=lambda s: s.watch(2.0)),
        off="no_breaker",
        shows="with the breaker open",
        shape=COLD,
    ),
    Row(
        number=17,
        name="latency of 20, 100, 500 ms",
        promise="requests wait 300 ms more at the most; with 500 ms soon not at all",
        trial=_delayed,
        off="no_breaker",
        shows="at a latency of",
        shape=COLD,
    ),
    Row(
        number=18,
        name="1 kB/s, byte by byte",
        promise="no errors; requests wait 300 ms more at the most",
        trial=_torn(Conduct(slice_bytes=1, bytes_per_second=1000)),
        off="no_fallback",
        shows=" errors",
        shape=COLD,
    ),
    Row(
        number=19,
        name="reset in the middle of an answer",
        promise="the database answers instead; no errors",
        trial=_torn(Conduct(resets_after=5)),
        off="no_fallback",
        shows=" errors",
        shape=COLD,
    ),
    Row(
        number=20,
        name="the entry of a revoked key evicted, an old one written back",
        promise="it is not believed",
        trial=_evicted,
        off="no_floors",
        shape=COLD,
    ),
    Row(
        number=21,
        name="Redis full",
        promise="revoking works; the entry that cannot be overwritten is not believed",
        trial=_full,
        off="no_floors",
        shape=COLD,
    ),
    Row(
        number=24,
        name="garbage, other types, truncated entries, 10 MB",
        promise="each is a miss, and counted; no errors",
        trial=_garbage,
        off="no_seal",
        shape=COLD,
    ),
    Row(
        number=25,
        name="forged entries, entries under another key's name",
        promise="refused; the other key stays valid",
        trial=_forged_and_swapped,
        off="no_seal",
        shape=COLD,
    ),
    Row(
        number=26,
        name="replay of an old sealed entry",
        promise="not believed",
        trial=_replayed,
        off="no_floors",
        shape=COLD,
    ),
    Row(
        number=28,
        name="password rotated, commands forbidden",
        promise="Redis is left aside, the log says so; in use again 5 s after",
        trial=_locked_out,
        off="no_breaker",
        shows="Redis was still asked",
        shape=COLD,
    ),
    Row(
        number=29,
        name="FLUSHALL ten times a second",
        promise="the database is asked no more than it takes to fill Redis again",
        trial=_flushed_all_the_time,
        off="no_fill",
        shows="database reads a second",
        shape=COLD,
    ),
    Row(
        number=50,
        name="two releases with different entries",
        promise="an unknown form is a miss; no errors",
        trial=_two_releases,
        off="any_format",
        shows=" errors",
        shape=COLD,
    ),
]
