"""What the middleware adds to a request whose key is in memory: T1.

Measures, interleaved in one process: S, the time of one SHA-256 of a token; the bare app, called as
a server calls it; and the same app behind the middleware. Prints medians, and what the middleware
adds as a multiple of S, which is what can be compared between machines.

    python benchmarks/warm_path.py [--json]
"""

import argparse
import asyncio
import gc
import hashlib
import json
import statistics
import tempfile
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tfm_guard import APIKeyMiddleware, Guard

ROUNDS = 31
CALLS = 2_000  # in each round
TARGET = 5.0  # times S


async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer without reading, as the cheapest app there is."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def receive() -> Message:
    """Be a server whose client has sent everything."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def discard(_message: Message) -> None:
    """Be a server that forgets what it is told."""


def request(token: bytes) -> Scope:
    """Return what uvicorn makes of a request by a common client."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50_000),
        "scheme": "http",
        "method": "GET",
        "root_path": "",
        "path": "/v1/emails/",
        "raw_path": b"/v1/emails/",
        "query_string": b"",
        "headers": [
            (b"host", b"127.0.0.1:8000"),
            (b"accept", b"*/*"),
            (b"accept-encoding", b"gzip, deflate"),
            (b"connection", b"keep-alive"),
            (b"user-agent", b"python-httpx/0.28.1"),
            (b"authorization", b"Bearer " + token),
        ],
        "state": {},
    }


def time_of_sha256(token: bytes) -> float:
    """Return the seconds of one `hashlib.sha256(token).digest()`."""
    sha256 = hashlib.sha256
    started = time.perf_counter()
    for _ in range(CALLS):
        sha256(token).digest()
    return (time.perf_counter() - started) / CALLS


async def time_of_call(target: ASGIApp, scope: Scope) -> float:
    """Return the seconds of one call of *target*."""
    started = time.perf_counter()
    for _ in range(CALLS):
        await target(scope, receive, discard)
    return (time.perf_counter() - started) / CALLS


async def measure() -> dict[str, float]:
    """Return the medians, in nanoseconds, and the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        async with Guard.from_urls(database=f"sqlite:///{folder}/keys.db") as guard:
            created = await guard.keys.create(account_id="bench", name="warm path")
            token = created.token.encode()
            guarded = APIKeyMiddleware(app, guard=guard, exempt=("/healthz",))
            scope = request(token)
            await guarded(scope, receive, discard)  # remembered from here on
            before = guard.counters.store_reads
            rounds = []
            gc.disable()
            for _ in range(ROUNDS):
                s = time_of_sha256(token)
                bare = await time_of_call(app, scope)
                rounds.append((s, bare, await time_of_call(guarded, scope)))
                await asyncio.sleep(0)  # the lease is renewed by a task of the guard
            gc.enable()
            misses = guard.counters.store_reads - before
    s, bare, warm = (statistics.median(column) * 1e9 for column in zip(*rounds, strict=True))
    ratios = sorted((warm - bare) / s for s, bare, warm in rounds)
    return {
        "S_ns": s,
        "bare_ns": bare,
        "guarded_ns": warm,
        "added_ns": warm - bare,
        "added_S": statistics.median(ratios),
        "added_S_low": ratios[len(ratios) // 10],
        "added_S_high": ratios[-len(ratios) // 10],
        "misses": misses,
        "target_S": TARGET,
    }


def main() -> None:
    """Print the table, or JSON; exit 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args()
    result = asyncio.run(measure())
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"S, one SHA-256 of a token   {result['S_ns']:8.0f} ns")
        print(f"bare app                    {result['bare_ns']:8.0f} ns")
        print(f"behind the middleware       {result['guarded_ns']:8.0f} ns")
        print(f"added by the middleware     {result['added_ns']:8.0f} ns")
        print(
            f"added, as a multiple of S   {result['added_S']:8.2f}      "
            f"(8 in 10 rounds: {result['added_S_low']:.2f} to {result['added_S_high']:.2f}; "
            f"target: at most {TARGET:g})"
        )
    raise SystemExit(0 if result["added_S"] <= TARGET and not result["misses"] else 1)


if __name__ == "__main__":
    main()
