"""An open guard with a key in it, for every test that asks for one."""

from collections.abc import AsyncIterator

import pytest

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
