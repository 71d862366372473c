"""What Redis and the database see at any size, on paper and in simulation: docs/scale.md's tables.

Needs no server, and prints the same every time: the formulas and the simulation of `scale_model`,
and the costs that `benchmarks.capacity` has measured.

    python -m benchmarks.scale
"""

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import UUID

import msgspec

from benchmarks.scale_model import DEFAULTS, FLUSH_SECONDS, Load, on_paper, simulated
from tfm_guard.coalescer import LIMIT
from tfm_guard.freshness import FLOOR_SECONDS
from tfm_guard.link import _PING_SECONDS as PING_SECONDS
from tfm_guard.records import CacheEntry

# Of a new database; a test compares them.
POLL_SECONDS, LINKED_POLL_SECONDS = 0.25, 1.0
# What begins within one turn of the event loop travels together; and how long a turn takes.
TURN_SECONDS = 0.001
# What a deployment is taken to have.
DATABASE_CORES = 8
REDIS_CORES = 1  # commands run on one
POOLED = 4  # connections in each of a process's two pools to the database

# Microseconds of a core, by what they are spent on, and bytes, as `python -m benchmarks.capacity`
# printed them: the rounded means of two runs.
MEASURED = {
    "poll": 190,
    "look-up of 1 key": 190,
    "look-up of 256 keys": 2550,
    "register of 1,000": 590,
    "flush, a key": 21,
    "bytes in tfm_keys": 382,
    "bytes in tfm_key_usage": 105,
    "bytes in tfm_usage_hours": 138,
    "creating and revoking": 3400,
    "process: a key from the database": 110,
    "process: a key from Redis": 90,
    "verifying a request in memory": 1.7,
    "MGET of 1": 22,
    "MGET of 256": 250,
    "SET": 22,
    "PING": 23,
    "PUBLISH": 28,
    "delivery to one process": 5.1,
    "bytes of an entry": 366,
}
RATES = (10, 1_000, 10_000, 100_000)  # requests a second in each process
PROCESSES = (1, 10, 100, 1_000)
KEYS = (10**3, 10**6, 10**9)
REVOCATIONS = (1, 60, 1_000)  # a minute
SIMULATIONS = (
    Load(keys=1_000, processes=1, rate=20, redis=False),
    Load(keys=10_000, processes=1, rate=50, cache=1_000, redis=False),
    Load(keys=10_000, processes=4, rate=20, cache=2_000),
    Load(keys=30_000, processes=2, rate=40, exponent=0.8),
)
REQUESTS = 90_000
_LEAST_SHOWN = 0.01
SEED = 1


class Cost(NamedTuple):
    """What a deployment asks for, a second."""

    mgets: float
    redis_keys: float
    redis_bytes: float
    redis_cores: float
    selects: float
    flushed: float
    database_cores: float
    process_cores: float  # in each process, for verifying alone


def cost_of(load: Load) -> Cost:
    """Return what *load* costs, without any change of a key."""
    seen, count = on_paper(load), load.processes
    looked_up = seen.looked_up if load.redis else 0.0
    mgets = count * calls(looked_up / count)
    selects = count * calls(seen.reads / count)
    rows = count * seen.used / FLUSH_SECONDS
    redis = (
        _busy("MGET of 1", "MGET of 256", mgets, looked_up)
        + seen.reads * MEASURED["SET"]
        + count / PING_SECONDS * MEASURED["PING"]
    )
    polls = count / (LINKED_POLL_SECONDS if load.redis else POLL_SECONDS)
    database = (
        polls * MEASURED["poll"]
        + _busy("look-up of 1 key", "look-up of 256 keys", selects, seen.reads)
        + rows * MEASURED["flush, a key"]
    )
    process = (
        load.rate * MEASURED["verifying a request in memory"]
        + seen.shared_hits / count * MEASURED["process: a key from Redis"]
        + seen.reads / count * MEASURED["process: a key from the database"]
    )
    return Cost(
        mgets,
        looked_up,
        looked_up * (request_bytes() + entry_bytes()),
        redis / 1e6 if load.redis else 0.0,
        selects,
        rows,
        database / 1e6,
        process / 1e6,
    )


def calls(keys: float) -> float:
    """Return how many calls a second carry so many keys, each up to `LIMIT`, in one process."""
    if keys == 0:
        return 0.0
    return max(-math.expm1(-keys * TURN_SECONDS) / TURN_SECONDS, keys / LIMIT)


def _busy(one: str, many: str, number: float, keys: float) -> float:
    """Return the microseconds of *number* calls for so many *keys*."""
    each = (MEASURED[many] - MEASURED[one]) / (LIMIT - 1)
    return number * (MEASURED[one] - each) + keys * each


def entry_bytes() -> int:
    """Return the bytes of a sealed entry, with texts of 16 letters."""
    entry = CacheEntry(
        sealed_at=1.9e9,
        version=1,
        revoked=False,
        digest=bytes(16),
        key_id=UUID(int=2**127),
        account_id="a" * 16,
        name="n" * 16,
        scopes=("send",),
        expires_at=datetime(2030, 1, 1, tzinfo=UTC),
        replaced_at=None,
    )
    return 1 + 16 + len(msgspec.msgpack.encode(entry)) + 16  # format, version, entry, seal


