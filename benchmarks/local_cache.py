"""What a key in memory costs, from one to a million of them: T3.

For each number of keys: the time of single hits on keys that are drawn by Zipf's law (exponent 1),
as multiples of S; and the pause of a full garbage collection after that, less what it is with one
key. The header of each request is made just before, as a server does, and so is in the processor's
cache. What the process grows by for each key is measured before any key is used: what a hit or a
flush of usage leaves behind is no part of it.

All that is there before the guard is made, some 95,000 objects of imported modules, is frozen, so
that the collector passes it over. What it walks through is the guard, and what that remembers.

    .venv/bin/python -m benchmarks.local_cache [--json] [--brief | --long]
"""

import asyncio
import bisect
import gc
import itertools
import os
import random
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.insides import SEED, MadeKey, freshness_of, local_of, make_keys
from benchmarks.measuring import (
    Figure,
    Length,
    Result,
    figure_of,
    median_s,
    percentile,
    run,
    spread,
)
from tfm_guard import Guard
from tfm_guard.clock import SystemClock
from tfm_guard.reader import _credentials, _whole_second
from tfm_guard.records import VerifiedKey
from tfm_guard.token import TOKEN_LENGTH

BYTES_AT_MOST = 300
PAUSE_MS_AT_MOST = 5
HITS_AT_ONCE = 1_000
MADE_AT_ONCE = 1_000
COLLECTIONS = 9
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Memory(NamedTuple):
    """What was found with so many keys in memory."""

    keys: int
    hits: Sequence[float]  # in seconds, sorted; an array, as the collector walks through lists
    s: float  # seconds
    pauses: list[float]  # of full collections, in seconds
    tracked: int  # objects that the collector walks through
    used: int  # keys with hits that are not yet counted
    longest_pause: float  # of those that came by themselves meanwhile


