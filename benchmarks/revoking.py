"""How long revoking a key takes until no process accepts it: T8.

Processes that share PostgreSQL and Redis verify the same keys over and over, at a pace that keeps
them within half of the machine. One of them revokes one key after another, and notes when `revoke`
has returned. Each notes when it last began to verify each key with success: on this machine all of
them read the same clock, so what was accepted after `revoke` had returned can be counted.

    python -m benchmarks.revoking [--json] [--brief | --long]
"""

import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import uvloop

from benchmarks.insides import MadeKey, insert, linked, make_keys
from benchmarks.measuring import Figure, Length, Result, figure_of, median_s, percentile, run
from tests.support.postgres import PostgresServer
from tests.support.redis import RedisServer
from tests.support.servers import ROOT
from tfm_guard import Guard
from tfm_guard.errors import InvalidToken

PROCESSES = 8
MOST_BUSY = 50  # percent of the cores
P50_MS, P99_MS = 5, 50
BURST, BURST_SECONDS = 20, 0.005  # verifications, and how often
BETWEEN_SECONDS = 0.05  # two revocations
SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


class Worker:
    """Verifies keys at its pace, and remembers until when each was accepted."""

    def __init__(self, guard: Guard, tokens: list[bytes]) -> None:
        self.accepted_until: dict[str, float] = {}
        self.stopping = False
        self._guard = guard
        self._tokens = tokens

    async def run(self) -> None:
        """Verify until told to stop."""
        position = 0
        while not self.stopping:
            for _ in range(BURST):
                token = self._tokens[position]
                position = (position + 1) % len(self._tokens)
                began = time.monotonic()
                try:
                    await self._guard.verify(token)
                except InvalidToken:
                    continue
                self.accepted_until[token.decode()] = began
            await asyncio.sleep(BURST_SECONDS)


class Ended(NamedTuple):
    """What a worker has to say at its end."""

    accepted_until: dict[str, float]
    cpu: float  # seconds, since it was ready


def cpu_seconds() -> float:
    """Return how long this process has used a core."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def work(database: str, redis: str, tokens: list[bytes]) -> None:
    """Be a worker, until stdin ends."""
    async with Guard.from_urls(database=database, redis=redis) as guard:
        await linked(guard)
        worker = Worker(guard, tokens)
        task = asyncio.create_task(worker.run())
        await asyncio.sleep(len(tokens) / BURST * BURST_SECONDS)  # each is in memory
        print("ready", flush=True)
        before = cpu_seconds()
        await asyncio.to_thread(sys.stdin.readline)
        worker.stopping = True
        await task
        print(json.dumps(Ended(worker.accepted_until, cpu_seconds() - before)), flush=True)


@contextmanager
def workers(
    count: int, database: str, redis: str, tokens: Path
) -> Iterator[list["subprocess.Popen[str]"]]:
    """Run so many workers, which are ready."""
    with ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = stack.enter_context(
                subprocess.Popen(  # noqa: S603  # ourselves
                    [sys.executable, "-m", "benchmarks.revoking", database, redis, str(tokens)],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise SystemExit("a worker did not come up")
        yield processes


class Revoked(NamedTuple):
    """What came of revoking keys one after the other."""

    seconds: list[float]  # each
    by_lease: int  # how many were not acknowledged by all
    returned: dict[str, float]  # when, by token
    own: Ended


async def revoke_all(database: str, redis: str, keys: list[MadeKey]) -> Revoked:
    """Revoke *keys*, being one of those who verify them."""
    async with Guard.from_urls(database=database, redis=redis) as guard:
        await linked(guard)
        worker = Worker(guard, [key.token for key in keys])
        task = asyncio.create_task(worker.run())
        await asyncio.sleep(1)  # the register has all
        found, before = Revoked([], 0, {}, Ended({}, 0.0)), cpu_seconds()
        for key in keys:
            started = time.monotonic()
            done = await guard.keys.revoke(key.account_id, key.id)
            found.returned[key.token.decode()] = now = time.monotonic()
            found.seconds.append(now - started)
            found = found._replace(by_lease=found.by_lease + (done.how == "lease"))
            await asyncio.sleep(BETWEEN_SECONDS)
        worker.stopping = True
        await task
        return found._replace(own=Ended(worker.accepted_until, cpu_seconds() - before))


class Outcome(NamedTuple):
    """What came of it with so many processes."""

    revoked: Revoked
    late: int  # keys that were accepted after revoking them had returned
    busy: float  # percent of the cores


def revoke_among(count: int, database: str, redis: str, revocations: int) -> Outcome:
    """Revoke keys among so many processes, this one included."""

    async def prepare() -> list[MadeKey]:
        async with Guard.from_urls(database=database, redis=redis) as guard:
            keys = list(make_keys(guard, revocations))
            await insert(guard, keys)
            return keys

    keys = uvloop.run(prepare())
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        tokens.write_bytes(b"\n".join(key.token for key in keys))
        with workers(count - 1, database, redis, tokens) as processes:
            started = time.monotonic()
            revoked = uvloop.run(revoke_all(database, redis, keys))
            took = time.monotonic() - started
            ends = [Ended(*json.loads(process.communicate("\n")[0])) for process in processes]
    ends.append(revoked.own)
    late = sum(
        end.accepted_until.get(token, 0.0) > returned
        for token, returned in revoked.returned.items()
        for end in ends
    )
    busy = 100 * sum(end.cpu for end in ends) / took / (os.cpu_count() or 1)
    return Outcome(revoked, late, busy)


def figures_of(outcome: Outcome, count: int) -> list[Figure]:
    """Return the figures with so many processes."""
    ordered = sorted(outcome.revoked.seconds)
    return [
        figure_of(
            (seconds * 1e3 for seconds in ordered),
            target="T8",
            name=f"revoking, {count} processes, p50",
            unit="ms",
            most=P50_MS,
        ),
        Figure(
            target="T8",
            name=f"revoking, {count} processes, p99 of {len(ordered)}",
            value=percentile(ordered, 0.99) * 1e3,
            unit="ms",
            most=P99_MS,
        ),
        Figure(
            target="T8",
            name="keys accepted after revoking them returned",
            value=outcome.late,
            unit="",
            most=0,
        ),
        Figure(
            target="",
            name="of them not acknowledged, but by lease",
            value=outcome.revoked.by_lease,
            unit="",
        ),
        Figure(
            target="T8",
            name="the processes' share of the cores",
            value=outcome.busy,
            unit="%",
            most=MOST_BUSY,
        ),
    ]


def measure(length: Length) -> Result:
    """Return all that is measured."""
    result = Result(subject="revoking", s_ns=median_s() * 1e9, figures=[])
    counts = [2, 4, PROCESSES] if length is Length.LONG else [length.of(2, PROCESSES, PROCESSES)]
    with RedisServer() as redis, PostgresServer() as postgres:
        for count in counts:
            database = postgres.create_database(f"among_{count}")
            outcome = revoke_among(count, database, redis.url, length.of(5, 60, 200))
            ordered = sorted(outcome.revoked.seconds)
            result.curves[f"{count} processes"] = [
                (share, percentile(ordered, share) * 1e3) for share in SHARES
            ]
            result.figures = figures_of(outcome, count)
    return result


if __name__ == "__main__":
    if len(sys.argv) == 4:  # noqa: PLR2004  # a worker is told the two URLs and the file of tokens
        uvloop.run(work(sys.argv[1], sys.argv[2], Path(sys.argv[3]).read_bytes().split()))
    else:
        run("revoking", __doc__, measure)
