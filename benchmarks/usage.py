"""What counting adds to a hit, and what writing the counts behind takes: T9.

Measures, in turn in one process: S; a hit in memory; and a hit by the same code without the lines
that count. Then flushes 10,000 keys, on SQLite and on PostgreSQL, counts the statements, and
watches how long the event loop is held.

    python -m benchmarks.usage [--json] [--brief | --long]
"""

import asyncio
import gc
import inspect
import itertools
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Self
from uuid import UUID, uuid4

from sqlalchemy import Engine, event

from benchmarks.holding import Held
from benchmarks.insides import insert, make_keys, verifier_of
from benchmarks.measuring import Figure, Length, Result, figure_of, run, spread, time_of_s
from tests.support.postgres import PostgresServer
from tfm_guard import Guard, verifier
from tfm_guard.bearer import Headers
from tfm_guard.records import Tally

CALLS = 5_000  # in each round
KEYS = 10_000
ADDED_S, FLUSH_MS, HELD_MS = 0.4, 300, 5
COUNTING = """
        if not entry.hits:
            note_used(entry)
        entry.hits += 1
        entry.used_at = now
"""
Recall = Callable[[Headers], object]


def time_of_hits(recall: Recall, headers: Headers) -> float:
    """Return the seconds of one hit."""
    numbers = range(CALLS)
    started = time.perf_counter()
    for _ in numbers:
        recall(headers)
    return (time.perf_counter() - started) / CALLS


def without_counting(guarded: Any) -> Recall:
    """Return the verifier's way through memory without the lines that count."""
    source = textwrap.dedent(inspect.getsource(verifier._warm_path))  # noqa: SLF001
    if COUNTING not in source:
        raise SystemExit("the lines that count are no longer those that are measured")
    names: dict[str, Any] = dict(vars(verifier))
    exec(source.replace(COUNTING, "\n"), names)  # noqa: S102  # our own code
    make: Callable[..., Recall] = names["_warm_path"]
    return make(
        guarded._local,  # noqa: SLF001
        guarded._freshness,  # noqa: SLF001
        guarded._digest_keys.current,  # noqa: SLF001
        guarded._refuse_wrong,  # noqa: SLF001
        guarded._clock,  # noqa: SLF001
    )


async def measure_hits(guard: Guard, length: Length) -> tuple[float, list[Figure]]:
    """Return S, in nanoseconds, and what counting adds to a hit."""
    token = (await guard.keys.create(account_id="bench", name="hits")).token.encode()
    await guard.verify(token)  # remembered from here on
    headers = [(b"host", b"127.0.0.1"), (b"authorization", b"Bearer " + token)]
    counting, plain = guard.recall, without_counting(verifier_of(guard))
    rounds = []
    gc.disable()
    for number in range(length.of(3, 61, 201)):
        if counting(headers) is None or plain(headers) is None:
            raise SystemExit("the key is not in memory")
        s = time_of_s()
        times = {}
        for recall in (counting, plain) if number % 2 else (plain, counting):
            times[recall] = time_of_hits(recall, headers)
        rounds.append((s, times[counting], times[plain]))
        await asyncio.sleep(0)  # the lease is renewed by a task of the guard
    gc.enable()
    added = figure_of(
        ((counted - bare) / s for s, counted, bare in rounds),
        target="T9",
        name="counting adds to a hit",
        unit="S",
        most=ADDED_S,
    )
    hit = figure_of((counted / s for s, counted, _ in rounds), target="", name="a hit", unit="S")
    return spread(row[0] for row in rounds).median * 1e9, [added, hit]


TABLES = {"tfm_key_usage", "tfm_usage_hours"}


class Statements:
    """Counts the statements that write to each table of usage."""

    def __init__(self) -> None:
        self.by_table: Counter[str] = Counter()

    def __enter__(self) -> Self:
        event.listen(Engine, "before_cursor_execute", self._note)
        return self

    def __exit__(self, *_: object) -> None:
        event.remove(Engine, "before_cursor_execute", self._note)

    def _note(self, _c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        words = statement.split()
        if words[:2] == ["INSERT", "INTO"] and words[2] in TABLES:
            self.by_table[words[2]] += 1


async def measure_flushes(guard: Guard, length: Length) -> list[Figure]:
    """Return how long a flush takes and holds the loop, and its statements."""
    store, kind = guard._store, guard.settings.database_url.partition(":")[0]  # noqa: SLF001
    count = length.of(500, KEYS, KEYS)
    keys = list(itertools.islice(make_keys(guard, count), count))
    await insert(guard, keys)
    ids: list[UUID] = [key.id for key in keys]
    hour, took, held, most = int(time.time() // 3600), [], [], []
    for _ in range(length.of(1, 7, 15)):
        tallies = [Tally(key_id.bytes, hour, 3, 1, time.time()) for key_id in ids]
        with Statements() as statements:
            async with Held() as watch:
                started = time.perf_counter()
                await store.add_usage(uuid4(), tallies)
                took.append((time.perf_counter() - started) * 1e3)
        held.append(watch.longest * 1e3)
        most.append(max(statements.by_table.values()))
    name = f"writing {count:,} keys, {kind}"
    return [
        figure_of(took, target="T9", name=name, unit="ms", most=FLUSH_MS),
        figure_of(held, target="T9", name=f"{name}: the loop was held", unit="ms", most=HELD_MS),
        # The median, as one of the guard's own flushes, every 5 s, may fall into a round.
        figure_of(
            most, target="T9", name=f"{name}: statements for a table", unit="", most=1, least=1
        ),
    ]


async def measure_on(url: str, length: Length) -> Result:
    """Return what is measured on the database at *url*."""
    async with Guard.from_urls(database=url) as guard:
        s, figures = await measure_hits(guard, length)
        figures += await measure_flushes(guard, length)
        return Result(subject="usage", s_ns=s, figures=figures)


def measure(length: Length) -> Result:
    """Return all that is measured."""
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure_on(f"sqlite:///{folder}/keys.db", length))
    if length is not Length.BRIEF:
        with PostgresServer() as postgres:
            other = asyncio.run(measure_on(postgres.create_database("use"), length))
        # Hits ask no database: they are told once.
        result.figures += [figure for figure in other.figures if "writing" in figure.name]
    return result


if __name__ == "__main__":
    run("usage", __doc__, measure)
