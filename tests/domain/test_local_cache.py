"""Facts about what a process remembers: bounded, second chances, and no work for the collector."""

import gc
import tracemalloc
from datetime import UTC, datetime
from uuid import UUID

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tfm_guard.local_cache import Denial, LocalCache, NegativeCache
from tfm_guard.records import KeyCredentials, VerifiedKey

CREDENTIALS = KeyCredentials(frozenset({"send", "domains:write"}), "api")
EXPIRY = datetime(2040, 1, 1, tzinfo=UTC)

UNKNOWN = Denial("unknown prefix", None)
WRONG = Denial("wrong secret", bytes(16))

# Few enough to meet again and again, more than any cache below holds.
PREFIXES = [b"%08x" % number for number in range(12)]


def key_of(number: int, *, expires_at: datetime | None = EXPIRY) -> VerifiedKey:
    """Return a key whose name and account tell its number."""
    return VerifiedKey.pack(
        digest=number.to_bytes(16, "big"),
        key_id=UUID(int=number),
        key_prefix=f"{number:08x}",
        account_id=f"account-{number % 1000}",
        name=f"key {number}",
        expires_at=expires_at,
        replaced_at=None,
        credentials=CREDENTIALS,
    )


def full_cache(capacity: int, *, used: bool) -> LocalCache:
    """Return a cache with keys 0 to *capacity* - 1."""
    cache = LocalCache(capacity)
    for number in range(capacity):
        cache.put(b"%08x" % number, key_of(number), 600.0)
    for entry in cache.entries.values():
        entry.hits = int(used)
    return cache


def numbers(cache: LocalCache) -> set[int]:
    """Return the numbers of the keys in *cache*."""
    return {int(prefix, 16) for prefix in cache.entries}


class AnyUse(RuleBasedStateMachine):
    """Compares a cache with a dict that holds what was put and not dropped since."""

    @initialize(capacity=st.integers(1, 8))
    def start(self, capacity: int) -> None:
        """Begin with an empty cache."""
        self.capacity = capacity
        self.cache = LocalCache(capacity)
        self.model: dict[bytes, tuple[VerifiedKey, float]] = {}
        self.puts = 0

    @rule(prefix=st.sampled_from(PREFIXES), deadline=st.floats(0, 1000))
    def put(self, prefix: bytes, deadline: float) -> None:
        """What was put last is there."""
        self.puts += 1
        self.model[prefix] = key_of(self.puts), deadline
        self.cache.put(prefix, *self.model[prefix])
        assert self.cache.entries[prefix].key is self.model[prefix][0]

    @rule(prefix=st.sampled_from(PREFIXES))
    def drop(self, prefix: bytes) -> None:
        """What was dropped is not there."""
        self.model.pop(prefix, None)
        self.cache.drop(prefix)
        assert prefix not in self.cache.entries

    @rule(prefix=st.sampled_from(PREFIXES))
    def use(self, prefix: bytes) -> None:
        """Mark an entry as a hit does."""
        if entry := self.cache.entries.get(prefix):
            entry.hits += 1

    @rule(prefix=st.sampled_from(PREFIXES))
    def count(self, prefix: bytes) -> None:
        """Counting tells the hits and starts anew."""
        if entry := self.cache.entries.get(prefix):
            hits = entry.hits
            assert entry.count() == hits
            assert entry.count() == 0

    @rule()
    def clear(self) -> None:
        """Nothing is left."""
        self.model.clear()
        self.cache.clear()
        assert len(self.cache) == 0

    @invariant()
    def holds(self) -> None:
        """At most the capacity, and nothing but the latest."""
        assert len(self.cache) == len(self.cache.entries) <= self.capacity
        for prefix, entry in self.cache.entries.items():
            assert (entry.key, entry.deadline) == self.model[prefix]


TestAnyUse = AnyUse.TestCase
TestAnyUse.__doc__ = "Whatever is put, used, dropped and cleared, the cache agrees with a model."


def test_a_used_entry_gets_a_second_chance() -> None:
    """A used entry survives one pass of the hand and not a second one; unused ones go in order."""
    cache = full_cache(4, used=False)
    cache.entries[b"%08x" % 0].hits = 1
    for number, left in (
        (4, {0, 2, 3, 4}),
        (5, {0, 3, 4, 5}),
        (6, {0, 4, 5, 6}),
        (7, {4, 5, 6, 7}),
    ):
        cache.put(b"%08x" % number, key_of(number), 600.0)
        assert numbers(cache) == left


