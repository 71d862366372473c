"""Usage: when each key was last used and how often, counted in memory and written behind.

A hit costs no more than its count (`verifier`): the entry carries it, and stands on the list of
used entries until it is counted here. What the slower ways accept, and what is refused for a key
that there is, is counted here at once; a token that is of no key leaves no trace. Every few seconds
all of it is written, in batches: one statement for each table, in one transaction with the batch's
id, so that a batch counts once however often it is written. Nothing but usage is touched.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from itertools import islice
from types import MappingProxyType
from typing import Final, Literal, NamedTuple
from uuid import UUID

from tfm_guard.clock import Clock
from tfm_guard.counters import Counters
from tfm_guard.errors import InvalidInput
from tfm_guard.freshness import Freshness
from tfm_guard.local_cache import LocalCache
from tfm_guard.records import KeyUsage, Tally, UsageBucket, UsageRange
from tfm_guard.store import Store, UsageHour

_log: Final = logging.getLogger(__name__)

# How long closing waits for the last flush.
_CLOSING_SECONDS: Final = 3.0
_AGAIN_SECONDS: Final = 0.2
# Keys in one transaction: on SQLite it keeps other changes waiting, for tens of milliseconds.
BATCH: Final = 10_000
# Hours of keys that are kept while they cannot be written, at some 250 bytes each.
_MOST_KEPT: Final = 100_000
# Entries that are counted without letting the event loop do something else.
_STEP: Final = 500
# The ids of batches are kept for longer than this (`Store.prune_usage`): to try again later could
# count twice.
GIVE_UP_SECONDS: Final = 3600.0
_HOUR_SECONDS: Final = 3600
_UNITS: Final = MappingProxyType({"hour": timedelta(hours=1), "day": timedelta(days=1)})
_RANGES: Final[Mapping[UsageRange, tuple[Literal["hour", "day"], int]]] = MappingProxyType(
    {"24h": ("hour", 24), "7d": ("hour", 7 * 24), "30d": ("day", 30), "90d": ("day", 90)}
)


class _Batch(NamedTuple):
    """What is written in one transaction, under one id for good: it may have been already."""

    id: UUID
    tallies: list[Tally]
    made: float  # monotonic seconds


class Usage:
    """Counts what is accepted and refused for keys, and writes it every *flush_seconds*."""

    def __init__(
        self,
        *,
        store: Store,
        local: LocalCache,
        freshness: Freshness,
        flush_seconds: float,
        clock: Clock,
        random: Callable[[int], bytes],
        counters: Counters,
    ) -> None:
        self._store = store
        self._local = local
        self._freshness = freshness
        self._flush_seconds = flush_seconds
        self._clock = clock
        self._random = random
        self._counters = counters
        self._kept: dict[bytes, Tally] = {}  # by key id and hour
        self._batch: _Batch | None = None  # of which nobody knows that it was written
        self._failing = False
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Usage({len(self._local.used)} keys used, {len(self._kept)} hours of keys kept)"

    def start(self) -> None:
        """Write every few seconds from now on."""
        self._task = asyncio.get_running_loop().create_task(self._flush_for_ever())

    async def close(self) -> None:
        """Write what is left, and end: after 3 s at the latest, though it be lost."""
        self._stopping.set()
        if self._task is None:
            return
        await asyncio.wait({self._task}, timeout=_CLOSING_SECONDS)
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._batch or self._kept:
            _log.error("the usage of the last seconds is lost: the database did not take it")

    def accept(self, key_id: bytes) -> None:
        """Count a request that was accepted by another way than memory."""
        # The key is about to become an entry of the cache, and may drive out another one. Taking
        # two off the list for each keeps it from growing: what is gone from the cache is at most
        # as much as is in it.
        if len(self._local.used) > self._local.capacity:
            self._count_used(2, self._database_offset())
        self._add(key_id, self._freshness.database_time(), accepted=1)

    def refuse(self, key_id: bytes) -> None:
        """Count a refused request whose token has the prefix of this key."""
        self._add(key_id, self._freshness.database_time(), refused=1)

    async def flush(self) -> None:
        """Write all that was counted until now. Raises `Unavailable`, and then keeps the rest."""
        left = len(self._local.used)
        # Where no more can be kept, the entries keep it.
        while (step := min(left, _STEP, _MOST_KEPT - len(self._kept))) > 0:
            self._count_used(step, self._database_offset())
            left -= step
            await asyncio.sleep(0)
        if self._batch is not None:
            await self._write(self._batch)
        for _ in range(0, len(self._kept), BATCH):  # and not what is added meanwhile
            await self._write(self._next_batch())

    async def _write(self, batch: _Batch) -> None:
        self._batch = batch
        if self._clock.monotonic() - batch.made < GIVE_UP_SECONDS:
            await self._store.add_usage(batch.id, batch.tallies)
            self._counters.usage_flushes += 1
        else:
            self._drop(sum(tally.accepted + tally.refused for tally in batch.tallies))
        self._batch = None

    def _next_batch(self) -> _Batch:
        names = list(islice(self._kept, BATCH))
        tallies = [self._kept.pop(name) for name in names]
        return _Batch(UUID(bytes=self._random(16), version=4), tallies, self._clock.monotonic())

    def _count_used(self, most: int, offset: float) -> None:
        """Count the first *most* used entries; *offset* leads from monotonic to database time."""
        used = self._local.used
        for _ in range(min(most, len(used))):
            entry = used.popleft()
            # All in the hour of the last: some, a few seconds before, may be of the one before.
            self._add(entry.key_id, entry.used_at + offset, accepted=entry.count())

    def _add(self, key_id: bytes, moment: float, *, accepted: int = 0, refused: int = 0) -> None:
        hour = int(moment // _HOUR_SECONDS)
        name = key_id + hour.to_bytes(4, "big")
        tally = self._kept.get(name)
        if tally is None:
            if len(self._kept) >= _MOST_KEPT:
                self._drop(accepted + refused)
                return
            tally = self._kept[name] = Tally(key_id, hour)
        tally.refused += refused
        if accepted:
            tally.accepted += accepted
            tally.used_at = max(moment, tally.used_at or moment)

    def _drop(self, requests: int) -> None:
        self._counters.usage_dropped += requests

    def _database_offset(self) -> float:
        return self._freshness.database_time() - self._clock.monotonic()

    async def _flush_for_ever(self) -> None:
        # Processes that were started together do not write together.
        await self._pause(random.uniform(0, self._flush_seconds))  # noqa: S311
        while True:
            last = self._stopping.is_set()  # else what comes during this flush would be left
            await self._try_to_flush()
            if not last:
                await self._pause(self._flush_seconds)
            elif self._failing:
                await self._clock.sleep(_AGAIN_SECONDS)  # until closing has no more time
            else:
                return

    async def _pause(self, seconds: float) -> None:
        await self._clock.sleep(seconds, unless=self._stopping)

    async def _try_to_flush(self) -> None:
        try:
            await self.flush()
        except Exception as error:  # noqa: BLE001  # whatever it is, the next flush may do better
            self._counters.usage_failures += 1
            if not self._failing:
                _log.error("usage cannot be written, and is kept for now: %r", error)
            self._failing = True
        else:
            if self._failing:
                _log.warning("usage is written again")
            self._failing = False


def span_of(range_: UsageRange) -> timedelta:
    """Return how far back *range_* goes. Raises `InvalidInput`."""
    if range_ not in _RANGES:
        raise InvalidInput(("range",), "enum", f"Expected one of {', '.join(_RANGES)}")
    unit, count = _RANGES[range_]
    return count * _UNITS[unit]


def summarize(range_: UsageRange, now: datetime, hours: Iterable[UsageHour]) -> KeyUsage:
    """Return the use in *hours* over *range_*, the last bucket of which *now* falls in (UTC)."""
    unit, count = _RANGES[range_]
    length = _UNITS[unit]
    latest = now.replace(minute=0, second=0, microsecond=0)
    first = (latest if unit == "hour" else latest.replace(hour=0)) - (count - 1) * length
    accepted, refused = [0] * count, [0] * count
    for hour in hours:
        number = (hour.start - first) // length
        if 0 <= number < count:
            accepted[number] += hour.accepted
            refused[number] += hour.refused
    return KeyUsage(
        range=range_,
        unit=unit,
        accepted=sum(accepted),
        refused=sum(refused),
        buckets=[
            UsageBucket(start=first + number * length, accepted=yes, refused=no)
            for number, (yes, no) in enumerate(zip(accepted, refused, strict=True))
        ],
    )
