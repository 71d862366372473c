"""How long a start takes: T11.

Each program is started anew, again and again, and timed from outside of it, less what a Python that
does nothing takes. The first request is one that needs the database, as memory is empty.

    python -m benchmarks.starting [--json] [--brief | --long]
"""

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring import (
    Figure,
    Length,
    Result,
    app,
    discard,
    figure_of,
    median_s,
    receive,
    request,
    run,
)
from tfm_guard import APIKeyMiddleware, Guard

SECONDS_AT_MOST = 0.3
FIRST_MS_AT_MOST = 50
NOTHING = [sys.executable, "-c", "pass"]
STARTS = {
    "import tfm_guard": [sys.executable, "-c", "import tfm_guard"],
    "from tfm_guard import APIKeyMiddleware, Guard": [
        *(sys.executable, "-c"),
        "from tfm_guard import APIKeyMiddleware, Guard",
    ],
    "tfm-guard --help": [str(Path(sys.executable).with_name("tfm-guard")), "--help"],
}


def time_start(command: Sequence[str]) -> float:
    """Return the seconds that a *command* takes from start to end."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603  # our own
    return time.perf_counter() - started


def measure_starts(times: int) -> list[Figure]:
    """Return how long programs take to start."""
    rounds = [
        {name: time_start(command) for name, command in {"": NOTHING, **STARTS}.items()}
        for _ in range(times)
    ]
    return [
        figure_of(
            (each[name] - each[""] for each in rounds),
            target="T11",
            name=name,
            unit="s",
            most=SECONDS_AT_MOST,
        )
        for name in STARTS
    ]


async def time_first_request(url: str, token: bytes) -> tuple[float, float]:
    """Return the seconds to open a guard, and to answer its first request."""
    guard = Guard.from_urls(database=url)
    guarded = APIKeyMiddleware(app, guard=guard)
    started = time.perf_counter()
    async with guard:
        opened = time.perf_counter()
        scope = request(b"Bearer " + token)
        await guarded(scope, receive, discard)
        answered = time.perf_counter()
        if "user" not in scope:
            raise SystemExit("the key was refused")
    return opened - started, answered - opened


async def create_token(url: str) -> bytes:
    """Return the token of a new key."""
    async with Guard.from_urls(database=url) as guard:
        return (await guard.keys.create(account_id="bench", name="first")).token.encode()


def measure_first_requests(times: int) -> list[Figure]:
    """Return how long the first requests take, each in an event loop of its own."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/keys.db"
        token = asyncio.run(create_token(url))
        rows = [asyncio.run(time_first_request(url, token)) for _ in range(times)]
    return [
        figure_of(
            (1e3 * first for _, first in rows),
            target="T11",
            name="the first request after open",
            unit="ms",
            most=FIRST_MS_AT_MOST,
        ),
        figure_of((1e3 * opening for opening, _ in rows), target="", name="to open", unit="ms"),
    ]


def measure(length: Length) -> Result:
    """Return all that is measured."""
    figures = measure_starts(length.of(1, 7, 15)) + measure_first_requests(length.of(1, 9, 21))
    return Result(subject="starting", s_ns=median_s() * 1e9, figures=figures)


if __name__ == "__main__":
    run("starting", __doc__, measure)
