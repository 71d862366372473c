"""`tfm-guard tune`: settings that fit this machine, its database and its Redis."""

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import click

from tfm_guard.cli.database import existing_store, fault_of
from tfm_guard.cli.failures import Failure, NotNow, failure
from tfm_guard.cli.tables import print_json
from tfm_guard.errors import GuardError

if TYPE_CHECKING:
    from tfm_guard.cli.advice import Advice, Wishes
    from tfm_guard.cli.measuring import DatabaseMeasures, RedisMeasures
    from tfm_guard.settings import Settings
    from tfm_guard.store import Look, Times

_PLAN: Final = (
    "Measures for a few seconds: one argon2id hash after the other; some 600 short reads of the "
    "database, on up to 16 connections, and 6 flushes of up to 1000 made-up keys, each in a "
    "transaction that is rolled back; some 600 reads of Redis. Nothing is kept."
)
_POOL: Final = 16  # connections, at the most, to what is measured


@dataclass
class _Findings:
    """What came of it. *again*: what could not be measured may be in a moment."""

    settings: "list[Advice]" = field(default_factory=list)
    times: "list[Advice]" = field(default_factory=list)
    not_measured: list[dict[str, str]] = field(default_factory=list)
    failed: bool = False
    again: bool = False

    def miss(self, what: str, why: str) -> None:
        """Note what is not there to be measured."""
        self.not_measured.append({"what": what, "why": why})

    def fail(self, what: str, why: str, *, again: bool = False) -> None:
        """Note what could not be measured though it should be there."""
        self.miss(what, why)
        self.failed = True
        self.again |= again


@click.command()
@click.option(
    "--argon2-ms",
    type=click.IntRange(1, 10_000),
    help="The most that one hash should take; without it, the least work that OWASP accepts.",
)
@click.option(
    "--argon2-mib",
    type=click.IntRange(7, 256),
    default=19,
    show_default=True,
    help="The memory of one hash; OWASP accepts none below 7.",
)
@click.option(
    "--memory-mib",
    type=click.IntRange(1, 16_384),
    default=64,
    show_default=True,
    help="The memory that a process may take for what it remembers.",
)
@click.option(
    "--processes",
    type=click.IntRange(1, 10_000),
    help="How many processes will share the database; without it, as many as do now.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tune(
    argon2_ms: int | None, argon2_mib: int, memory_mib: int, processes: int | None, *, as_json: bool
) -> None:
    """Measure this machine, the database and Redis, and print the settings that fit them.

    Each with its present value and the reason, as lines to be pasted where environment variables
    are set; progress goes to stderr. It reads, and what it writes to the database is rolled back,
    so nothing is changed, and little is asked of what runs. The exit code is 0 also without a
    Redis; 1 if the database has no tables, or what is wrong must be mended first; 3 if something
    could not be reached.
    """
    from tfm_guard.cli.advice import Wishes

    seconds = None if argon2_ms is None else argon2_ms / 1000
    findings = asyncio.run(_tune(Wishes(seconds, argon2_mib, memory_mib), processes))
    if as_json:
        print_json(_as_json(findings))
    else:
        click.echo("\n".join(_lines(findings)))
    if findings.failed:
        raise (NotNow if findings.again else Failure)(
            *(f"not measured: {each['what']}: {each['why']}" for each in findings.not_measured)
        )


async def _tune(wishes: "Wishes", processes: int | None) -> _Findings:
    from tfm_guard.cli.advice import advise_cache, advise_database, advise_redis, advise_times
    from tfm_guard.cli.measuring import measure_entries
    from tfm_guard.settings import Settings

    settings = Settings.load(os.environ)
    findings = _Findings()
    click.echo(_PLAN, err=True)
    findings.settings += await _tune_hashing(wishes, settings)
    look, times, database = await _measure_database(findings)
    redis = await _measure_redis(settings, look, findings)
    click.echo("Remembering keys …", err=True)
    texts = (database.account_id_bytes, database.name_bytes) if database else (0.0, 0.0)
    findings.settings.append(advise_cache(wishes, measure_entries(*texts), settings))
    if database is not None:
        processes = processes or max(look.processes if look else 0, 1)
        findings.settings += advise_database(processes, database, settings)
        if times is not None:
            findings.times += advise_times(processes, times, database, redis)
    if redis is not None:
        findings.settings.append(advise_redis(redis, settings))
    return findings


