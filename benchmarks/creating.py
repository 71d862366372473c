"""What creating keys costs, and whom it holds up: T10.

Keys are created several at a time, with the shipped argon2 parameters; in turn with that, as many
hashes are computed by argon2-cffi alone, on as many threads as a guard has for them. Meanwhile the
event loop is watched.

    python -m benchmarks.creating [--json] [--brief | --long]
"""

import asyncio
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from argon2 import PasswordHasher

from benchmarks.holding import Held
from benchmarks.insides import NO_LIMIT
from benchmarks.measuring import SOME_TOKEN, Figure, Length, Result, figure_of, median_s, run
from tests.support.postgres import PostgresServer
from tfm_guard import Guard
from tfm_guard.hashing import PERMITS

TOGETHER = 8
PERCENT_AT_LEAST = 90
HELD_MS_AT_MOST = 5


def time_hashes(hasher: PasswordHasher, count: int) -> float:
    """Return the seconds in which so many hashes are computed on the threads that there are."""
    with ThreadPoolExecutor(PERMITS) as threads:
        started = time.perf_counter()
        list(threads.map(hasher.hash, [SOME_TOKEN] * count))
        return time.perf_counter() - started


async def time_keys(guard: Guard, count: int) -> float:
    """Return the seconds in which so many keys are created, several at a time."""
    left = iter(range(count))

    async def create() -> None:
        for number in left:
            await guard.keys.create(account_id=f"account-{number}", name="created")

    started = time.perf_counter()
    await asyncio.gather(*(create() for _ in range(TOGETHER)))
    return time.perf_counter() - started


async def measure_on(url: str, length: Length) -> list[Figure]:
    """Return what creating costs on the database at *url*."""
    kind = url.partition(":")[0]
    rows = []
    async with Guard.from_urls(database=url, plans=NO_LIMIT) as guard:
        settings = guard.settings
        hasher = PasswordHasher(
            settings.argon2_time_cost, settings.argon2_memory_kib, settings.argon2_parallelism
        )
        await guard.keys.create(account_id="first", name="connections are made")
        for _ in range(length.of(1, 5, 9)):
            count = length.of(8, 40, 80)
            alone = await asyncio.to_thread(time_hashes, hasher, count)
            async with Held() as held:
                took = await time_keys(guard, count)
            rows.append((100 * alone / took, held.longest * 1e3, count / took))
    return [
        figure_of(
            (row[0] for row in rows),
            target="T10",
            name=f"keys created, of the rate of argon2, {kind}",
            unit="%",
            least=PERCENT_AT_LEAST,
        ),
        figure_of(
            (row[1] for row in rows),
            target="T10",
            name=f"the loop was held meanwhile, {kind}",
            unit="ms",
            most=HELD_MS_AT_MOST,
        ),
        figure_of((row[2] for row in rows), target="", name=f"keys created, {kind}", unit="keys/s"),
    ]


def measure(length: Length) -> Result:
    """Return all that is measured."""
    result = Result(subject="creating", s_ns=median_s() * 1e9, figures=[])
    with tempfile.TemporaryDirectory() as folder:
        result.figures += asyncio.run(measure_on(f"sqlite:///{folder}/keys.db", length))
    if length is not Length.BRIEF:
        with PostgresServer() as postgres:
            url = postgres.create_database("creating")
            result.figures += asyncio.run(measure_on(url, length))
    return result


if __name__ == "__main__":
    run("creating", __doc__, measure)
