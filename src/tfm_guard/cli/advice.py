"""What `tfm-guard tune` concludes from its measurements. Nothing here measures anything."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from tfm_guard.cli.measuring import (
    BATCH,
    CONNECTIONS,
    Crowd,
    DatabaseMeasures,
    Entries,
    RedisMeasures,
)
from tfm_guard.settings import MAXIMUM_WORK_KIB, Settings
from tfm_guard.store import Times
from tfm_guard.usage import BATCH as FLUSHED_AT_ONCE

# The least passes for so many MiB: OWASP's choices of argon2id, which it holds for equally strong
# (Password Storage Cheat Sheet).
_LEAST_PASSES: Final = ((46, 1), (19, 2), (12, 3), (9, 4), (7, 5))
_MOST_PASSES: Final = 10
# So that one slow query does not hold up all others.
_LEAST_CONNECTIONS: Final = 4
_MOST_CACHED: Final = 10_000_000
_MIB: Final = 2**20
# Connections of a process beside its two pools.
_BESIDE: Final = 5
# Of the connections that a server admits, what processes may take together.
_MOST_OF_ROOM: Final = 0.9
_NO_ROOM: Final = (
    "even this is too much; raise max_connections, or put a PgBouncer between them and the server"
)
_FEWER: Final = "the server admits no more"
_FLUSH_RANGE: Final = (5, 60)  # seconds: more often is of no use, more seldom loses too much
_MOST_FLUSHING: Final = 0.1  # of the time
# Of one server core, for all processes' reads of the feed.
_MOST_POLLING: Final = 0.25
_POLL_SECONDS: Final = 0.25
_LINKED_POLL_SECONDS: Final = 1.0
_PING_SECONDS: Final = 0.5  # of the link
_LEASE_SECONDS: Final = 2.0
_LONGEST_LEASE_SECONDS: Final = 20.0
_TRIES: Final = 4  # reads of the feed within a lease: three of them may fail


class Wishes(NamedTuple):
    """What was asked for; *hash_seconds* is none where it was not."""

    hash_seconds: float | None
    hash_mib: int
    memory_mib: int


class HashCost(NamedTuple):
    """The seconds of one argon2id hash with the memory that is wished for."""

    one_pass: float
    each_further: float

    def of(self, passes: int) -> float:
        """Return the seconds with that many *passes*."""
        return self.one_pass + (passes - 1) * self.each_further


@dataclass(frozen=True)
class Advice:
    """What *name* should be, what it is, and why."""

    name: str
    value: float
    present: float
    reason: str

    @property
    def variable(self) -> str:
        """The variable of the setting with that name."""
        return f"TFM_GUARD_{self.name.upper()}"


def least_passes(mib: int) -> int:
    """Return how many passes OWASP asks for with so much memory, at least 7 MiB."""
    return next(passes for memory, passes in _LEAST_PASSES if mib >= memory)


def advise_hashing(wishes: Wishes, cost: HashCost, present: Settings) -> Iterator[Advice]:
    """Choose as many passes as the wanted time allows, and never fewer than OWASP asks for."""
    memory, least = wishes.hash_mib * 1024, least_passes(wishes.hash_mib)
    most = min(_MOST_PASSES, MAXIMUM_WORK_KIB // memory)
    passes = least
    words = f"the fewest that OWASP asks for with {wishes.hash_mib} MiB"
    if wishes.hash_seconds is not None:
        wanted = f"{wishes.hash_seconds * 1000:g} ms"
        further = (wishes.hash_seconds - cost.one_pass) / cost.each_further
        passes = max(least, min(most, 1 + math.floor(further)))
        if cost.of(passes) > wishes.hash_seconds:
            words += f", though that is more than {wanted}"
        elif passes == most:
            words = f"the most passes that can be set with {wishes.hash_mib} MiB"
        else:
            words = f"as many as {wanted} allow"
    milliseconds = cost.of(passes) * 1000
    yield Advice(
        "argon2_memory_kib",
        memory,
        present.argon2_memory_kib,
        f"{wishes.hash_mib} MiB a hash; a process makes two hashes at once at the most",
    )
    yield Advice(
        "argon2_time_cost",
        passes,
        present.argon2_time_cost,
        f"{words}: one hash takes {milliseconds:.1f} ms here",
    )
    yield Advice("argon2_parallelism", 1, present.argon2_parallelism, "one lane, as OWASP has it")


def advise_cache(wishes: Wishes, entries: Entries, present: Settings) -> Advice:
    """Fill the memory that is granted."""
    each = entries.key + entries.refused
    fitting = int(wishes.memory_mib * _MIB / each)
    # Three digits: the rest is not known so exactly.
    digit = 10 ** max(len(str(fitting)) - 3, 0)
    size = max(1, min(_MOST_CACHED, fitting // digit * digit))
    most = "; more cannot be set" if size == _MOST_CACHED else ""
    return Advice(
        "local_cache_size",
        size,
        present.local_cache_size,
        f"{wishes.memory_mib} MiB a process, at {entries.key:.0f} bytes for a key and "
        f"{entries.refused:.0f} for a refused token, of which as many are remembered{most}",
    )


def advise_database(
    processes: int, measures: DatabaseMeasures, present: Settings
) -> Iterator[Advice]:
    """Choose connections for reading, and how often usage is written."""
    reading = measures.reading
    size = max(reading.connections, _LEAST_CONNECTIONS)
    words = _connections(reading)
    if measures.admitted is not None:
        admitted = int((measures.admitted * _MOST_OF_ROOM / processes - _BESIDE) // 2)
        if admitted < size:
            size = max(admitted, 1)
            words = f"{_FEWER if admitted > 0 else _NO_ROOM}: {words}"
        words += (
            f"; of the server's {measures.admitted} connections, all processes ({processes}) hold "
            f"up to {processes * (2 * size + _BESIDE)}"
        )
    yield Advice("database_pool_size", size, present.database_pool_size, words)
    yield _advise_flushing(processes, measures, present)


def _advise_flushing(processes: int, measures: DatabaseMeasures, present: Settings) -> Advice:
    alone = measures.admitted is None  # SQLite: one writes at a time
    writers = processes if alone else 1
    seconds = measures.flush_seconds
    least, most = _FLUSH_RANGE
    value = max(least, min(most, math.ceil(seconds * writers / _MOST_FLUSHING)))
    who = f"{writers} processes, one at a time," if writers > 1 else "a process"
    return Advice(
        "usage_flush_seconds",
        value,
        present.usage_flush_seconds,
        f"writing the use of {FLUSHED_AT_ONCE} keys takes {seconds * 1000:.0f} ms and a commit: "
        f"{who} would "
        f"write for {seconds * writers / value:.1%} of the time; a process that is killed loses "
        f"up to {value} s of counts",
    )


def _connections(reading: Crowd) -> str:
    return (
        f"look-ups of {BATCH} keys a second: {reading.per_second:.0f} on {reading.connections} of "
        f"the up to {CONNECTIONS[-1]} connections that were tried, {reading.most_per_second:.0f} "
        f"at the most; not below {_LEAST_CONNECTIONS}"
    )


def advise_redis(measures: RedisMeasures, present: Settings) -> Advice:
    """Choose connections for reading from Redis."""
    reading = measures.reading
    size = max(reading.connections, _LEAST_CONNECTIONS)
    return Advice(
        "redis_pool_size",
        size,
        present.redis_pool_size,
        f"{_connections(reading)}; a PING takes "
        f"{measures.ping.median * 1000:.2f} ms, at most {measures.ping.slowest * 1000:.2f} ms",
    )


def advise_times(
    processes: int, times: Times, database: DatabaseMeasures, redis: RedisMeasures | None
) -> list[Advice]:
    """Choose the times that all processes share, so that the lease outlives failed reads."""
    poll = _interval(_POLL_SECONDS, processes, database.poll.median)
    linked = _interval(_LINKED_POLL_SECONDS, processes, database.poll.median)
    slowest = database.poll.slowest
    answered = _PING_SECONDS + (redis.ping.slowest if redis else 0.0)
    needed = max(_TRIES * (poll + slowest), linked + 2 * slowest, 2 * answered, _LEASE_SECONDS)
    lease = min(math.ceil(2 * needed) / 2, _LONGEST_LEASE_SECONDS)
    unfed = max(times.unfed_seconds, 2 * lease)
    took = f"{database.poll.median * 1000:.2f} ms, at most {slowest * 1000:.2f} ms"
    return [
        Advice(
            "lease_seconds",
            lease,
            times.lease_seconds,
            f"a read of the feed takes {took}: {_TRIES} fit into the lease, so that three in a row "
            "may fail; where a process does not answer, revoking waits 1.5 leases",
        ),
        Advice("poll_seconds", poll, times.poll_seconds, _polling(processes, database, poll)),
        Advice(
            "linked_poll_seconds",
            linked,
            times.linked_poll_seconds,
            _polling(processes, database, linked),
        ),
        Advice(
            "unfed_seconds",
            unfed,
            times.unfed_seconds,
            "at least two leases; how long keys in memory work on where only Redis answers, and "
            "the longest that revoking waits for a process",
        ),
    ]


def _interval(shortest: float, processes: int, seconds: float) -> float:
    """Return the shortest interval that keeps all processes' reads within their share of a core."""
    longest = 10 * shortest
    needed = math.ceil(20 * processes * seconds / _MOST_POLLING) / 20
    return min(longest, max(shortest, needed))


def _polling(processes: int, database: DatabaseMeasures, interval: float) -> str:
    rate = processes / interval
    busy = rate * database.poll.median
    return (
        f"reads of the feed a second by all processes ({processes}): {rate:g}, which keep at most "
        f"{busy:.1%} of a server core busy; up to {_MOST_POLLING:.0%} are fine"
    )