def request_bytes() -> int:
    """Return the bytes that ask Redis for one key."""
    return len(f"$51\r\ntfm:{'0' * 32}:v1:key:{'0' * 8}\r\n")


def fullest(cost: Cost) -> str:
    """Return what is nearest to its limit, or furthest beyond it, and how near."""
    shares = {
        "process": cost.process_cores,
        "Redis": cost.redis_cores / REDIS_CORES,
        "database": cost.database_cores / DATABASE_CORES,
    }
    name, share = max(shares.items(), key=lambda item: item[1])
    words = f"{name} {number(100 * share)} %"
    return f"**{words}**" if share > 1 else words


def number(value: float) -> str:
    """Return *value* with three digits that count, and at most two decimals."""
    if value == 0:
        return "0"
    if value < _LEAST_SHOWN:
        return f"<{_LEAST_SHOWN:g}"
    digits = 2 - math.floor(math.log10(value))
    return f"{round(value, digits):,.{max(min(digits, 2), 0)}f}"


def power(value: int) -> str:
    """Return a power of ten as it is written."""
    return f"10{str(int(math.log10(value))).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---:"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_of_measures() -> str:
    """What the reckoning stands on."""
    rows = [[name, number(value)] for name, value in MEASURED.items()]
    return table(("what", "µs of a core, or bytes"), rows)


def table_of_memory() -> str:
    """What one process's memory of the default size answers, without Redis."""
    rows = []
    for keys in (10**3, 10**5, 10**6, 10**7, 10**9):
        cells = [power(keys)]
        for rate in RATES:
            load = Load(keys=keys, processes=1, rate=rate, redis=False)
            seen = on_paper(load)
            cells.append(f"{seen.hits:.2%}, {number(seen.reads)}/s")
        rows.append(cells)
    return table(("keys", *(f"{rate:,} requests/s" for rate in RATES)), rows)


def table_of_simulations() -> str:
    """Paper beside simulation."""
    rows = []
    for load in SIMULATIONS:
        paper = on_paper(load)
        chance = simulated(load, requests=REQUESTS, seed=SEED)
        rows.append(
            [
                f"{load.keys:,}",
                f"{load.exponent:g}",
                f"{min(load.cache, load.keys):,}",
                f"{load.processes} × {load.rate:g}/s",
                "yes" if load.redis else "no",
                f"{paper.hits:.1%}, {chance.hits:.1%}",
                f"{number(paper.shared_hits)}, {number(chance.shared_hits)}",
                f"{number(paper.reads)}, {number(chance.reads)}",
                f"{number(paper.used)}, {number(chance.used)}",
            ]
        )
    columns = (
        *("keys", "exponent", "remembered", "requests", "Redis", "hits in memory"),
        *("keys/s from Redis", "keys/s from the database", "keys used between flushes"),
    )
    return table(columns, rows)


def table_of_costs(keys: int, cache: int) -> str:
    """What so many keys cost, with Redis, where each process remembers up to *cache* of them."""
    rows = []
    for processes in PROCESSES:
        for rate in RATES:
            load = Load(keys=keys, processes=processes, rate=rate, cache=cache)
            cost = cost_of(load)
            rows.append(
                [
                    f"{processes:,}",
                    f"{rate:,}",
                    f"{on_paper(load).hits:.2%}",
                    number(cost.mgets),
                    number(cost.redis_keys),
                    number(cost.redis_bytes / 1e6),
                    number(cost.selects),
                    number(processes / LINKED_POLL_SECONDS),
                    number(cost.flushed),
                    fullest(cost),
                ]
            )
    columns = (
        *("processes", "requests/s each", "hits in memory", "MGET/s", "keys in them/s", "MB/s"),
        *("SELECT/s", "polls/s", "keys flushed/s", "fullest"),
    )
    return table(columns, rows)


def table_without_redis() -> str:
    """What the database sees of a million keys where there is no Redis."""
    rows = []
    for processes in PROCESSES:
        for rate in RATES:
            cost = cost_of(Load(keys=10**6, processes=processes, rate=rate, redis=False))
            rows.append(
                [
                    f"{processes:,}",
                    f"{rate:,}",
                    number(cost.selects),
                    number(processes / POLL_SECONDS),
                    number(cost.flushed),
                    number(cost.database_cores),
                    fullest(cost),
                ]
            )
    columns = ("processes", "requests/s each", "SELECT/s", "polls/s", "keys flushed/s")
    return table((*columns, "database cores", "fullest"), rows)