def test_counting_takes_no_second_chance_away() -> None:
    """An entry whose hits were counted survives one pass of the hand, and not a second one."""
    cache = full_cache(4, used=False)
    entry = cache.entries[b"%08x" % 0]
    entry.hits, entry.used_at = 7, 12.5
    assert (entry.count(), entry.hits, entry.count()) == (7, 0, 0)
    for number, left in (
        (4, {0, 2, 3, 4}),
        (5, {0, 3, 4, 5}),
        (6, {0, 4, 5, 6}),
        (7, {4, 5, 6, 7}),
    ):
        cache.put(b"%08x" % number, key_of(number), 600.0)
        assert numbers(cache) == left


def test_an_insertion_takes_few_steps() -> None:
    """With 10,000 used entries an insertion passes over no more than 32 and evicts one."""
    cache = full_cache(10_000, used=True)
    cache.put(b"%08x" % 10_000, key_of(10_000), 600.0)
    assert len(cache) == 10_000
    assert 10_000 in numbers(cache)
    # The second insertion begins where the first one ended.
    cache.put(b"%08x" % 10_001, key_of(10_001), 600.0)
    assert {*range(10_000)} - numbers(cache) == {31, 63}


def test_a_dropped_entry_makes_room() -> None:
    """What has been dropped does not count: the next insertions evict nothing else at first."""
    cache = full_cache(4, used=False)
    cache.drop(b"%08x" % 0)
    cache.put(b"%08x" % 4, key_of(4), 600.0)
    assert numbers(cache) == {1, 2, 3, 4}


def test_putting_again_replaces() -> None:
    """A key that is there is replaced in its place; nothing is evicted for it."""
    cache = full_cache(2, used=False)
    again = key_of(1, expires_at=None)
    cache.put(b"%08x" % 1, again, 5.0)
    assert numbers(cache) == {0, 1}
    assert cache.entries[b"%08x" % 1].key is again
    assert cache.entries[b"%08x" % 1].deadline == 5.0


def test_the_collector_walks_over_none_of_it() -> None:
    """Entries, keys and the dict that holds them are not tracked, also after a collection."""
    cache = full_cache(100, used=True)
    for entry in cache.entries.values():
        entry.hits, entry.used_at = 1_000_000, 1234.5
        cache.used.append(entry)
    negative = NegativeCache(100)
    negative.put(b"sixteen bytes...", UNKNOWN)
    gc.collect()
    assert not any(gc.is_tracked(entry) for entry in cache.entries.values())
    assert not any(gc.is_tracked(entry.key) for entry in cache.entries.values())
    assert not gc.is_tracked(cache.entries)


def test_a_remembered_key_takes_at_most_300_bytes() -> None:
    """100,000 keys with account, name, expiry and the cache's own order: 30 MB at most.

    Those used since they were last counted take 40 bytes more until they are.
    """
    deadlines = [float(second) for second in range(600, 660)]
    tracemalloc.start()
    try:
        cache = LocalCache(100_000)
        for number in range(100_000):
            cache.put(b"%08x" % number, key_of(number), deadlines[number % 60])
        uncounted, _ = tracemalloc.get_traced_memory()
        for number, entry in enumerate(cache.entries.values()):
            entry.hits, entry.used_at = 1 + number % 256, number / 7
            cache.used.append(entry)
        used, _ = tracemalloc.get_traced_memory()
        while cache.used:
            cache.used.popleft().count()
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(cache) == 100_000
    assert size / 100_000 <= 300
    assert (used - uncounted) / 100_000 <= 40
    assert size - uncounted < 100_000


@pytest.mark.parametrize("capacity", [1, 2, 3, 10, 101])
def test_the_negative_cache_is_bounded(capacity: int) -> None:
    """It never holds more than its capacity, and always what was put last."""
    cache = NegativeCache(capacity)
    for number in range(5 * capacity):
        digest = number.to_bytes(16, "big")
        cache.put(digest, UNKNOWN)
        assert len(cache) <= capacity
        assert cache.get(digest) == UNKNOWN
    assert cache.get((0).to_bytes(16, "big")) is None


def test_the_negative_cache_keeps_the_younger_half() -> None:
    """What belongs to the younger half of the capacity is still known."""
    cache = NegativeCache(100)
    for number in range(1000):
        cache.put(number.to_bytes(16, "big"), WRONG)
    assert all(cache.get(number.to_bytes(16, "big")) for number in range(950, 1000))


def test_the_negative_cache_forgets_all_and_says_so() -> None:
    """Clearing forgets both generations and moves the epoch; nothing else does."""
    cache = NegativeCache(4)
    for number in range(4):
        cache.put(number.to_bytes(16, "big"), WRONG)
    assert (len(cache), cache.epoch) == (4, 0)
    cache.clear()
    assert (len(cache), cache.epoch) == (0, 1)
    assert not any(cache.get(number.to_bytes(16, "big")) for number in range(4))
