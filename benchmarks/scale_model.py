"""How often each place is asked: formulas, and a simulation that checks them.

The simulation has the library's own `LocalCache`, under a clock that it moves. Both give the same
each time.
"""

import math
from bisect import bisect
from collections import Counter
from functools import lru_cache
from itertools import accumulate
from random import Random
from typing import NamedTuple
from uuid import UUID

from tfm_guard.local_cache import LocalCache
from tfm_guard.records import KeyCredentials, VerifiedKey
from tfm_guard.settings import Settings
from tfm_guard.shared_cache import MAX_AGE_SECONDS
from tfm_guard.testing import ManualClock

DEFAULTS = Settings(database_url="")
FLUSH_SECONDS = DEFAULTS.usage_flush_seconds
# Ranks that are reckoned with one by one; the others in groups, each so much wider than the last.
_SINGLE = 1_000
_WIDER = 1.02


class Load(NamedTuple):
    """What is asked of a deployment: *rate* is that of each process, in requests a second."""

    keys: int
    processes: int
    rate: float
    cache: int = DEFAULTS.local_cache_size
    redis: bool = True
    exponent: float = 1.0  # of Zipf's law: the key of rank n is used n^exponent times less


class Seen(NamedTuple):
    """What follows, a second: all processes together but for the ratio of hits."""

    hits: float  # in a process's own memory, of its requests
    shared_hits: float  # keys found in Redis
    reads: float  # keys read from the database
    used: float  # keys used in one process between two flushes

    @property
    def looked_up(self) -> float:
        """Keys that memory did not know."""
        return self.shared_hits + self.reads


@lru_cache(64)
def popularity(keys: int, exponent: float) -> tuple[tuple[int, float], ...]:
    """Return how the use is spread: so many keys, and the part of all requests that each gets.

    The first 1,000 ranks one by one, the others in groups that are 2 % wide.
    """
    groups: list[tuple[int, float]] = []
    rank = 1
    while rank <= keys:
        last = rank if rank < _SINGLE else min(keys, int(rank * _WIDER))
        groups.append((last - rank + 1, _integral(rank - 0.5, last + 0.5, exponent)))
        rank = last + 1
    total = sum(weight for _, weight in groups)
    return tuple((count, weight / total / count) for count, weight in groups)


def _integral(low: float, high: float, exponent: float) -> float:
    if exponent == 1:
        return math.log(high / low)
    further = 1 - exponent
    return (math.pow(high, further) - math.pow(low, further)) / further


@lru_cache(1024)
def eviction_seconds(load: Load) -> float:
    """Return how long an unused key stays in a full memory: Che's approximation, of LRU.

    So long that the keys used within it fill the memory.
    """
    if load.cache >= load.keys:
        return math.inf
    groups = popularity(load.keys, load.exponent)
    low, high = 0.0, 1e12
    for _ in range(100):
        middle = math.sqrt((low or 1e-9) * high)
        held = sum(n * -math.expm1(-p * load.rate * middle) for n, p in groups)
        low, high = (middle, high) if held < load.cache else (low, middle)
    return high


@lru_cache(1024)
def on_paper(load: Load) -> Seen:
    """Return what the formulas give.

    A key is missed if it was evicted since its last use, or if what was read of it is too old. That
    age counts from the read of the database, also in the memories of those who had it from Redis:
    so they all ask again at about the same time, and one of them finds that Redis has it no more.
    """
    seconds = eviction_seconds(load)
    missed = reads = used = 0.0
    for count, part in popularity(load.keys, load.exponent):
        rate = part * load.rate  # in one process
        everywhere = rate * load.processes
        evicted = math.exp(-rate * seconds)
        # From one read of the database to the next, if nobody forgets it earlier.
        cycle = MAX_AGE_SECONDS + 1 / (everywhere if load.redis else rate)
        # One process makes that read; each other one misses the key once, if it uses it meanwhile.
        others = 1 - 1 / load.processes if load.redis else 0.0
        first_uses = 1 - others * math.exp(-rate * MAX_AGE_SECONDS)
        aged = first_uses / (rate * cycle)
        misses = count * rate * (1 - (1 - evicted) * (1 - aged))
        missed += misses
        reads += count / cycle if load.redis else misses * load.processes
        used += count * -math.expm1(-rate * FLUSH_SECONDS)
    total = missed * load.processes
    reads = min(reads, total)
    return Seen(1 - missed / load.rate, total - reads if load.redis else 0.0, reads, used)


class _Process:
    """A process's memory, and the keys that it used since the last flush and has counted."""

    def __init__(self, load: Load) -> None:
        self.memory = LocalCache(load.cache)
        self.counted: set[bytes] = set()

    def look_up(self, rank: int, now: float, shared: dict[int, float]) -> str:
        """Do as verifying does, and return where the key was found."""
        entry = self.memory.entries.get(b"%08x" % rank)
        if entry is not None and now < entry.deadline:
            if not entry.hits:
                self.memory.used.append(entry)
            entry.hits += 1
            entry.used_at = now
            return "hits"
        sealed = shared.get(rank, -math.inf)
        found = now - sealed < MAX_AGE_SECONDS
        if not found:
            sealed = shared[rank] = now
        key = _key(rank)
        self.counted.add(key.record[16:32])
        self.memory.put(b"%08x" % rank, key, int(sealed + MAX_AGE_SECONDS))
        return "shared_hits" if found else "reads"

    def flush(self) -> int:
        """Return how many keys were used."""
        for _ in range(len(self.memory.used)):
            entry = self.memory.used.popleft()
            entry.count()
            self.counted.add(entry.key_id)
        used = len(self.counted)
        self.counted.clear()
        return used


_CREDENTIALS = KeyCredentials(frozenset({"send"}), "api")


def _key(rank: int) -> VerifiedKey:
    return VerifiedKey.pack(
        digest=bytes(16),
        key_id=UUID(int=rank),
        key_prefix=f"{rank:08x}",
        account_id="acme",
        name="CI",
        expires_at=None,
        replaced_at=None,
        credentials=_CREDENTIALS,
    )


@lru_cache(64)
def simulated(load: Load, *, requests: int, seed: int) -> Seen:
    """Return what comes of so many requests, at times and for keys drawn by chance.

    Each process has a `LocalCache`; Redis is a dictionary that loses nothing. What happens in the
    first ten minutes is not counted.
    """
    random = Random(seed)  # noqa: S311  # to be repeatable is the point
    clock = ManualClock()
    processes = [_Process(load) for _ in range(load.processes)]
    bounds = list(accumulate(rank**-load.exponent for rank in range(1, load.keys + 1)))
    shared: dict[int, float] = {}
    counts: Counter[str] = Counter()
    began = flushed = 0.0
    for _ in range(requests):
        clock.advance(random.expovariate(load.rate * load.processes))
        now = clock.monotonic()
        if not began and now >= MAX_AGE_SECONDS:
            began = now
            counts.clear()
        if now >= flushed + FLUSH_SECONDS:
            flushed = now
            counts["used"] += sum(process.flush() for process in processes)
            counts["flushes"] += load.processes
        rank = bisect(bounds, random.random() * bounds[-1]) + 1
        process = random.choice(processes)
        counts[process.look_up(rank, now, shared if load.redis else {})] += 1
    seconds = clock.monotonic() - began
    found = counts["hits"], counts["shared_hits"], counts["reads"]
    return Seen(
        found[0] / sum(found),
        found[1] / seconds,
        found[2] / seconds,
        counts["used"] / counts["flushes"],
    )
