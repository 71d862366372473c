"""How politely a guard sits in somebody's event loop: T12.

Counts what warm requests ask of the event loop and of locks, and what they leave to the garbage
collector. Then has processes with an open guard do nothing, one on SQLite alone and one with Redis,
at the same time, and measures what they take of a core.

    python -m benchmarks.idle [--json] [--brief | --long]
"""

import asyncio
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextvars import Context
from types import FrameType
from typing import Any

from benchmarks.insides import linked
from benchmarks.measuring import (
    Figure,
    Length,
    Result,
    app,
    discard,
    median_s,
    receive,
    request,
    run,
)
from tests.support.postgres import PostgresServer
from tests.support.redis import RedisServer
from tests.support.servers import ROOT
from tfm_guard import APIKeyMiddleware, Guard

REQUESTS = 1_000
LOCKING = {"acquire", "release", "__enter__", "__exit__"}
# Percent of a core.
AT_MOST = {"on SQLite alone": 1.0, "with Redis, on PostgreSQL": 0.5}
SETTLING_SECONDS = 1.0


class CountingLoop(asyncio.SelectorEventLoop):
    """asyncio's event loop, which counts what it is asked for."""

    asked = 0

    def call_soon(  # type: ignore[override]  # its own is generic
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        self.asked += 1
        return super().call_soon(callback, *args, context=context)

    def call_at(  # type: ignore[override]  # the same
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        self.asked += 1
        return super().call_at(when, callback, *args, context=context)

    def create_task(self, coro: Any, **options: Any) -> Any:
        self.asked += 1
        return super().create_task(coro, **options)


async def count_of_warm_requests() -> list[Figure]:
    """Return what warm requests ask for, all of them together."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, CountingLoop):
        raise SystemExit("the event loop does not count")
    calls: Counter[str] = Counter()

    def note(_frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call":
            calls[function.__name__] += 1

    with tempfile.TemporaryDirectory() as folder:
        async with Guard.from_urls(database=f"sqlite:///{folder}/keys.db") as guard:
            guarded = APIKeyMiddleware(app, guard=guard)
            token = (await guard.keys.create(account_id="bench", name="idle")).token.encode()
            scope = request(b"Bearer " + token)
            await guarded(scope, receive, discard)
            gc.collect()
            asked, tracked = loop.asked, len(gc.get_objects())
            for _ in range(REQUESTS):
                await guarded(scope, receive, discard)
            asked, tracked = loop.asked - asked, len(gc.get_objects()) - tracked
            sys.setprofile(note)
            for _ in range(REQUESTS):
                await guarded(scope, receive, discard)
            sys.setprofile(None)
    locks = sum(count for name, count in calls.items() if name in LOCKING)
    what = f"{REQUESTS:,} warm requests"
    return [
        _none(f"{what}: callbacks, timers and tasks", asked),
        _none(f"{what}: locks taken or released", locks),
        # Some are of the measurement itself, and of what the guard does meanwhile.
        Figure(
            target="", name=f"{what}: objects left to the collector", value=max(tracked, 0), unit=""
        ),
        Figure(
            target="",
            name="calls of functions in C for one",
            value=sum(calls.values()) / REQUESTS,
            unit="",
        ),
    ]


def _none(name: str, value: int) -> Figure:
    return Figure(target="T12", name=name, value=value, unit="", most=0, least=0)


async def be_idle(database: str, redis: str | None, seconds: float) -> None:
    """Do nothing for so many *seconds* with an open guard, and print what that took of a core."""
    async with Guard.from_urls(database=database, redis=redis) as guard:
        if redis is not None:
            await linked(guard)
        await asyncio.sleep(min(SETTLING_SECONDS, seconds))
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        await asyncio.sleep(seconds)
        after, took = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - started
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps(100 * used / took))


def measure_idle(seconds: float) -> list[Figure]:
    """Return what processes take that do nothing, all at the same time."""
    with (
        RedisServer() as redis,
        PostgresServer() as postgres,
        tempfile.TemporaryDirectory() as folder,
    ):
        urls = ([f"sqlite:///{folder}/keys.db"], [postgres.create_database("idle"), redis.url])
        processes = {
            name: subprocess.Popen(  # noqa: S603  # ourselves
                [sys.executable, "-m", "benchmarks.idle", str(seconds), *each],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name, each in zip(AT_MOST, urls, strict=True)
        }
        printed = {name: process.communicate()[0] for name, process in processes.items()}
    return [
        Figure(
            target="T12",
            name=f"a process that does nothing, {name}",
            value=json.loads(text),
            unit="% of a core",
            most=AT_MOST[name],
        )
        for name, text in printed.items()
    ]


def measure(length: Length) -> Result:
    """Return all that is measured."""
    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        figures = runner.run(count_of_warm_requests())
    figures += measure_idle(length.of(1, 75, 300) / 5)
    return Result(subject="idle", s_ns=median_s() * 1e9, figures=figures)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].replace(".", "").isdigit():
        asyncio.run(be_idle(sys.argv[2], next(iter(sys.argv[3:]), None), float(sys.argv[1])))
    else:
        run("idle", __doc__, measure)
