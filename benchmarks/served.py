"""What the middleware takes of a server's throughput: T2.

Serves four apps by uvicorn (httptools, uvloop), each in a process of its own: the bare app, and a
Starlette route that answers JSON, each with and without the middleware. Each pair is loaded in
turns; what counts is the median of the ratios within pairs.

    python -m benchmarks.served [--json] [--brief | --long]
"""

import asyncio
import contextlib
import tempfile

import uvloop

from benchmarks.load import Load, load, request_bytes
from benchmarks.measuring import Figure, Length, Result, figure_of, median_s, run
from tests.support.uvicorn_process import UvicornProcess
from tfm_guard import Guard

CONNECTIONS = 32
# What is demanded of the guarded one, in percent of the other.
PAIRS = {"bare": ("guarded", 93.0), "route": ("guarded_route", 97.0)}
WORDS = {"bare": "a bare app", "route": "a Starlette route answering JSON"}


def pairs_of(length: Length) -> list[str]:
    """Return which apps are compared with their guarded ones."""
    return list(PAIRS)[: length.of(1, 2, 2)]


async def create_token(url: str) -> str:
    """Return the token of a new key in the database at *url*."""
    async with Guard.from_urls(database=url) as guard:
        return (await guard.keys.create(account_id="bench", name="served")).token


def server_of(app: str, url: str) -> UvicornProcess:
    """Return the server of one *app*, not yet started."""
    return UvicornProcess(
        f"benchmarks.apps:{app}",
        env={"TFM_GUARD_DATABASE_URL": url},
        extra_args=("--loop", "uvloop", "--no-access-log", "--log-level", "warning"),
    )


class Servers:
    """The servers by the names of their apps, and the request that all of them are sent."""

    def __init__(self, servers: dict[str, UvicornProcess], token: str) -> None:
        self._servers = servers
        self._request = request_bytes("/v1/emails/", f"Bearer {token}")

    async def load(self, app: str, seconds: float) -> Load:
        """Load one of them."""
        server = self._servers[app]
        return await load(
            server.port, server.pid, self._request, connections=CONNECTIONS, seconds=seconds
        )


async def measure_pair(servers: Servers, length: Length, bare: str) -> list[Figure]:
    """Return the throughput that is left of that of *bare* by the middleware."""
    guarded, least = PAIRS[bare]
    seconds = length.of(10, 30, 50) / 100
    rows: list[tuple[Load, Load]] = []
    for number in range(length.of(2, 12, 40)):
        order = (bare, guarded) if number % 2 else (guarded, bare)
        found = {app: await servers.load(app, seconds) for app in order}
        rows.append((found[bare], found[guarded]))
    return [
        figure_of(
            (100 * with_.per_second / without.per_second for without, with_ in rows),
            target="T2",
            name=f"requests/s, of {WORDS[bare]}",
            unit="%",
            least=least,
        ),
        figure_of(
            (100 * without.cpu / with_.cpu for without, with_ in rows),
            target="",
            name="the same by the server's CPU time",
            unit="%",
        ),
        figure_of(
            (without.cpu * 1e6 for without, _ in rows),
            target="",
            name=f"CPU of a request to {WORDS[bare]}",
            unit="µs",
        ),
    ]


async def measured(servers: Servers, length: Length) -> Result:
    """Return all that is measured."""
    result = Result(subject="served", s_ns=median_s() * 1e9, figures=[])
    for bare in pairs_of(length):
        result.figures += await measure_pair(servers, length, bare)
    return result


def measure(length: Length) -> Result:
    """Return all that is measured."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        url = f"sqlite:///{folder}/keys.db"
        token = asyncio.run(create_token(url))
        apps = [app for bare in pairs_of(length) for app in (bare, PAIRS[bare][0])]
        servers = {app: stack.enter_context(server_of(app, url)) for app in apps}
        return uvloop.run(measured(Servers(servers, token), length))


if __name__ == "__main__":
    run("served", __doc__, measure)
