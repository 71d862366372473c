"""What happens while nothing is remembered: T5, many requests on one key; T6, a restart.

T5 counts what 1,000 requests at a time for one key cost that neither memory nor Redis knows: reads
of the database, and argon2. On SQLite and on PostgreSQL; for a key that was made here, and for one
that was imported with an argon2 hash, which must prove itself once.

T6 opens a guard on PostgreSQL and an emptied Redis, and verifies every one of many keys, 1,000 at a
time. With asyncio's own event loop, and with uvloop.

    python -m benchmarks.cold [--json] [--brief | --long]
"""

import asyncio
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from argon2 import PasswordHasher

from benchmarks.insides import MadeKey, insert, linked, local_of, make_keys
from benchmarks.measuring import Figure, Length, Result, figure_of, median_s, run
from benchmarks.shared_cache import LOOPS
from tests.support.postgres import PostgresServer
from tests.support.redis import RedisServer
from tfm_guard import Guard
from tfm_guard.errors import Unavailable

TOGETHER = 1_000
KEYS = 100_000
PER_SECOND_AT_LEAST = 10_000


async def count_of_one(guard: Guard, key: MadeKey, what: str, hashes: int) -> list[Figure]:
    """Return what many requests for one *key* cost that nothing knows."""
    counters = guard.counters
    before = counters.store_reads, counters.hashes
    found = await asyncio.gather(*(guard.verify(key.token) for _ in range(TOGETHER)))
    spent = counters.store_reads - before[0], counters.hashes - before[1]
    right = sum(verified.key_id == key.id for verified in found)
    name = f"{TOGETHER:,} requests for {what}"
    return [
        _counted(f"{name}: database reads", spent[0], 1),
        _counted(f"{name}: argon2", spent[1], hashes),
        _counted(f"{name}: answered right", right, TOGETHER),
    ]


def _counted(name: str, value: int, demanded: int) -> Figure:
    return Figure(target="T5", name=name, value=value, unit="", most=demanded, least=demanded)


async def measure_one_key(url: str, redis: str | None) -> list[Figure]:
    """Return what requests for one key cost, on the database at *url*: T5."""
    figures = []
    kind = url.partition(":")[0]
    async with Guard.from_urls(database=url, redis=redis) as guard:
        made, imported = make_keys(guard, 2)
        await insert(guard, [made])
        await insert(guard, [imported], secret_hash=PasswordHasher().hash(imported.token))
    # Opened anew: a flood of requests finds a process that has just started.
    async with Guard.from_urls(database=url, redis=redis) as guard:
        figures += await count_of_one(guard, made, f"a key, {kind}", 0)
        figures += await count_of_one(guard, imported, f"an imported key, {kind}", 1)
    return figures


async def prepare(url: str, redis: str, count: int) -> list[MadeKey]:
    """Insert so many keys and return them."""
    async with Guard.from_urls(database=url, redis=redis) as guard:
        keys = list(make_keys(guard, count))
        await insert(guard, keys)
    return keys


class Restart(NamedTuple):
    """What came of a restart."""

    rate: float  # keys per second
    hashes: int  # argon2 computations
    unavailable: int  # requests that were not answered within their second, and were sent again


async def restart(url: str, redis: str, keys: Sequence[MadeKey]) -> Restart:
    """Have a new guard verify each of *keys*."""
    async with Guard.from_urls(database=url, redis=redis) as guard:
        await linked(guard)
        tokens, unavailable = [key.token for key in keys], 0
        started = time.perf_counter()
        while tokens:
            batch, tokens = tokens[:TOGETHER], tokens[TOGETHER:]
            answers = await asyncio.gather(*map(guard.verify, batch), return_exceptions=True)
            again = [
                token
                for token, answer in zip(batch, answers, strict=True)
                if isinstance(answer, Unavailable)
            ]
            tokens, unavailable = again + tokens, unavailable + len(again)
        took = time.perf_counter() - started
        if len(local_of(guard)) != len(keys):
            raise SystemExit("not all keys are remembered")
        return Restart(len(keys) / took, guard.counters.hashes, unavailable)


def measure_restarts(url: str, server: RedisServer, length: Length) -> list[Figure]:
    """Return how fast all keys come back after a restart: T6."""
    count = length.of(1_000, KEYS, KEYS)
    keys = asyncio.run(prepare(url, server.url, count))
    # In use are all of them; a shorter run restarts with fewer.
    keys = keys[: length.of(200, 10_000, KEYS)]
    figures, restarts = [], []
    for name, factory in LOOPS.items():
        rates = []
        for _ in range(length.of(1, 3, 3)):
            with server.client() as client:
                client.flushall()
            with asyncio.Runner(loop_factory=factory) as runner:
                restarts.append(runner.run(restart(url, server.url, keys)))
            rates.append(restarts[-1].rate)
        figures.append(
            figure_of(
                rates,
                target="T6",
                name=f"restart, {count:,} keys, PostgreSQL, {name}",
                unit="keys/s",
                least=PER_SECOND_AT_LEAST,
            )
        )
    hashes = sum(each.hashes for each in restarts)
    late = sum(each.unavailable for each in restarts)
    return [
        *figures,
        Figure(target="T6", name="restarts: argon2", value=hashes, unit="", most=0),
        Figure(target="", name="restarts: requests answered 503", value=late, unit=""),
    ]


def measure(length: Length) -> Result:
    """Return all that is measured."""
    result = Result(subject="cold", s_ns=median_s() * 1e9, figures=[])
    with (
        RedisServer() as redis,
        PostgresServer() as postgres,
        tempfile.TemporaryDirectory() as folder,
    ):
        result.figures += asyncio.run(measure_one_key(f"sqlite:///{folder}/keys.db", None))
        url = postgres.create_database("one_key")
        result.figures += asyncio.run(measure_one_key(url, redis.url))
        result.figures += measure_restarts(postgres.create_database("restart"), redis, length)
    return result


if __name__ == "__main__":
    run("cold", __doc__, measure)