def table_of_revocations() -> str:
    """What revoking asks for, with Redis, beside all else."""
    rows = []
    for processes in PROCESSES:
        for each_minute in REVOCATIONS:
            rate = each_minute / 60
            publishes, deliveries = rate * (1 + processes), 2 * rate * processes
            redis = (
                publishes * (MEASURED["PUBLISH"] + MEASURED["PING"])  # each with a ROLE before it
                + deliveries * MEASURED["delivery to one process"]
            )
            # A poll that finds the head moved reads the changes, and tells how far it has come.
            moved = -math.expm1(-rate * LINKED_POLL_SECONDS) * processes / LINKED_POLL_SECONDS
            database = (
                rate * MEASURED["creating and revoking"]
                + 2 * rate * processes / 1000 * MEASURED["register of 1,000"]
                + moved * (MEASURED["look-up of 1 key"] + MEASURED["poll"])
            )
            kept = each_minute * FLOOR_SECONDS / 60
            rows.append(
                [
                    f"{processes:,}",
                    f"{each_minute:,}",
                    number(publishes),
                    number(deliveries),
                    number(2 * moved),
                    number(redis / 1e6),
                    number(database / 1e6),
                    f"{kept:,.0f} to {24 * 60 * each_minute:,.0f}",
                ]
            )
    columns = ("processes", "revocations/min", "PUBLISH/s", "deliveries/s", "statements of polls/s")
    return table((*columns, "Redis cores", "database cores", "rows of the feed"), rows)


def table_of_storage() -> str:
    """What is kept of so many keys."""
    rows = []
    for keys in (10**3, 10**6, 10**7, 10**8, 10**9):
        taken = keys / 2**32
        rows.append(
            [
                power(keys),
                number(
                    keys
                    * (MEASURED["bytes in tfm_keys"] + MEASURED["bytes in tfm_key_usage"])
                    / 1e9
                ),
                number(keys * 92 * MEASURED["bytes in tfm_usage_hours"] / 1e9),
                number(keys * MEASURED["bytes of an entry"] / 1e9),
                f"{taken:.3%}",
                number(1 / (1 - taken)),
            ]
        )
    columns = (
        *("keys", "keys and last use, GB", "92 days of use, an hour a day, GB"),
        *("Redis, if all are used in 10 min, GB", "prefixes taken", "attempts to mint one"),
    )
    return table(columns, rows)


def table_of_limits() -> str:
    """Where each part ends, if it did nothing else."""
    second = 1e6
    rows = [
        ["a process: requests in memory", _limit(1, "verifying a request in memory", "/s")],
        ["a process: keys from Redis", _limit(1, "process: a key from Redis", "/s")],
        ["a process: keys from the database", _limit(1, "process: a key from the database", "/s")],
        ["Redis: MGETs of one key", _limit(REDIS_CORES, "MGET of 1", "/s")],
        [
            "Redis: keys, 256 in each MGET",
            f"{number(LIMIT * REDIS_CORES * second / MEASURED['MGET of 256'])}/s",
        ],
        ["Redis: deliveries of changes", _limit(REDIS_CORES, "delivery to one process", "/s")],
        [
            f"Redis: processes, at a PING every {PING_SECONDS:g} s",
            number(PING_SECONDS * second / MEASURED["PING"]),
        ],
        ["database: SELECTs of one key", _limit(DATABASE_CORES, "look-up of 1 key", "/s")],
        [
            "database: keys, 256 in each SELECT",
            f"{number(LIMIT * DATABASE_CORES * second / MEASURED['look-up of 256 keys'])}/s",
        ],
        ["database: keys in flushes of usage", _limit(DATABASE_CORES, "flush, a key", "/s")],
        [
            f"database: processes with Redis, a poll every {LINKED_POLL_SECONDS:g} s",
            number(LINKED_POLL_SECONDS * DATABASE_CORES * second / MEASURED["poll"]),
        ],
        [
            f"database: processes without Redis, a poll every {POLL_SECONDS:g} s",
            number(POLL_SECONDS * DATABASE_CORES * second / MEASURED["poll"]),
        ],
        [
            f"database: processes on 97 connections, with pools of {POOLED}",
            f"{97 // (2 * POOLED + 5)}",
        ],
        ["keys that there ever were, by their prefixes", f"{2**32:,}"],
    ]
    return table(("limit", "at"), rows)


def _limit(cores: int, name: str, unit: str) -> str:
    return f"{number(cores * 1e6 / MEASURED[name])}{unit}"


def tables() -> Iterator[tuple[str, str]]:
    """Yield each table after what it shows."""
    yield "Measured", table_of_measures()
    yield "Limits", table_of_limits()
    yield "Paper and simulation, each first the one, then the other", table_of_simulations()
    yield "One process: hits in memory, and keys asked for", table_of_memory()
    for keys in KEYS:
        yield f"{power(keys)} keys, with Redis", table_of_costs(keys, DEFAULTS.local_cache_size)
    yield "10⁶ keys, with Redis, all of them remembered", table_of_costs(10**6, 10**6)
    yield "10⁶ keys, without Redis", table_without_redis()
    yield "Revocations", table_of_revocations()
    yield "Storage", table_of_storage()


def main() -> None:
    """Print all tables."""
    for title, rows in tables():
        print(f"{title}\n\n{rows}\n")


if __name__ == "__main__":
    main()