async def _tune_hashing(wishes: "Wishes", settings: "Settings") -> "list[Advice]":
    from tfm_guard.cli.advice import HashCost, advise_hashing
    from tfm_guard.cli.measuring import time_hash

    click.echo(f"argon2id with {wishes.hash_mib} MiB …", err=True)
    one, two = [await time_hash(passes, wishes.hash_mib * 1024) for passes in (1, 2)]
    # On a busy machine the second may come out as the faster one.
    cost = HashCost(one, max(two - one, one / 4))
    return list(advise_hashing(wishes, cost, settings))


async def _measure_database(
    findings: _Findings,
) -> "tuple[Look | None, Times | None, DatabaseMeasures | None]":
    from tfm_guard.cli.measuring import measure_database
    from tfm_guard.store import HEAD

    click.echo("The database …", err=True)
    what = "the database"
    async with existing_store(pool_size=_POOL) as store:
        try:
            look = await store.look()
            if look is None or look.revision is None:
                findings.fail(what, str(fault_of(look)))
                return None, None, None
            if look.revision != HEAD:
                said = f"its tables are at revision {look.revision}, this release needs {HEAD}"
                findings.fail(what, f"{said}: tfm-guard doctor")
                return None, None, None
            return look, await store.shared_times(), await measure_database(store)
        except GuardError as error:
            told = failure(error)
            findings.fail(what, "; ".join(told.lines), again=isinstance(told, NotNow))
            return None, None, None


async def _measure_redis(
    settings: "Settings", look: "Look | None", findings: _Findings
) -> "RedisMeasures | None":
    from tfm_guard.cli.measuring import measure_redis
    from tfm_guard.redis_access import RedisAccess, describe

    if settings.redis_url is None:
        findings.miss("Redis", "there is none: TFM_GUARD_REDIS_URL is not set")
        return None
    click.echo("Redis …", err=True)
    redis = RedisAccess(settings.redis_url, pool_size=_POOL)
    installation = look.settings["installation_id"] if look else "tune"
    try:
        return await measure_redis(redis, f"tfm:{installation}:v1:key:")
    except GuardError as error:  # a cluster
        findings.fail("Redis", str(error))
    except Exception as error:  # noqa: BLE001  # whatever the library and the server come up with
        advice = "check that Redis runs and that TFM_GUARD_REDIS_URL names it"
        findings.fail("Redis", f"{describe(error)}; {advice}", again=True)
    finally:
        await redis.close()
    return None


def _lines(findings: _Findings) -> Iterator[str]:
    """Yield what is to be pasted; all that is not a setting stands in a comment."""
    for advice in findings.settings:
        yield f"# {_reason(advice)}"
        yield f"{advice.variable}={_number(advice.value)}"
    for each in findings.not_measured:
        # Why is told on stderr if it is a failure.
        yield f"# not measured: {each['what']}" + ("" if findings.failed else f": {each['why']}")
    for advice in findings.times:
        yield f"# {advice.name} = {_number(advice.value)}, for all processes: {_reason(advice)}"
    if changes := [advice for advice in findings.times if advice.value != advice.present]:
        options = " ".join(
            f"--{advice.name.replace('_', '-')} {_number(advice.value)}" for advice in changes
        )
        yield f"# To change them, end all processes, then run: tfm-guard db times {options}"


def _reason(advice: "Advice") -> str:
    kept = advice.value == advice.present
    return f"{'as it is' if kept else f'now {_number(advice.present)}'}; {advice.reason}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def _as_json(findings: _Findings) -> dict[str, Any]:
    return {
        "settings": [
            {"variable": advice.variable, **_fields(advice)} for advice in findings.settings
        ],
        "times": [{"name": advice.name, **_fields(advice)} for advice in findings.times],
        "not_measured": findings.not_measured,
    }


def _fields(advice: "Advice") -> dict[str, Any]:
    return {"value": advice.value, "present": advice.present, "reason": advice.reason}
