"""Where a token must never be seen: logs, errors, answers, and the database."""

import logging
import math
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import MetaData, select

from tests.http.guarded_app import Observed, make_app
from tests.http.support import Answer, bearer, call, database_gone, http_scope, make_guard
from tests.support.guards import (
    cut_off,
    freshness_of,
    local_of,
    prepare,
    shared_of,
    verifier_of,
    written,
)
from tests.support.postgres import PostgresServer
from tests.support.redis import RedisServer
from tests.support.sql import engine_for, execute
from tfm_guard import APIKeyMiddleware, Guard
from tfm_guard.errors import GuardError


class Canary:
    """A token, and everything in which it must not be found."""

    def __init__(self, token: str) -> None:
        self.token = token
        secret = token[14:46]
        self._forms = [secret.encode(), bytes.fromhex(secret), secret.upper().encode()]
        self.seen: list[bytes] = []

    def look(self, *things: object) -> None:
        """Note each of *things* as it is, and as it reads."""
        for thing in things:
            self.seen.append(bytes(thing) if isinstance(thing, (bytes, memoryview)) else b"")
            self.seen += [str(thing).encode(), repr(thing).encode()]

    @property
    def found(self) -> list[bytes]:
        """What holds the secret, in hex or in bytes."""
        return [text for text in self.seen if any(form in text for form in self._forms)]


