"""What keys cost that memory does not know and Redis does: T4.

With 64 and 512 requests at a time for as many keys, the throughput is compared with one GET by
redis-py for each request, on up to 100 connections; with one at a time, the latency. Memory is
emptied before each round. With asyncio's own event loop, and with uvloop.

    python -m benchmarks.shared_cache [--json] [--brief | --long]
"""

import asyncio
import gc
import itertools
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence

import uvloop
from redis.asyncio import BlockingConnectionPool, Redis

from benchmarks.insides import MadeKey, freshness_of, linked, local_of, make_keys, shared_of
from benchmarks.measuring import Figure, Length, Result, figure_of, median_s, run
from tests.support.redis import RedisServer
from tfm_guard import Guard
from tfm_guard.records import CacheEntry

CONCURRENCY = (64, 512)
MORE_CURVE = (1, 4, 16, 64, 256, 512)
FASTER_AT_LEAST = 10
SLOWER_AT_MOST = 1.5
CONNECTIONS = 100
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def entry_of(guard: Guard, key: MadeKey) -> CacheEntry:
    """Return what the shared cache keeps of *key*."""
    return CacheEntry(
        sealed_at=freshness_of(guard).database_time(),
        version=1,
        revoked=False,
        digest=key.digest,
        key_id=key.id,
        account_id=key.account_id,
        name=key.name,
        scopes=("send",),
        expires_at=None,
        replaced_at=None,
    )


async def fill(guard: Guard, keys: Sequence[MadeKey]) -> None:
    """Have Redis know *keys*."""
    shared = shared_of(guard)
    for key in keys:
        shared.put(key.prefix, entry_of(guard, key))
    while (filling := shared._filling) is not None:  # noqa: SLF001
        await asyncio.wait({filling})


class Contest:
    """The two ways to the same keys."""

    def __init__(self, guard: Guard, keys: Sequence[MadeKey], plain: "Redis") -> None:
        self._guard = guard
        self._tokens = [key.token for key in keys]
        names = shared_of(guard)._names  # noqa: SLF001
        self._names = [names + key.prefix for key in keys]
        self._plain = plain

    async def guarded(self, count: int) -> float:
        """Return the seconds for so many verifications at a time."""
        local_of(self._guard).clear()
        counters = self._guard.counters
        before = counters.shared_hits
        took = await _time([self._guard.verify(token) for token in self._tokens[:count]])
        if counters.shared_hits - before != count:
            raise SystemExit("a key was not found in Redis")
        return took

    async def plainly(self, count: int) -> float:
        """Return the seconds for so many GETs at a time."""
        return await _time([self._plain.get(name) for name in self._names[:count]])

    async def rounds(self, count: int, times: int) -> list[tuple[float, float]]:
        """Return the seconds of both, in turns, so many *times*."""
        found = []
        for number in range(times):
            if number % 2:
                ours = await self.guarded(count)
                found.append((ours, await self.plainly(count)))
            else:
                plain = await self.plainly(count)
                found.append((await self.guarded(count), plain))
        return found


async def _time(calls: Sequence[Awaitable[object]]) -> float:
    started = time.perf_counter()
    if len(calls) == 1:
        answers = [await calls[0]]
    else:
        answers = await asyncio.gather(*calls)
    took = time.perf_counter() - started
    if None in answers:
        raise SystemExit("a key is not there")
    return took


async def contest_of(contest: Contest, length: Length, loop: str) -> list[Figure]:
    """Return what comes of it on the event loop that runs."""
    await contest.rounds(max(CONCURRENCY), 2)  # connections are made
    figures = []
    for count in CONCURRENCY:
        found = await contest.rounds(count, length.of(3, 30, 60))
        figures += [
            figure_of(
                (plain / ours for ours, plain in found),
                target="T4",
                name=f"throughput, {count} at a time, {loop}",
                unit="× GET",
                least=FASTER_AT_LEAST,
            ),
            figure_of(
                (ours / count * 1e6 for ours, _ in found), target="", name="a key", unit="µs"
            ),
        ]
    found = await contest.rounds(1, length.of(20, 400, 800))
    alone = figure_of(
        (ours / plain for ours, plain in found),
        target="T4",
        name=f"latency alone, {loop}",
        unit="× GET",
        most=SLOWER_AT_MOST,
    )
    one_get = figure_of((plain * 1e6 for _, plain in found), target="", name="a GET", unit="µs")
    return [*figures, alone, one_get]


async def measured(redis: str, length: Length, loop: str) -> Result:
    """Return all that is measured on the event loop that runs."""
    result = Result(subject="shared_cache", s_ns=median_s() * 1e9, figures=[])
    with tempfile.TemporaryDirectory() as folder:
        database = f"sqlite:///{folder}/keys.db"
        pool = BlockingConnectionPool.from_url(redis, max_connections=CONNECTIONS, timeout=None)
        async with (
            Guard.from_urls(database=database, redis=redis) as guard,
            Redis.from_pool(pool) as plain,
        ):
            await linked(guard)
            keys = list(itertools.islice(make_keys(guard, max(CONCURRENCY)), max(CONCURRENCY)))
            await fill(guard, keys)
            gc.collect()
            gc.freeze()  # what is imported is walked through for neither of the two
            contest = Contest(guard, keys, plain)
            result.figures = await contest_of(contest, length, loop)
            if length is Length.LONG:
                for count in MORE_CURVE:
                    found = figure_of(
                        (count / ours for ours, _ in await contest.rounds(count, 30)),
                        target="",
                        name="",
                        unit="",
                    )
                    result.curves.setdefault(loop, []).append((count, found.value))
    return result


def measure(length: Length) -> Result:
    """Return all that is measured."""
    with RedisServer() as server:
        results = []
        for name, factory in LOOPS.items():
            with asyncio.Runner(loop_factory=factory) as runner:
                results.append(runner.run(measured(server.url, length, name)))
    first, *others = results
    for other in others:
        first.figures += other.figures
        first.curves |= other.curves
    return first


if __name__ == "__main__":
    run("shared_cache", __doc__, measure)