class Pauses:
    """Listens to the garbage collector, and keeps its longest pause."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._started = 0.0

    def __call__(self, phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            self._started = time.perf_counter()
        else:
            self.longest = max(self.longest, time.perf_counter() - self._started)


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def remember(guard: Guard, keys: Sequence[MadeKey]) -> None:
    """Have memory know *keys*, by the same steps as if they had been read."""
    put, credentials = local_of(guard).put, _credentials(("send",), "api", False)  # noqa: FBT003
    deadline = _whole_second(int(SystemClock.monotonic()) + 3600)
    for key in keys:
        packed = VerifiedKey.pack(
            digest=key.digest,
            key_id=key.id,
            key_prefix=key.prefix,
            account_id=key.account_id,
            name=key.name,
            expires_at=None,
            replaced_at=None,
            credentials=credentials,
        )
        put(key.prefix.encode(), packed, deadline)


def zipf(count: int, draws: int) -> Sequence[int]:
    """Return *draws* numbers below *count*, the first few of which come most often."""
    sums = array("d", itertools.accumulate(1 / rank for rank in range(1, count + 1)))
    dice = random.Random(SEED)  # noqa: S311
    return array("I", (bisect.bisect(sums, dice.random() * sums[-1]) for _ in range(draws)))


def time_hits(
    recall: Callable[..., object], tokens: bytearray, numbers: Iterable[int]
) -> list[float]:
    """Return the seconds of each hit on the tokens of those *numbers*, with reading the clock."""
    clock, times = time.perf_counter, []
    for number in numbers:
        token = tokens[number * TOKEN_LENGTH : (number + 1) * TOKEN_LENGTH]
        headers = ((b"host", b"127.0.0.1"), (b"authorization", bytes(b"Bearer " + token)))
        started = clock()
        found = recall(headers)
        times.append(clock() - started)
        if found is None:
            raise SystemExit("a key is not in memory")
    return times


def collect() -> float:
    """Return the seconds of a core that one full collection takes."""
    started = time.thread_time()
    gc.collect()
    return time.thread_time() - started


async def look(guard: Guard, tokens: bytearray, keys: int, draws: int) -> Memory:
    """Return what is found with so many *keys*, whose *tokens* stand one after the other."""
    pauses = Pauses()
    drawn = zipf(keys, draws)
    gc.callbacks.append(pauses)
    times = array("d")
    for start in range(0, draws, HITS_AT_ONCE):
        times.extend(time_hits(guard.recall, tokens, drawn[start : start + HITS_AT_ONCE]))
        await freshness_of(guard).poll()  # so that memory counts, however slow this machine is
    gc.callbacks.remove(pauses)
    return Memory(
        keys=keys,
        hits=array("d", sorted(times)),
        s=median_s(),
        pauses=[collect() for _ in range(COLLECTIONS)],
        longest_pause=pauses.longest,
        tracked=len(gc.get_objects()),
        used=len(local_of(guard).used),
    )


def remember_some(guard: Guard, made: Iterator[MadeKey], count: int) -> bytes:
    """Have memory know the next *count* of the keys *made*, and return their tokens."""
    keys = list(itertools.islice(made, count))
    remember(guard, keys)
    return b"".join(key.token for key in keys)


def memory_of_a_key(guard: Guard, count: int) -> float:
    """Return the bytes that the process grows by for each of *count* keys, and forget them."""
    made = make_keys(guard, count)
    # What it takes to make some of them is there from then on, and is used again for the others.
    remember_some(guard, made, MADE_AT_ONCE)
    before = resident()
    for _ in range(MADE_AT_ONCE, count, MADE_AT_ONCE):
        remember_some(guard, made, MADE_AT_ONCE)
    grown = resident() - before
    local_of(guard).clear()
    return grown / (count - MADE_AT_ONCE)


async def grow(guard: Guard, sizes: Sequence[int], draws: int) -> list[Memory]:
    """Return what is found at each of the *sizes*."""
    made = make_keys(guard, sizes[-1])
    # One object, which the garbage collector need not walk through.
    tokens = bytearray()
    found = []
    for size in sizes:
        while (known := len(tokens) // TOKEN_LENGTH) < size:
            tokens += remember_some(guard, made, min(size - known, MADE_AT_ONCE))
            await asyncio.sleep(0)
        await freshness_of(guard).poll()
        found.append(await look(guard, tokens, size, draws))
    return found


def figures_of(found: Sequence[Memory], key_bytes: float) -> list[Figure]:
    """Return the comparison of the most keys with one."""
    one, most = found[0], found[-1]
    slower = (percentile(most.hits, 0.5) / most.s) / (percentile(one.hits, 0.5) / one.s)
    what = f"{most.keys:,} keys"
    pause = (min(most.pauses) - min(one.pauses)) * 1e3
    return [
        Figure(
            target="T3", name=f"{what}: median hit, of that of 1", value=slower, unit="×", most=2
        ),
        Figure(
            target="T3",
            name=f"{what}: memory of a key",
            value=key_bytes,
            unit="bytes",
            most=BYTES_AT_MOST,
        ),
        Figure(
            target="T3",
            name=f"{what}: added to a full collection",
            value=max(pause, 0.0),
            unit="ms",
            most=PAUSE_MS_AT_MOST,
        ),
        Figure(
            target="T3",
            name=f"{what}: longest collection while in use",
            value=most.longest_pause * 1e3,
            unit="ms",
            most=PAUSE_MS_AT_MOST,
        ),
        Figure(
            target="",
            name=f"{what}: more objects for the collector",
            value=max(most.tracked - one.tracked, 0),
            unit="",
        ),
        Figure(
            target="", name=f"{what}: of them used, and not yet counted", value=most.used, unit=""
        ),
        figure_of(
            (pause * 1e3 for pause in one.pauses),
            target="",
            name="a full one with 1 key",
            unit="ms",
        ),
        figure_of((hit / one.s for hit in one.hits), target="", name="a hit, 1 key", unit="S"),
        figure_of((hit / most.s for hit in most.hits), target="", name=f"a hit, {what}", unit="S"),
    ]


async def measured(length: Length) -> Result:
    """Return all that is measured."""
    sizes = [10**power for power in range(length.of(4, 6, 6) + 1)]
    if length is not Length.LONG:
        sizes = [sizes[0], sizes[-1]]
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/keys.db"
        async with Guard.from_urls(database=url, local_cache_size=sizes[-1]) as guard:
            key_bytes = memory_of_a_key(guard, sizes[-1])
            await freshness_of(guard).poll()
            found = await grow(guard, sizes, length.of(2_000, 50_000, 200_000))
    return Result(
        subject="local_cache",
        s_ns=spread(memory.s for memory in found).median * 1e9,
        figures=figures_of(found, key_bytes),
        curves={
            name: [(memory.keys, percentile(memory.hits, share) / memory.s) for memory in found]
            for name, share in (("median", 0.5), ("p99", 0.99))
        },
    )


def measure(length: Length) -> Result:
    """Return all that is measured."""
    return asyncio.run(measured(length))


if __name__ == "__main__":
    run("local_cache", __doc__, measure)
