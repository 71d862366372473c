"""Calling ASGI apps directly, and databases with keys of every kind in them."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import msgspec
from starlette.types import ASGIApp, Message, Scope

from tests.support.postgres import PostgresServer
from tests.support.sql import execute
from tfm_guard.guard import Guard
from tfm_guard.settings import Settings
from tfm_guard.testing import CHEAP_HASHING, ManualClock
from tfm_guard.token import RANDOM_BYTES, Tagger

MANY: Final = {"free": 1_000}

Headers = tuple[tuple[bytes, bytes], ...]


class Answer(NamedTuple):
    """What came back for one HTTP request."""

    status: int
    headers: Headers
    body: bytes

    def header(self, name: str) -> str | None:
        """Return the only header of that name, if there is one."""
        found = [value for key, value in self.headers if key.lower() == name.encode()]
        assert len(found) <= 1
        return found[0].decode() if found else None

    @property
    def json(self) -> Any:
        """The body, read as JSON."""
        return msgspec.json.decode(self.body)

    @property
    def code(self) -> str | None:
        """The code of a refusal; none where the body has none."""
        try:
            code = self.json["detail"]["code"]
        except (msgspec.DecodeError, KeyError, TypeError):
            return None
        assert isinstance(code, str)
        return code


def make_guard(url: str, **settings: Any) -> Guard:
    """Return a guard on the database at *url*, with cheap hashes and room for many keys."""
    return Guard.from_urls(database=url, **{"plans": MANY, **CHEAP_HASHING, **settings})


def http_scope(
    method: str = "GET",
    path: str = "/v1/x",
    headers: Iterable[tuple[bytes, bytes]] = (),
    **more: Any,
) -> Scope:
    """Return an ASGI scope for an HTTP request; *more* is added to it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": list(headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        **more,
    }


def websocket_scope(
    headers: Iterable[tuple[bytes, bytes]], *, denial: bool, path: str = "/v1/x"
) -> Scope:
    """Return the scope of a WebSocket, on a server with or without the denial extension."""
    extensions = ["websocket.http.response"] if denial else []
    return http_scope(
        path=path, headers=headers, type="websocket", extensions={name: {} for name in extensions}
    )


def bearer(token: str | bytes) -> list[tuple[bytes, bytes]]:
    """Return the header that carries *token*."""
    raw = token if isinstance(token, bytes) else token.encode()
    return [(b"authorization", b"Bearer " + raw)]


async def call(app: ASGIApp, scope: Scope, body: bytes = b"") -> Answer:
    """Send *app* one request and return its answer."""
    incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        return incoming.pop() if incoming else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *rest = sent
    assert start["type"] == "http.response.start"
    assert all(message["type"] == "http.response.body" for message in rest)
    content = b"".join(message.get("body", b"") for message in rest)
    return Answer(start["status"], tuple(map(tuple, start["headers"])), content)


@asynccontextmanager
async def database_gone(url: str, postgres_server: PostgresServer) -> AsyncIterator[None]:
    """Take the database away for as long as the block lasts: its server, or the table of keys."""
    if url.startswith("postgresql"):
        postgres_server.stop()
        yield
        postgres_server.start()
    else:
        # In a thread: the guard may be writing, and goes on only while the event loop does.
        await asyncio.to_thread(execute, url, "ALTER TABLE tfm_keys RENAME TO tfm_away")
        yield
        await asyncio.to_thread(execute, url, "ALTER TABLE tfm_away RENAME TO tfm_keys")


async def seed(url: str) -> dict[str, bytes]:
    """Make a key of every kind in the SQLite database at *url*, and return the tokens by kind."""
    tokens: dict[str, bytes] = {}
    async with make_guard(url) as guard:
        for kind in ("good", "revoked", "unscoped", "strange", "suspended"):
            scopes = () if kind == "unscoped" else ("send",)
            account = "suspended" if kind == "suspended" else "acme"
            created = await guard.keys.create(account_id=account, name=kind, scopes=scopes)
            tokens[kind] = created.token.encode()
            if kind == "revoked":
                await guard.keys.revoke("acme", created.key.id)
    settings = Settings.load({}, database_url=url, plans=MANY, **CHEAP_HASHING)
    clock = ManualClock(datetime.now(UTC) - timedelta(days=1))
    async with Guard(settings, clock=clock) as past:
        expiry = clock.now() + timedelta(hours=1)
        created = await past.keys.create(account_id="acme", name="expired", expires_at=expiry)
        tokens["expired"] = created.token.encode()
    execute(
        url,
        "UPDATE tfm_accounts SET suspended_at = '2026-01-01T00:00:00.000000Z' "
        "WHERE id = 'suspended'",
    )
    execute(url, "UPDATE tfm_keys SET scopes = 'no-such-scope' WHERE name = 'strange'")
    tagger = Tagger(execute(url, "SELECT value FROM tfm_secrets WHERE name = 'tag'")[0][0])
    tokens["unknown"] = tagger.mint(bytes(RANDOM_BYTES))
    prefix = bytes.fromhex(tokens["good"][6:14].decode())
    tokens["wrong"] = tagger.mint(prefix + bytes(RANDOM_BYTES - 4))
    return tokens
