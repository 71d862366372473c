"""What a key in memory costs, from one to a million of them: T3.

For each number of keys: the time of single hits on keys that are drawn by Zipf's law (exponent 1),
as multiples of S; the memory of the process that each key takes; and the pause of a full garbage
collection, in which all that was there with one key is left out. The header of each request is made
just before, as a server does, and so is in the processor's cache.

    python -m benchmarks.local_cache [--json] [--brief | --long]
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
from collections.abc import Callable, Iterable, Sequence
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
COLLECTIONS = 9
_BATCH = 1_000  # made and remembered together
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Memory(NamedTuple):
    """What was found with so many keys in memory."""

    keys: int
    hits: list[float]  # in seconds, sorted
    s: float  # seconds
    resident: int  # bytes
    pauses: list[float]  # of full collections, in seconds
    tracked: int  # objects that the collector walks through
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


def remember(guard: Guard, keys: Sequence[MadeKey]) -> bytes:
    """Have memory know *keys*, by the same steps as if they had been read; return their tokens."""
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
    return b"".join(key.token for key in keys)


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
    size, times = resident(), array("d")
    for start in range(0, draws, HITS_AT_ONCE):
        times.extend(time_hits(guard.recall, tokens, drawn[start : start + HITS_AT_ONCE]))
        await freshness_of(guard).poll()  # so that memory counts, however slow this machine is
    gc.callbacks.remove(pauses)
    return Memory(
        keys=keys,
        hits=sorted(times),
        s=median_s(),
        resident=size,
        pauses=[collect() for _ in range(COLLECTIONS)],
        longest_pause=pauses.longest,
        tracked=len(gc.get_objects()),
    )


async def grow(guard: Guard, sizes: Sequence[int], draws: int) -> list[Memory]:
    """Return what is found at each of the *sizes*."""
    made = make_keys(guard, sizes[-1])
    # One object, which the garbage collector need not walk through; not of zeros, for which no
    # memory would be taken yet.
    tokens = bytearray(b"-") * (TOKEN_LENGTH * sizes[-1])
    known, found = 0, []
    for size in sizes:
        while known < size:
            joined = remember(guard, list(itertools.islice(made, min(size - known, _BATCH))))
            tokens[known * TOKEN_LENGTH : known * TOKEN_LENGTH + len(joined)] = joined
            known += len(joined) // TOKEN_LENGTH
            await asyncio.sleep(0)
        if size == sizes[0]:
            # What is there without the keys, modules above all, is not what they cost.
            gc.collect()
            gc.freeze()
        await freshness_of(guard).poll()
        found.append(await look(guard, tokens, size, draws))
    return found


def figures_of(found: Sequence[Memory]) -> list[Figure]:
    """Return the comparison of the most keys with one."""
    one, most = found[0], found[-1]
    each = (most.resident - one.resident) / (most.keys - one.keys)
    slower = (percentile(most.hits, 0.5) / most.s) / (percentile(one.hits, 0.5) / one.s)
    what = f"{most.keys:,} keys"
    pause = min(most.pauses) * 1e3
    return [
        Figure(
            target="T3", name=f"{what}: median hit, of that of 1", value=slower, unit="×", most=2
        ),
        Figure(
            target="T3",
            name=f"{what}: memory of a key",
            value=each,
            unit="bytes",
            most=BYTES_AT_MOST,
        ),
        Figure(
            target="T3",
            name=f"{what}: added to a full collection",
            value=pause,
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
        figure_of((hit / one.s for hit in one.hits), target="", name="a hit, 1 key", unit="S"),
        figure_of((hit / most.s for hit in most.hits), target="", name=f"a hit, {what}", unit="S"),
    ]


async def measured(length: Length) -> Result:
    """Return all that is measured."""
    sizes = [10**power for power in range(length.of(4, 6, 6) + 1)]
    if length is not Length.LONG:
        sizes = [sizes[0], sizes[-1]]
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/keys.db"
        async with Guard.from_urls(database=url, local_cache_size=sizes[-1]) as guard:
            found = await grow(guard, sizes, length.of(2_000, 50_000, 200_000))
    return Result(
        subject="local_cache",
        s_ns=spread(memory.s for memory in found).median * 1e9,
        figures=figures_of(found),
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