@pytest.fixture
def all_logs(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Record what every logger has to say, however little it matters."""
    names = [name for name in logging.root.manager.loggerDict if not name.startswith("hypothesis")]
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)
    with caplog.at_level(logging.DEBUG):
        yield caplog
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def look_at_logs(canary: Canary, log: pytest.LogCaptureFixture) -> None:
    """Let *canary* look at all records: their texts, arguments and tracebacks."""
    formatter = logging.Formatter("%(name)s %(message)s")
    for record in log.records:
        canary.look(record.getMessage(), record.args, record.__dict__, formatter.format(record))


def look_at_tables(canary: Canary, url: str) -> int:
    """Let *canary* look at every cell of every table, and return how many rows there are."""
    rows = 0
    metadata = MetaData()
    with engine_for(url).connect() as connection:
        metadata.reflect(connection)
        for table in metadata.sorted_tables:
            for row in connection.execute(select(table)):
                rows += 1
                canary.look(*row)
    return rows


def look_at_files(canary: Canary, folder: Path) -> None:
    """Let *canary* look at the files of an SQLite database, with what was deleted from it."""
    for path in folder.glob("tfm_guard.db*"):
        canary.look(path.read_bytes())


def look_at_redis(canary: Canary, server: RedisServer) -> int:
    """Let *canary* look at every name and value in Redis, and return how many there are."""
    with server.client() as client:
        values = {name: client.get(name) for name in client.scan_iter()}
    for name, value in values.items():
        canary.look(name, value)
    return len(values)


async def ask(canary: Canary, app: APIKeyMiddleware, path: str = "/v1/x") -> list[int]:
    """Send the token in all ways, right and wrong, and return the answers' statuses."""
    token = canary.token
    flipped = token[:-1] + ("1" if token.endswith("0") else "0")
    requests = [
        http_scope(path=path, headers=bearer(token)),
        http_scope(path=path, headers=bearer(flipped)),
        http_scope(path=path, headers=bearer(token + "0")),
        http_scope(path=path, headers=bearer(token.upper())),
        http_scope(path=path, headers=bearer(token) * 2),
        http_scope(path=path, headers=bearer(f"{token} {token}")),
        http_scope(path=path, headers=bearer(f'"{token}"')),
        http_scope(path=path, headers=[(b"authorization", token.encode())]),
        http_scope(path=path, headers=[(b"authorization", b"Basic " + token.encode())]),
        http_scope(path=path, query_string=b"access_token=" + token.encode()),
        http_scope(path=path, headers=[(b"cookie", b"key=" + token.encode())]),
    ]
    answers: list[Answer] = [await call(app, scope) for scope in requests]
    canary.look(*answers)
    return [answer.status for answer in answers]


async def verify(canary: Canary, guard: Guard) -> None:
    """Verify the token and let *canary* look at the key or the error, with its traceback."""
    try:
        canary.look(await guard.verify(canary.token))
    except GuardError as error:
        canary.look(error, error.args, vars(error), *traceback.format_exception(error))


async def ask_all_places(
    canary: Canary, app: APIKeyMiddleware, guard: Guard, server: RedisServer
) -> None:
    """Have the token accepted as the database says, from memory, and from Redis; look there."""
    for _ in range(2):
        assert await ask(canary, app) == [200, *REFUSED]
    await written(shared_of(guard))
    assert look_at_redis(canary, server) >= 1
    async with make_guard(guard.settings.database_url, redis=server.url) as other:
        observed = Observed()
        assert await ask(canary, make_app(other, observed)) == [200, *REFUSED]
        observed.stop()
        assert other.counters.shared_hits == 1
        canary.look(verifier_of(other), local_of(other), shared_of(other), other.counters)


REFUSED = [401, 401, 401, 400, 400, 401, 401, 401, 401, 401]


async def test_a_token_is_nowhere(
    database_url: str,
    tmp_path: Path,
    postgres_server: PostgresServer,
    redis_server: RedisServer,
    all_logs: pytest.LogCaptureFixture,
) -> None:
    """No log, error, later answer, cell of the database or value in Redis holds a secret, ever."""
    observed = Observed()
    await prepare(database_url)
    async with make_guard(database_url, redis=redis_server.url) as guard:
        app, api = make_app(guard, observed), guard.management_app()
        manager = await guard.keys.create(
            account_id="acme", name="manager", scopes=["send", "api-keys:read", "api-keys:write"]
        )
        created = await call(
            api, http_scope("POST", "/v1/api-keys/", bearer(manager.token)), b'{"name":"CI"}'
        )
        canary = Canary(created.json["key"])
        canary.look(created)
        assert canary.found  # here it is, this once, and so the search works
        canary.seen.clear()
        canary.look(guard, manager, app, api)

        await ask_all_places(canary, app, guard, redis_server)

        # From now on the database is asked. Then argon2 decides; then the scope is missing.
        await cut_off(guard)
        freshness_of(guard).fresh_until = -math.inf
        execute(database_url, "UPDATE tfm_keys SET digest = NULL, digest_key_id = NULL")
        assert await ask(canary, app) == [200, *REFUSED]
        await verify(canary, guard)
        canary.look(await call(api, http_scope("GET", "/v1/api-keys/", bearer(manager.token))))
        canary.look(await call(api, http_scope("GET", "/v1/api-keys/", bearer(canary.token))))

        # With no database, and with a row that cannot be read.
        async with database_gone(database_url, postgres_server):
            assert (await ask(canary, app))[0] == 503
            await verify(canary, guard)
        await verify(canary, guard)
        if database_url.startswith("sqlite"):  # PostgreSQL would not take it
            execute(database_url, "UPDATE tfm_keys SET expires_at = 'whenever'")
            assert (await ask(canary, app))[0] == 503
            await verify(canary, guard)
            execute(database_url, "UPDATE tfm_keys SET expires_at = NULL")
        execute(database_url, "UPDATE tfm_keys SET digest = NULL, secret_hash = 'garbage'")
        assert await ask(canary, app) == [401, *REFUSED]
        await verify(canary, guard)

        # Revoked.
        path = f"/v1/api-keys/{created.json['id']}"
        execute(database_url, "UPDATE tfm_keys SET revoked_at = created_at WHERE name = 'CI'")
        assert await ask(canary, app) == [401, *REFUSED]
        await verify(canary, guard)
        canary.look(await call(api, http_scope("DELETE", path, bearer(manager.token))))
        assert look_at_tables(canary, database_url) > 10
        assert look_at_redis(canary, redis_server) >= 1
    observed.stop()
    look_at_files(canary, tmp_path)
    look_at_logs(canary, all_logs)
    told = {record.name.partition(".")[0] for record in all_logs.records}
    assert {"tfm_guard", "sqlalchemy"} <= told
    assert len(canary.seen) > 1_000
    assert canary.found == []
