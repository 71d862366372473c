"""An open guard with a key in it, for every test that asks for one."""

from collections.abc import AsyncIterator

import pytest

from tests.http.managing import Api
from tests.http.support import make_guard
from tfm_guard import Guard


@pytest.fixture
async def guard(sqlite_url: str) -> AsyncIterator[Guard]:
    """Open a guard on an SQLite database of its own."""
    async with make_guard(sqlite_url) as guard:
        yield guard


@pytest.fixture
async def token(guard: Guard) -> str:
    """Create a key that may send and read domains."""
    created = await guard.keys.create(account_id="acme", name="CI", scopes=["send", "domains:read"])
    return created.token


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[Api]:
    """Serve the management API to two accounts, on each kind of database."""
    scopes = {
        "manager": ("acme", ["api-keys:read", "api-keys:write", "send", "domains:read"]),
        "reader": ("acme", ["api-keys:read"]),
        "writer": ("acme", ["api-keys:write"]),
        "sender": ("acme", ["send"]),
        "other": ("other", ["api-keys:read", "api-keys:write", "send"]),
    }
    async with make_guard(database_url) as guard:
        created = {
            name: await guard.keys.create(account_id=account, name=name, scopes=granted)
            for name, (account, granted) in scopes.items()
        }
        yield Api(
            guard,
            database_url,
            {name: key.token for name, key in created.items()},
            {name: key.key for name, key in created.items()},
        )
