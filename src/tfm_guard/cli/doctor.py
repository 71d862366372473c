"""`tfm-guard doctor`: whether all that this library stands on is as it should be."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from tfm_guard.cli.database import existing_store
from tfm_guard.cli.failures import Failure, NotNow, failure
from tfm_guard.cli.tables import print_json, print_table
from tfm_guard.clock import SystemClock
from tfm_guard.errors import GuardError, Unavailable

if TYPE_CHECKING:
    from tfm_guard.redis_access import RedisAccess
    from tfm_guard.settings import Settings
    from tfm_guard.store import Look, Store

State = Literal["good", "advice", "wrong", "unreachable"]

_MOST_SKEW: Final = 1.0  # seconds between two clocks
_OLDEST_REDIS: Final = 7
# Of the lease: a read of the feed that takes longer leaves little of it, or nothing.
_MOST_OF_LEASE: Final = 0.25
_LONGEST_HASH: Final = 0.25  # seconds
# The least of OWASP's choices for argon2id (Password Storage Cheat Sheet): 7 MiB, five passes.
_LEAST_WORK_KIB: Final = 7168 * 5


@dataclass(frozen=True)
class Finding:
    """How it is with *part*, and *advice* on what to change if it is not good."""

    part: str
    state: State
    found: str
    advice: str | None = None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(*, as_json: bool) -> None:
    """Look at everything that verifying keys depends on, and say what to change.

    The settings, the database and its tables, Redis with its role and policy, the clocks, the
    lease, and how long argon2 takes here. Changes nothing, makes nothing. The exit code is 0 if
    nothing is wrong, whatever is advised; 1 if something is; 3 if something could not be reached.
    """
    findings = asyncio.run(_examine())
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_table(("part", "state", "found"), [(f.part, f.state, f.found) for f in findings])
        for finding in findings:
            if finding.advice:
                click.echo(f"\n{finding.part}: {finding.advice}")
    states = {finding.state for finding in findings}
    if "wrong" in states:
        raise Failure("something is wrong; see what to change above")
    if "unreachable" in states:
        raise NotNow("something could not be reached")


async def _examine() -> list[Finding]:
    from tfm_guard.settings import Settings

    settings = Settings.load(os.environ)
    findings = [Finding("settings", "good", "complete")]
    findings += [finding async for finding in _examine_database(settings)]
    findings += [finding async for finding in _examine_redis(settings)]
    findings.append(await _examine_hashing(settings))
    return findings


async def _examine_database(settings: "Settings") -> AsyncIterator[Finding]:
    async with existing_store() as store:
        try:
            seconds, skew, look = await _timed_look(store)
        except GuardError as error:
            lasting = type(failure(error)) is Failure
            yield Finding(
                "database",
                "wrong" if lasting else "unreachable",
                error.reason if isinstance(error, Unavailable) else str(error),
                "check that it runs, and that TFM_GUARD_DATABASE_URL names it",
            )
            return
    kind = settings.database_url.partition(":")[0]
    if look is None:
        yield _missing_file_finding(settings.database_url)
        return
    yield Finding("database", "good", f"{kind} answers within {seconds * 1000:.1f} ms")
    yield _schema_finding(look)
    if kind != "sqlite":  # whose clock is this machine's
        yield _clock_finding("database's clock", skew)
    if look.settings:
        yield _lease_finding(look, seconds)
        yield Finding("processes", "good", f"{look.processes} in the register")


def _missing_file_finding(url: str) -> Finding:
    from tfm_guard.settings import read_database_url

    path = Path(str(read_database_url(url).database))
    if not path.parent.is_dir():
        return Finding(
            "database",
            "wrong",
            f"the folder {path.parent} does not exist",
            "make it, or have TFM_GUARD_DATABASE_URL name a file in one that exists",
        )
    return Finding(
        "database",
        "advice",
        f"the file {path} is not there",
        "it is made when first used; if there are keys already, check that "
        "TFM_GUARD_DATABASE_URL names their file",
    )


async def _timed_look(store: "Store") -> "tuple[float, float, Look | None]":
    """Return how long a look takes, by how many seconds the clocks differ, and the look."""
    clock = SystemClock()
    await store.look()  # on a connection that is opened for it
    before, started = clock.now(), clock.monotonic()
    look = await store.look()
    seconds = clock.monotonic() - started
    skew = 0.0 if look is None else (look.now - before).total_seconds() - seconds / 2
    return seconds, skew, look


def _schema_finding(look: "Look") -> Finding:
    from tfm_guard.store import HEAD

    if look.revision is None:
        return Finding("tables", "good", "there are none; they are made when first used")
    if look.revision == HEAD:
        return Finding("tables", "good", f"revision {HEAD}, that of this release")
    advice = "run: tfm-guard db upgrade"
    if look.revision > HEAD:
        advice = "install the release that upgraded them, or a later one"
    return Finding("tables", "wrong", f"revision {look.revision}; this release: {HEAD}", advice)


def _lease_finding(look: "Look", seconds: float) -> Finding:
    lease = float(look.settings["lease_seconds"])
    poll = float(look.settings["poll_seconds"])
    linked = float(look.settings["linked_poll_seconds"])
    found = f"{lease:g} s, the feed read every {poll:g} s, or {linked:g} s with Redis"
    if max(poll, linked) + seconds > lease:
        return Finding(
            "lease",
            "wrong",
            found,
            "it ends before the feed is read again, so that every request asks the database: "
            "make it longer, with tfm-guard db times, or the database faster",
        )
    if seconds > lease * _MOST_OF_LEASE:
        advice = f"reading the database takes {seconds:.1f} s, which leaves little of the lease"
        return Finding("lease", "advice", found, advice)
    return Finding("lease", "good", found)


def _clock_finding(part: str, skew: float) -> Finding:
    found = f"{abs(skew):.3f} s {'ahead' if skew > 0 else 'behind'}"
    if abs(skew) <= _MOST_SKEW:
        return Finding(part, "good", found)
    advice = "keep all machines' clocks right, with NTP: keys end by the database's clock"
    return Finding(part, "wrong", found, advice)


async def _examine_redis(settings: "Settings") -> AsyncIterator[Finding]:
    if settings.redis_url is None:
        yield Finding(
            "Redis",
            "advice",
            "none",
            "without it each process reads a key from the database once, and revoking takes up to "
            "a quarter of a second longer; TFM_GUARD_REDIS_URL names one",
        )
        return
    from tfm_guard.redis_access import RedisAccess

    redis = RedisAccess(settings.redis_url)
    try:
        async for finding in _examine_server(redis):
            yield finding
    except GuardError as error:  # a cluster
        yield Finding("Redis", "wrong", str(error), "use a single master, with replicas if needed")
    except Exception as error:  # noqa: BLE001  # whatever the library and the server come up with
        yield Finding(
            "Redis",
            "unreachable",
            f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            "check that it runs, is a master, and that TFM_GUARD_REDIS_URL names it",
        )
    finally:
        await redis.close()


async def _examine_server(redis: "RedisAccess") -> AsyncIterator[Finding]:
    clock = SystemClock()
    wire = await redis.connect()  # which refuses a replica and a cluster
    await wire.close()
    await redis.client.ping()
    started = clock.monotonic()
    await redis.client.ping()
    milliseconds = (clock.monotonic() - started) * 1000
    server: dict[str, Any] = await redis.client.info("server")
    version = str(server.get("redis_version", "0"))
    found = f"a master, version {version}, answers within {milliseconds:.1f} ms"
    if int(version.partition(".")[0]) < _OLDEST_REDIS:
        yield Finding("Redis", "wrong", found, f"use Redis {_OLDEST_REDIS} or newer, or Valkey")
    else:
        yield Finding("Redis", "good", found)
    with suppress(Exception):  # an ACL may forbid these, which nothing else needs
        yield await _policy_finding(redis)
        yield await _redis_clock_finding(redis, clock)


async def _policy_finding(redis: "RedisAccess") -> Finding:
    memory: dict[str, Any] = await redis.client.info("memory")
    policy, most = str(memory["maxmemory_policy"]), int(memory["maxmemory"])
    found = f"{policy}, maxmemory {f'{most >> 20} MiB' if most else 'not set'}"
    if most and not policy.startswith("allkeys"):
        advice = "when it is full it takes no more entries: set maxmemory-policy allkeys-lru"
        return Finding("Redis's policy", "advice", found, advice)
    if not most:
        advice = "set maxmemory, with maxmemory-policy allkeys-lru, if others use this Redis, too"
        return Finding("Redis's policy", "advice", found, advice)
    return Finding("Redis's policy", "good", found)


async def _redis_clock_finding(redis: "RedisAccess", clock: SystemClock) -> Finding:
    before, started = clock.now(), clock.monotonic()
    seconds, microseconds = await redis.client.time()
    half = (clock.monotonic() - started) / 2
    there = datetime.fromtimestamp(seconds + microseconds / 1e6, before.tzinfo)
    return _clock_finding("Redis's clock", (there - before).total_seconds() - half)


async def _examine_hashing(settings: "Settings") -> Finding:
    from tfm_guard.counters import Counters
    from tfm_guard.hashing import Hashing, HashingProfile

    memory, passes = settings.argon2_memory_kib, settings.argon2_time_cost
    hashing = Hashing(HashingProfile(passes, memory, settings.argon2_parallelism), Counters())
    clock = SystemClock()
    await hashing.hash(b"to start the thread")
    started = clock.monotonic()
    await hashing.hash(b"to see how long it takes")
    seconds = clock.monotonic() - started
    hashing.close()
    found = f"{memory} KiB, {passes} passes: {seconds * 1000:.0f} ms"
    if seconds > _LONGEST_HASH:
        advice = "creating a key takes that long; lower TFM_GUARD_ARGON2_MEMORY_KIB or _TIME_COST"
        return Finding("argon2", "advice", found, advice)
    if memory * passes < _LEAST_WORK_KIB:
        advice = "less than OWASP asks for: 19456 KiB with 2 passes, or as much work"
        return Finding("argon2", "advice", found, advice)
    return Finding("argon2", "good", found)
