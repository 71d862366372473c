"""Measure one contender, in a process and an environment of its own; or serve it.

python -m benchmarks.contenders.drive MODULE [--brief]
DRIVEN=MODULE TOKEN_FILE=FILE uvicorn benchmarks.contenders.drive:served
"""

import asyncio
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.contenders.contender import Contender
from benchmarks.measuring import (
    Length,
    Message,
    Receive,
    Scope,
    Send,
    percentile,
    request,
    spread,
    time_of_calls,
    time_of_s,
    times_of_calls,
)

ROUND_SECONDS = 0.05
SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


async def make(module: str) -> Contender:
    """Return the contender of that *module*."""
    contender: Contender = await importlib.import_module(f"benchmarks.contenders.{module}").make()
    return contender


async def status_of(contender: Contender) -> int:
    """Return the status with which its guarded app answers."""
    statuses: list[int] = []

    async def note(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    await contender.guarded(request(contender.authorization), receive, note)
    return statuses[0]


async def measure(module: str, length: Length) -> dict[str, Any]:
    """Return what a request costs with and without keys, in multiples of S."""
    contender = await make(module)
    async with contender.ending:
        if await status_of(contender) != 204:  # noqa: PLR2004  # what all apps here answer
            raise SystemExit("the contender does not let its own key through")
        scope = request(contender.authorization)
        once = max(await time_of_calls(contender.guarded, scope, 3), 1e-6)
        calls = min(max(int(ROUND_SECONDS / once), 1), 2_000)
        rows, single = [], []
        for _ in range(length.of(2, 15, 31)):
            s = time_of_s()
            bare = await time_of_calls(contender.bare, dict(scope), min(calls * 4, 2_000))
            times = await times_of_calls(contender.guarded, dict(scope), calls)
            single += [each / s for each in times]
            rows.append((s, bare / s, sum(times) / len(times) / s))
        single.sort()
    return {
        "s_ns": spread(row[0] for row in rows).median * 1e9,
        "bare": spread(row[1] for row in rows),
        "guarded": spread(row[2] for row in rows),
        "added": spread(row[2] - row[1] for row in rows),
        "percentiles": [(share, percentile(single, share)) for share in SHARES],
    }


class Served:
    """A contender's guarded app as a server wants it, made when the server starts."""

    def __init__(self) -> None:
        self._contender: Contender | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._contender is not None:
            await self._contender.guarded(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._contender = await make(os.environ["DRIVEN"])
        token_file = Path(os.environ["TOKEN_FILE"])
        await asyncio.to_thread(token_file.write_bytes, self._contender.authorization)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._contender.ending.aclose()
        await send({"type": "lifespan.shutdown.complete"})


served = Served()

if __name__ == "__main__":
    how_long = Length.BRIEF if "--brief" in sys.argv else Length.USUAL
    print(json.dumps(asyncio.run(measure(sys.argv[1], how_long))))
