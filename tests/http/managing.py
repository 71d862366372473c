"""The management API with keys of those who call it."""

from typing import Any, NamedTuple

import msgspec
from sqlalchemy import select

from tests.http.support import Answer, Headers, bearer, call, http_scope
from tests.support.sql import execute
from tfm_guard import Guard
from tfm_guard.http.persons import Identify
from tfm_guard.records import ApiKey
from tfm_guard.store import schema

KEYS = "/v1/api-keys/"
AUDIT = "/v1/audit-log"


class Api(NamedTuple):
    """The management API, the guard behind it, and the keys of those who call it."""

    guard: Guard
    url: str
    tokens: dict[str, str]
    keys: dict[str, ApiKey]

    async def call(
        self,
        method: str,
        path: str = KEYS,
        body: object = b"",
        *,
        caller: str = "manager",
        query: str = "",
    ) -> Answer:
        """Call it with the key of *caller*; what is not bytes is sent as JSON."""
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        scope = http_scope(method, path, bearer(self.tokens[caller]), query_string=query.encode())
        answer = await call(self.guard.management_app(), scope, raw)
        assert answer.header("cache-control") == "no-store"
        return answer

    async def create(self, **body: Any) -> Answer:
        """Create a key as the manager."""
        return await self.call("POST", body=body)

    async def call_as(
        self,
        identify: Identify,
        method: str,
        path: str = KEYS,
        body: object = b"",
        headers: Headers = (),
    ) -> Answer:
        """Call it as whom *identify* says is signed in."""
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        app = self.guard.management_app(identify=identify)
        return await call(app, http_scope(method, path, headers), raw)

    async def add(self, name: str, *scopes: str, **options: Any) -> None:
        """Give acme another key, which can call under that name."""
        created = await self.guard.keys.create(
            account_id="acme", name=name, scopes=scopes, **options
        )
        self.tokens[name], self.keys[name] = created.token, created.key

    def path(self, name: str, rest: str = "") -> str:
        """Return the path of the key of that caller."""
        return f"{KEYS}{self.keys[name].id}{rest}"

    async def row(self, key_id: object) -> Any:
        """Return the key's row in the list."""
        rows = (await self.call("GET")).json
        return next((row for row in rows if row["id"] == str(key_id)), None)

    def audited(self, *columns: str) -> list[tuple[Any, ...]]:
        """Return these columns of the audit log, oldest first."""
        rows = select(*(schema.audit.c[name] for name in columns)).order_by(schema.audit.c.id)
        return [tuple(row) for row in execute(self.url, rows)]
