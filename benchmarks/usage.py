"""What counting adds to a hit, and what writing the counts behind takes: T9.

Measures, interleaved in one process: S, the time of one SHA-256 of a token; a hit in memory; and a
hit by the same code without the lines that count. Then flushes 10,000 keys on SQLite, and watches
how long the event loop is held. Prints medians, and what counting adds as a multiple of S.

    python benchmarks/usage.py [--json]
"""

import argparse
import asyncio
import gc
import hashlib
import inspect
import json
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import create_engine, insert

from tfm_guard import Guard, verifier
from tfm_guard.records import Tally
from tfm_guard.store import schema

ROUNDS = 61
CALLS = 5_000  # in each round
KEYS = 10_000
FLUSHES = 9
TARGETS = {"added_S": 0.4, "flush_ms": 300.0, "held_ms": 5.0}
COUNTING = """
        if not entry.hits:
            note_used(entry)
        entry.hits += 1
        entry.used_at = now
"""


def time_of(call: Callable[[], object]) -> float:
    """Return the seconds of one *call*."""
    numbers = range(CALLS)
    started = time.perf_counter()
    for _ in numbers:
        call()
    return (time.perf_counter() - started) / CALLS


def without_counting(guarded: Any) -> Callable[[Any], object]:
    """Return the guard's way through memory without the lines that count."""
    source = textwrap.dedent(inspect.getsource(verifier._warm_path))  # noqa: SLF001
    if COUNTING not in source:
        raise SystemExit("the lines that count are no longer those that are measured")
    names: dict[str, Any] = dict(vars(verifier))
    exec(source.replace(COUNTING, "\n"), names)  # noqa: S102  # our own code
    make: Callable[..., Callable[[Any], object]] = names["_warm_path"]
    parts = (guarded._local, guarded._freshness, guarded._digest_keys.current)  # noqa: SLF001
    return make(*parts, guarded._usage, guarded._clock)  # noqa: SLF001


async def measure_hits(guard: Guard) -> dict[str, float]:
    """Return the medians, in nanoseconds, and the ratio."""
    created = await guard.keys.create(account_id="bench", name="hits")
    token = created.token.encode()
    await guard.verify(token)  # remembered from here on
    headers = [(b"host", b"127.0.0.1"), (b"authorization", b"Bearer " + token)]
    counting = guard.recall
    plain = without_counting(guard._parts.verifier)  # type: ignore[union-attr]  # noqa: SLF001
    sha256 = hashlib.sha256
    rounds = []
    gc.disable()
    for _ in range(ROUNDS):
        if counting(headers) is None or plain(headers) is None:
            raise SystemExit("the key is not in memory")
        s = time_of(lambda: sha256(token).digest())
        rounds.append((s, time_of(lambda: plain(headers)), time_of(lambda: counting(headers))))
        await asyncio.sleep(0)  # the lease is renewed by a task of the guard
    gc.enable()
    s, bare, counted = (statistics.median(column) * 1e9 for column in zip(*rounds, strict=True))
    added = statistics.median((counted - bare) / s for s, bare, counted in rounds)
    return {"S_ns": s, "hit_ns": counted, "uncounted_ns": bare, "added_S": added}


def insert_keys(url: str) -> list[UUID]:
    """Insert keys whose tokens nobody knows; return their ids."""
    ids = [uuid4() for _ in range(KEYS)]
    columns = {
        "account_id": "bench",
        "name": "flushed",
        "secret_hash": "",
        "scopes": "send",
        "version": 1,
        "created_at": datetime.now(UTC),
        "created_by": "benchmark",
    }
    rows = [{**columns, "id": id_, "prefix": f"{n:08x}"} for n, id_ in enumerate(ids)]
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(insert(schema.keys), rows)
    engine.dispose()
    return ids


async def measure_flushes(guard: Guard) -> dict[str, float]:
    """Return how long a flush takes and holds the loop, in milliseconds."""
    store = guard._store  # noqa: SLF001
    took, held = [], []
    hour = int(time.time() // 3600)
    ids = insert_keys(guard.settings.database_url)
    for _ in range(FLUSHES):
        tallies = [Tally(key_id.bytes, hour, 3, 1, time.time()) for key_id in ids]
        longest = 0.0
        flush = asyncio.ensure_future(store.add_usage(uuid4(), tallies))
        started = last = time.perf_counter()
        while not flush.done():
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        took.append((time.perf_counter() - started) * 1e3)
        held.append(longest * 1e3)
    return {"flush_ms": statistics.median(took), "held_ms": statistics.median(held)}


async def measure() -> dict[str, float]:
    """Return all that is measured."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/keys.db"
        async with Guard.from_urls(database=url, plans={"free": 2}) as guard:
            return {**await measure_hits(guard), **await measure_flushes(guard)}


def main() -> None:
    """Print the table, or JSON; exit 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args()
    result = asyncio.run(measure())
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            target = f"  (target: at most {TARGETS[name]:g})" if name in TARGETS else ""
            print(f"{name:14} {value:10.2f}{target}")
    raise SystemExit(any(result[name] > most for name, most in TARGETS.items()))


if __name__ == "__main__":
    main()
