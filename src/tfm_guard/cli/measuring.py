"""What `tfm-guard tune` measures, and how: with little load, and without leaving anything."""

import asyncio
import os
import statistics
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple
from uuid import UUID, uuid4

from tfm_guard.clock import SystemClock
from tfm_guard.counters import Counters
from tfm_guard.hashing import Hashing, HashingProfile
from tfm_guard.local_cache import Denial, LocalCache, NegativeCache
from tfm_guard.records import KeyCredentials, VerifiedKey
from tfm_guard.redis_access import RedisAccess
from tfm_guard.store import Place, Store
from tfm_guard.usage import BATCH as FLUSHED_AT_ONCE

CALLS: Final = 50  # of one kind, one after the other
CALLS_AT_ONCE: Final = 96  # for each number of connections
CONNECTIONS: Final = (1, 2, 4, 8, 16)
# Of the connections that a server has free, the part that is tried at the most: a fourth.
_PART_OF_FREE: Final = 4
# Of the most look-ups a second: more connections than for that are not worth it.
_NEARLY: Final = 0.8
# Look-ups of so many keys are what connections are tried with.
BATCH: Final = 64
_HASHES: Final = 3
_FLUSHES: Final = 3
_FLUSHED: Final = (100, 1000)  # keys
# Just more than a dict of 2^14 slots takes: it has grown then, and is at its emptiest.
_ENTRIES: Final = 10_923
# As long as none is known: `acme`, and what people call a key.
_USUAL_BYTES: Final = 16

_clock: Final = SystemClock()


class Timing(NamedTuple):
    """Seconds that a call took, of several made one after the other."""

    median: float
    slowest: float


class Crowd(NamedTuple):
    """The fewest *connections* that come to four fifths of the most look-ups a second."""

    connections: int
    per_second: float
    most_per_second: float


class Entries(NamedTuple):
    """Bytes of an entry in each of the two caches of a process, with its part of their tables."""

    key: float
    refused: float


class DatabaseMeasures(NamedTuple):
    """What was measured of a database that has its tables."""

    poll: Timing
    reading: Crowd
    flush_seconds: float  # of a whole batch
    admitted: int | None  # connections; none where any number is
    account_id_bytes: float
    name_bytes: float


class RedisMeasures(NamedTuple):
    """What was measured of Redis."""

    ping: Timing
    reading: Crowd


async def time_hash(passes: int, memory_kib: int) -> float:
    """Return the seconds of one argon2id hash: the median of some."""
    hashing = Hashing(HashingProfile(passes, memory_kib, 1), Counters())
    try:
        await hashing.hash(b"to start the thread")
        return (await _time(lambda: hashing.hash(b"to see how long it takes"), _HASHES)).median
    finally:
        hashing.close()


def measure_entries(account_id_bytes: float, name_bytes: float) -> Entries:
    """Return what is taken for each remembered key, one with texts so long, and refused token."""
    account_id = "a" * round(account_id_bytes or _USUAL_BYTES)
    name = "n" * round(name_bytes or _USUAL_BYTES)
    credentials = KeyCredentials(frozenset({"send"}), "api")

    def remember(cache: LocalCache, number: int) -> None:
        prefix = f"{number:08x}"
        key = VerifiedKey.pack(
            digest=os.urandom(16),
            key_id=UUID(bytes=os.urandom(16)),
            key_prefix=prefix,
            account_id=account_id,
            name=name,
            expires_at=None,
            replaced_at=None,
            credentials=credentials,
        )
        cache.put(prefix.encode(), key, 600.0)
        entry = cache.entries[prefix.encode()]
        # As if each had been used since the last flush: with its place in the list, and a time.
        entry.hits, entry.used_at = 1, float(number)
        cache.used.append(entry)

    denial = Denial("", None)
    cache = LocalCache(_ENTRIES)
    key = _bytes_of(lambda number: remember(cache, number))
    negative = NegativeCache(2 * _ENTRIES)
    return Entries(key, _bytes_of(lambda _: negative.put(os.urandom(16), denial)))


def _bytes_of(add: Callable[[int], None]) -> float:
    tracemalloc.start()
    try:
        for number in range(_ENTRIES):
            add(number)
        return tracemalloc.get_traced_memory()[0] / _ENTRIES
    finally:
        tracemalloc.stop()


async def measure_database(store: Store) -> DatabaseMeasures:
    """Measure a database whose tables are there."""
    nobody = uuid4()
    # The statement of a poll; as this one is not in the register, it writes nothing.
    poll = await _time(lambda: store.poll(nobody, Place(0, None, 1)), CALLS)
    unknown = [f"~{number:07}" for number in range(BATCH)]
    room = await store.count_room()
    most = CONNECTIONS[-1] if room is None else room.free // _PART_OF_FREE
    reading = await _crowd(lambda: store.find_keys(unknown), most)
    few, many = [
        min([await store.time_flush(count) for _ in range(_FLUSHES)]) for count in _FLUSHED
    ]
    each = max(many - few, 0.0) / (_FLUSHED[1] - _FLUSHED[0])
    sample = await store.sample_keys()
    return DatabaseMeasures(
        poll,
        reading,
        few + each * FLUSHED_AT_ONCE,
        None if room is None else room.admitted,
        sample.account_id_bytes,
        sample.name_bytes,
    )


async def measure_redis(redis: RedisAccess, names: str) -> RedisMeasures:
    """Measure a Redis; *names* begins names of which none is there."""
    wire = await redis.connect()  # which refuses a replica and a cluster
    await wire.close()
    ping = await _time(redis.client.ping, CALLS)
    unknown = [f"{names}~{number:07}" for number in range(BATCH)]
    return RedisMeasures(ping, await _crowd(lambda: redis.client.mget(unknown), CONNECTIONS[-1]))


async def _time(call: Callable[[], Awaitable[object]], count: int) -> Timing:
    await call()  # on a connection that is opened for it
    seconds = []
    for _ in range(count):
        started = _clock.monotonic()
        await call()
        seconds.append(_clock.monotonic() - started)
    return Timing(statistics.median(seconds), max(seconds))


async def _crowd(call: Callable[[], Awaitable[object]], most: int) -> Crowd:
    """Try more and more connections at once, up to *most*."""
    rates = {count: await _rate(call, count) for count in CONNECTIONS if count <= max(most, 1)}
    best = max(rates.values())
    fewest = min(count for count, rate in rates.items() if rate >= _NEARLY * best)
    return Crowd(fewest, rates[fewest], best)


async def _rate(call: Callable[[], Awaitable[object]], connections: int) -> float:
    """Return how many calls a second so many connections come to."""
    await asyncio.gather(*(call() for _ in range(connections)))  # which opens them
    left = iter(range(CALLS_AT_ONCE))

    async def work() -> None:
        for _ in left:
            await call()

    started = _clock.monotonic()
    await asyncio.gather(*(work() for _ in range(connections)))
    return CALLS_AT_ONCE / (_clock.monotonic() - started)
