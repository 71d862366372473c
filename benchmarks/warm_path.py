"""What the middleware adds to a request whose key is in memory (T1), and what refusing costs (T7).

Measured in turn in one process: S; the bare app, called as a server calls it; the same app behind
the middleware; and the decision to refuse a forged token, and a wrong secret under the prefix of a
key in memory. Single calls are timed too, for the percentiles.

    python -m benchmarks.warm_path [--json] [--brief | --long]
"""

import asyncio
import gc
import tempfile
import time

from benchmarks.measuring import (
    ASGIApp,
    Figure,
    Length,
    Result,
    Scope,
    app,
    discard,
    figure_of,
    percentile,
    receive,
    request,
    run,
    spread,
    time_of_calls,
    time_of_s,
    times_of_calls,
)
from tfm_guard import APIKeyMiddleware, Guard
from tfm_guard.errors import InvalidToken

CALLS = 2_000  # in each round
CALLS_REFUSED = 500
SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)


def with_other_secret(token: bytes) -> bytes:
    """Return a token with the prefix of *token* and a tag that does not fit, as one may guess."""
    return token[:14] + bytes(reversed(token[14:46])) + token[46:]


async def time_to_verify(guard: Guard, token: bytes) -> float:
    """Return the seconds in which `verify` comes to refuse a forged *token*."""
    refused = 0
    started = time.perf_counter()
    for _ in range(CALLS_REFUSED):
        try:
            await guard.verify(token)
        except InvalidToken:
            refused += 1
    return _checked(time.perf_counter() - started, refused)


async def time_to_recall(guard: Guard, token: bytes) -> float:
    """Return the seconds in which memory alone comes to refuse a wrong *token*."""
    headers, refused = request(b"Bearer " + token)["headers"], 0
    started = time.perf_counter()
    for _ in range(CALLS_REFUSED):
        try:
            guard.recall(headers)
        except InvalidToken:
            refused += 1
    return _checked(time.perf_counter() - started, refused)


def _checked(seconds: float, refused: int) -> float:
    if refused != CALLS_REFUSED:
        raise SystemExit("a token that is of no key was accepted")
    return seconds / CALLS_REFUSED


async def measure_rounds(guard: Guard, length: Length) -> tuple[Result, int]:
    """Return what was measured, and how many keys were looked for outside of memory meanwhile."""
    token = (await guard.keys.create(account_id="bench", name="warm path")).token.encode()
    forged = b"tfm_k_" + b"00112233" + token[14:]
    wrong = with_other_secret(token)
    guarded = APIKeyMiddleware(app, guard=guard, exempt=("/healthz",))
    good, scopes = (
        request(b"Bearer " + token),
        [request(b"Bearer " + bad) for bad in (forged, wrong)],
    )
    await guarded(good, receive, discard)  # remembered from here on
    before = guard.counters.store_reads + guard.counters.shared_reads
    rounds = []
    gc.disable()
    for _ in range(length.of(3, 31, 101)):
        s = time_of_s()
        bare = await time_of_calls(app, good, CALLS)
        warm = await time_of_calls(guarded, good, CALLS)
        refusals = [await time_to_verify(guard, forged), await time_to_recall(guard, wrong)]
        answers = [await time_of_calls(guarded, scope, CALLS // 20) for scope in scopes]
        rounds.append((s, bare, warm, *refusals, *answers))
        await asyncio.sleep(0)  # the lease is renewed by a task of the guard
    gc.enable()
    asked = guard.counters.store_reads + guard.counters.shared_reads - before
    figures = figures_of(rounds)
    s = spread(row[0] for row in rounds).median
    curves = await measure_single_calls(guarded, good, s, length.of(2_000, 100_000, 400_000))
    figures.insert(1, added_at_99(curves))
    return Result(subject="warm_path", s_ns=s * 1e9, figures=figures, curves=curves), asked


def figures_of(rounds: list[tuple[float, ...]]) -> list[Figure]:
    """Return the medians over *rounds*: S, bare, warm, two refusals, and the two answers."""
    multiples = [[each / row[0] for each in row] for row in rounds]
    return [
        figure_of(
            (row[2] - row[1] for row in multiples),
            target="T1",
            name="added to a request, median",
            unit="S",
            most=5,
        ),
        figure_of((row[1] for row in multiples), target="", name="the bare app", unit="S"),
        figure_of(
            (row[3] for row in multiples),
            target="T7",
            name="refusing a forged key",
            unit="S",
            most=15,
        ),
        figure_of(
            (row[4] for row in multiples),
            target="T7",
            name="refusing a wrong secret, prefix known",
            unit="S",
            most=8,
        ),
        figure_of(
            (row[5] for row in multiples), target="", name="a forged key, with the answer", unit="S"
        ),
        figure_of(
            (row[6] for row in multiples),
            target="",
            name="a wrong secret, with the answer",
            unit="S",
        ),
    ]


async def measure_single_calls(
    guarded: ASGIApp, scope: Scope, s: float, calls: int
) -> dict[str, list[tuple[float, float]]]:
    """Return the percentiles of single calls, as multiples of S."""
    times: dict[str, list[float]] = {"bare": [], "tfm-guard": []}
    for _ in range(calls // 1_000):
        times["bare"] += await times_of_calls(app, scope, 1_000)
        times["tfm-guard"] += await times_of_calls(guarded, scope, 1_000)
        await asyncio.sleep(0)
    return {
        name: [(share, percentile(sorted(each), share) / s) for share in SHARES]
        for name, each in times.items()
    }


def added_at_99(curves: dict[str, list[tuple[float, float]]]) -> Figure:
    """Return what 99 in 100 requests are at most longer than the median bare one."""
    slow, plain = dict(curves["tfm-guard"])[0.99], dict(curves["bare"])[0.5]
    return Figure(
        target="T1", name="added to a request, p99", value=slow - plain, unit="S", most=15
    )


async def measured(length: Length) -> Result:
    """Return all that is measured."""
    with tempfile.TemporaryDirectory() as folder:
        async with Guard.from_urls(database=f"sqlite:///{folder}/keys.db") as guard:
            result, asked = await measure_rounds(guard, length)
    result.figures.append(
        Figure(target="T7", name="questions to a database", value=asked, unit="", most=0)
    )
    return result


def measure(length: Length) -> Result:
    """Return all that is measured."""
    return asyncio.run(measured(length))


if __name__ == "__main__":
    run("warm_path", __doc__, measure)
